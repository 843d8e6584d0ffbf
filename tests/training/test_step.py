"""One step against arithmetic written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.checks import ConfigError
from portable.training.data import IGNORE
from portable.training.options import TrainOptions
from portable.training.step import cross_entropy, decayed, init_state, learning_rate, make_step, parts


class Bigram(nnx.Module):
    """The smallest language model: logits are a row of a table, plus a bias that must not decay."""

    def __init__(self, vocab: int = 7, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.kernel = nnx.Param(jnp.asarray(rng.normal(size=(vocab, vocab)), jnp.float32))
        self.bias = nnx.Param(jnp.asarray(rng.normal(size=vocab), jnp.float32))

    def __call__(self, tokens, *, segment_ids=None):
        return self.kernel[...][tokens] + self.bias[...]


def batch(rows: int = 4, length: int = 6, seed: int = 1):
    rng = np.random.default_rng(seed)
    tokens, targets = rng.integers(0, 7, (2, rows, length)).astype(np.int32)
    targets[0, 3:] = IGNORE
    targets[2, :2] = IGNORE
    return {"tokens": tokens, "targets": targets, "segments": np.zeros_like(tokens)}


def loss_and_gradients(kernel, bias, data):
    """Mean negative log likelihood and its gradient, float64, one prediction after the other."""
    d_kernel, d_bias, total, count = np.zeros_like(kernel), np.zeros_like(bias), 0.0, 0
    for token, target in zip(data["tokens"].ravel(), data["targets"].ravel()):
        if target == IGNORE:
            continue
        logits = kernel[token] + bias
        p = np.exp(logits - logits.max())
        p /= p.sum()
        total -= math.log(p[target])
        count += 1
        p[target] -= 1
        d_kernel[token] += p
        d_bias += p
    return total / count, d_kernel / count, d_bias / count


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_steps_are_adamw_with_clipping_and_decay_of_the_matrix_only(accumulate):
    options = TrainOptions(
        steps=20,
        batch_size=4,
        length=6,
        accumulate=accumulate,
        learning_rate=0.05,
        warmup=2,
        clip=0.3,
        weight_decay=0.2,
    )
    graphdef, params, biases, rest = parts(Bigram())
    state = init_state(params, biases, options)
    step = make_step(graphdef, rest, options)

    values = [np.asarray(Bigram().kernel[...], np.float64), np.asarray(Bigram().bias[...], np.float64)]
    first, second = ([np.zeros_like(v) for v in values] for _ in range(2))
    for t in range(1, 6):
        data = batch(seed=t)
        loss, *gradients = loss_and_gradients(*values, data)
        norm = math.sqrt(sum((g**2).sum() for g in gradients))
        peak = options.learning_rate
        done = t - 1
        rate = peak * (done + 1) / 3 if done < 2 else peak * 0.5 * (1 + math.cos(math.pi * (done - 2) / 18))
        for i, decay in enumerate((options.weight_decay, 0.0)):
            g = gradients[i] * min(1.0, options.clip / norm)
            first[i] = options.beta1 * first[i] + (1 - options.beta1) * g
            second[i] = options.beta2 * second[i] + (1 - options.beta2) * g**2
            hats = first[i] / (1 - options.beta1**t), second[i] / (1 - options.beta2**t)
            values[i] = values[i] - rate * (hats[0] / (np.sqrt(hats[1]) + options.epsilon) + decay * values[i])
        state, metrics = step(state, data)
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
        assert metrics["gradient_norm"] == pytest.approx(norm, rel=1e-5)
        assert metrics["learning_rate"] == pytest.approx(rate, rel=1e-5)
        assert int(metrics["targets"]) == (data["targets"] != IGNORE).sum()
    assert int(state.step) == 5
    np.testing.assert_allclose(state.params["kernel"][...], values[0], rtol=2e-4, atol=1e-6)
    np.testing.assert_allclose(state.params["bias"][...], values[1], rtol=2e-4, atol=1e-6)


def test_the_state_is_donated_and_the_model_stays():
    options = TrainOptions(steps=2, warmup=0)
    model = Bigram()
    graphdef, params, biases, rest = parts(model)
    state = init_state(params, biases, options)
    kept = state.params["kernel"][...]
    make_step(graphdef, rest, options)(state, batch())
    assert kept.is_deleted()
    assert not model.kernel[...].is_deleted()


def test_the_loss_is_float32_whatever_the_logits_are():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 300)) * 4, jnp.bfloat16)
    targets = jnp.asarray([[1, 2, IGNORE, 4, 299], [IGNORE] * 5])
    total, count = cross_entropy(logits, targets)
    wide = np.asarray(logits, np.float64)
    expected = sum(
        np.log(np.exp(wide[0, i]).sum()) - wide[0, i, target] for i, target in enumerate([1, 2, None, 4, 299]) if target
    )
    assert total.dtype == jnp.float32
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert int(count) == 4
    assert [float(x) for x in cross_entropy(logits[1:], targets[1:])] == [0, 0]


def test_schedules():
    def at(steps, **options):
        schedule = learning_rate(TrainOptions(steps=100, **options))
        return [float(schedule(step)) for step in steps]

    assert at([0, 9, 10], learning_rate=1.0, warmup=10) == pytest.approx([1 / 11, 10 / 11, 1])
    assert at([100], learning_rate=1.0, warmup=10, final_fraction=0.1) == pytest.approx([0.1])
    assert at([55, 100], learning_rate=1.0, warmup=10, schedule="linear") == pytest.approx([0.5, 0])
    assert at([80, 90, 100], learning_rate=1.0, warmup=10, schedule="wsd") == pytest.approx([1, 0.5, 0])
    assert at([0, 99], learning_rate=1.0, warmup=0, schedule="constant") == [1, 1]
    assert at([0], learning_rate=1.0, warmup=0, schedule="wsd") == [1]


def test_what_decays():
    tree = {
        "norm": {"scale": 1},
        "mixer": {"A_log": 1, "D": 1, "dt_bias": 1, "in_x": {"kernel": 1, "bias": 1}},
    }
    tree["embed"] = {"embedding": 1}
    marks = jax.tree.map(bool, decayed(tree))
    assert marks.pop("embed") == {"embedding": True}
    assert marks["mixer"].pop("in_x") == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves(marks))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, got nan"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate must divide batch_size 6, got 4"),
        ({"schedule": "cos"}, "schedule must be one of cosine, linear, wsd, constant, got 'cos'"),
        ({"steps": 10, "warmup": 11}, "warmup must not exceed the 10 steps, got 11"),
        ({"beta2": 1.0}, "beta2 must be at least 0 and below 1, got 1.0"),
        ({"clip": -1.0}, "clip must not be negative, got -1.0"),
    ],
)
def test_wrong_options_are_said_in_a_sentence(options, sentence):
    with pytest.raises(ConfigError, match=sentence):
        TrainOptions(**options)

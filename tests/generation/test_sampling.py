"""Each rule of sampling against transformers' logits processors, and draws against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.generation import generate, sampling
from portable.generation.sampling import Options
from tests.generation.toys import Bigram, Recurrent
from tests.oracles import need

V = 700  # not a multiple of the sampler's block


def scores(kind):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(5, V)).astype(np.float32) * 3
    if kind == "ties":  # as bfloat16 logits have them: whole groups of equal values
        x = np.round(x * 2) / 2
    elif kind == "flat":
        x = np.zeros_like(x)
    elif kind == "peaked":
        x[:, 17] += 60
    elif kind == "masked":
        x[:, ::3] = -np.inf
    elif kind == "signed zeros":
        x = np.where(rng.random(x.shape) < 0.5, 0.0, -0.0).astype(np.float32)
        x[:, 5] = 2
    return x


KINDS = ["plain", "ties", "flat", "peaked", "masked", "signed zeros"]


def top(x):
    return jnp.max(x, axis=-1, keepdims=True)


def ours(x, **options):
    options = {k: np.float32(v) if k != "top_k" else np.int32(v) for k, v in options.items()}
    return np.asarray(jax.jit(sampling.filtered)(x, top(x), Options(**{"temperature": np.float32(1)} | options)))


def theirs(x, *names_and_values):
    torch, transformers = need("torch", "transformers")
    out = torch.from_numpy(x.copy())
    ids = torch.zeros((len(x), 1), dtype=torch.long)
    for name, value in names_and_values:
        out = getattr(transformers, f"{name}LogitsWarper")(value)(ids, out)
    return out.numpy()


def agree(got, expected):
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    p = lambda x: np.asarray(jax.nn.softmax(x, axis=1))  # noqa: E731
    np.testing.assert_allclose(p(got), p(expected), rtol=2e-5, atol=1e-12)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.05, 0.7, 1.0, 3.0])
def test_temperature(kind, temperature):
    agree(ours(scores(kind), temperature=temperature), theirs(scores(kind), ("Temperature", temperature)))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 2, 50, V - 1, V, V + 5])
def test_top_k(kind, k):
    agree(ours(scores(kind), top_k=k), theirs(scores(kind), ("TopK", k)))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [1e-6, 0.123, 0.5017, 0.9, 0.997])
def test_top_p(kind, p):
    # Which of equally likely tokens at the cut stay is arbitrary there (an unstable sort): how many is not.
    agree(np.sort(ours(scores(kind), top_p=p)), np.sort(theirs(scores(kind), ("TopP", p))))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.01, 0.3, 1.0])
def test_min_p(kind, p):
    agree(ours(scores(kind), min_p=p), theirs(scores(kind), ("MinP", p)))


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["plain", "ties", "masked"])
def test_the_filters_work_in_transformers_order(kind):
    got = ours(scores(kind), temperature=1.7, top_k=60, top_p=0.83, min_p=0.07)
    expected = theirs(scores(kind), ("Temperature", 1.7), ("TopK", 60), ("TopP", 0.83), ("MinP", 0.07))
    assert 1 < np.isfinite(expected).sum() < expected.size
    agree(np.sort(got), np.sort(expected))


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [0.6, 1.0, 1.3])
def test_repetition_penalty(penalty):
    torch, transformers = need("torch", "transformers")
    x = scores("plain")
    ids = np.random.default_rng(1).integers(0, V, (5, 40))
    seen = np.zeros((5, V), bool)
    seen[np.arange(5)[:, None], ids] = True
    expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(torch.from_numpy(ids), torch.from_numpy(x.copy()))
    np.testing.assert_allclose(sampling.penalized(x, seen, np.float32(penalty)), expected.numpy(), rtol=1e-6)


def test_repetition_penalty_covers_the_prompt_and_what_was_made():
    """Greedy with penalty, by the definition, over ragged prompts (padding must not count as seen)."""
    model = Recurrent(rngs=nnx.Rngs(6))
    prompts, penalty = [[5, 9, 11], [2], [7] * 9], 1.5
    got = generate(model, prompts, max_new_tokens=25, repetition_penalty=penalty).tokens
    for prompt, row in zip(prompts, got, strict=True):
        sequence, state = list(prompt), model.init_state(1)
        for token in prompt:
            logits, state = model._step(jnp.array([token]), state)
        for _ in range(25):
            l = np.asarray(logits[0], np.float64)
            for token in set(sequence):
                l[token] = l[token] * penalty if l[token] < 0 else l[token] / penalty
            sequence.append(int(l.argmax()))
            logits, state = model._step(jnp.array(sequence[-1:]), state)
        np.testing.assert_array_equal(row, sequence[len(prompt) :])
    assert (got != generate(model, prompts, max_new_tokens=25).tokens).any()


def test_top_p_at_a_boundary_and_at_one():
    x = np.log(np.array([[0.125, 0.5, 0.125, 0.25]], np.float32))
    kept = lambda p: np.isfinite(ours(x, top_p=p))[0].tolist()  # noqa: E731
    assert kept(0.5) == [False, True, False, False]
    assert kept(0.51) == [False, True, False, True]
    assert kept(0.80) == [True, True, False, True]  # of two equally likely, the first
    assert kept(0.90) == [True, True, True, True]
    assert np.isfinite(ours(scores("plain") * 8, top_p=1.0)).all()
    ties = ours(scores("ties"), top_p=1e-6)
    np.testing.assert_array_equal(np.isfinite(ties).argmax(1), scores("ties").argmax(1))


def test_greedy_takes_the_first_of_equals():
    x = np.zeros((3, V), np.float32)
    x[1, [40, 9, 600]] = 1
    x[2] = -np.inf
    x[2, V - 1] = 3
    np.testing.assert_array_equal(sampling.first_equal(x, top(x)), [0, 9, V - 1])


def test_a_tiny_temperature_is_greedy():
    x = scores("plain")
    chosen = sampling.choose(x, top(x), Options(np.float32(1e-30)), jnp.full((5, 2), 0.5))
    np.testing.assert_array_equal(chosen, x.argmax(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edge", [0.0, 1 - 2**-23])
def test_a_draw_never_lands_on_a_removed_token(kind, edge):
    x = ours(scores(kind), top_k=5)
    for uniform in ([edge, edge], [edge, 0.5], [0.5, edge]):
        drawn = np.asarray(sampling.sample(x, jnp.full((5, 2), jnp.array(uniform, jnp.float32))))
        assert np.isfinite(x[np.arange(5), drawn]).all()


@pytest.mark.parametrize("v", [3, 256, V])
def test_draws_follow_the_probabilities(v):
    x = np.random.default_rng(3).normal(size=v).astype(np.float32) * 1.5
    x[::4] = -np.inf
    x -= x.max()
    n = 200_000 if v > 3 else 20_000
    batch = jax.jit(jax.vmap(lambda u: sampling.sample(x[None], u[None])[0]))
    drawn = np.asarray(batch(jax.random.uniform(jax.random.key(v), (n, 2))))
    expected = np.exp(np.float64(x)) / np.exp(np.float64(x)).sum() * n
    seen = np.bincount(drawn, minlength=v)
    assert not seen[expected == 0].any()
    some = expected > 5
    chi2, freedom = ((seen - expected)[some] ** 2 / expected[some]).sum(), some.sum() - 1
    assert abs(chi2 - freedom) < 4.5 * np.sqrt(2 * max(freedom, 1)), f"{chi2:.0f} of {freedom}"


def test_generate_samples_only_what_the_filters_leave():
    table = np.random.default_rng(5).normal(size=(40, 40)).astype(np.float32) * 2
    neutral = {"top_k": 40, "top_p": 1.0, "min_p": 0.0}
    for name, value in (("top_k", 3), ("top_p", 0.6), ("min_p", 0.4)):
        options = neutral | {name: value}
        got = generate(
            Bigram(table), [[1]] * 4, max_new_tokens=300, temperature=1.0, key=jax.random.key(2), **options
        ).tokens
        left = np.isfinite(ours(table, **{name: value}))
        assert left[got[:, :-1], got[:, 1:]].all()
        assert len({tuple(row) for row in got}) == 4


def test_nothing_sorts_the_vocabulary():
    options = Options(np.float32(1), np.int32(5), np.float32(0.9), np.float32(0.1))
    text = jax.jit(lambda x: sampling.choose(x, top(x), options, jnp.zeros((5, 2)))).lower(scores("plain")).as_text()
    assert "stablehlo.sort" not in text
    assert "top_k" not in text

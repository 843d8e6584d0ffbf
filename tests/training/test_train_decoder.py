"""`portable train` on decoders: dense ones, ones with experts, and those of a config.json."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import models, nn
from portable.cli import main
from portable.models.decoder import Decoder, DecoderConfig
from portable.training.log import read_log
from portable.training.options import TrainOptions
from portable.training.step import cross_entropy, init_state, make_step, next_token, parts
from tests.oracles import need

need("grain", "matplotlib")

SIZES = ["--hidden-size", "32", "--layers", "2", "--head-dim", "16"]
FEW = ["--steps", "6", "--length", "32", "--batch-size", "2", "--warmup", "0", "--quiet", "--learning-rate", "0.01"]
CONFIG = {
    "model_type": "lfm2_moe",
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_dense_layers": 1,
    "layer_types": ["conv", "full_attention"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(bytes(range(32, 127)) * 30)
    return path


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "config.json"])
def test_trained_saved_and_asked(kind, text, tmp_path, capsys):
    """The loss falls, the model in the folder is of that family, and `portable generate` continues a text with it."""
    if kind == "config.json":
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
        model = ["--model", str(tmp_path / "config.json")]
    else:
        model = ["--model", kind, *SIZES]
    assert main(["train", str(text), "--out", str(tmp_path / "run"), *model, *FEW]) == 0
    losses = [record["loss"] for record in read_log(tmp_path / "run" / "log.jsonl")]
    assert losses[-1] < losses[0] - 0.3
    made = models.load(tmp_path / "run" / "model")
    assert isinstance(made, Decoder)
    assert made.config.family == (CONFIG["model_type"] if kind == "config.json" else kind)
    assert made.config.eos_token_id == 0  # the tokenizer's, whatever the file says
    capsys.readouterr()
    folder = str(tmp_path / "run" / "model")
    assert main(["generate", folder, "--prompt", "abc", "--max-new-tokens", "5", "--ignore-eos"]) == 0
    assert len(capsys.readouterr().out.encode()) >= 1


def test_routers_add_their_balance_to_the_loss():
    """In stacked layers as in a list, with the coefficient of the configuration, a target."""
    config = DecoderConfig.from_dict(CONFIG | {"model_type": "qwen3_moe", "num_hidden_layers": 3, "head_dim": 16})
    coefficient = 0.3

    def made(value):
        return Decoder(dataclasses.replace(config, router_aux_loss_coef=value), rngs=nnx.Rngs(0))

    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(0, 256, (2, 2, 9))
    batch = {"tokens": jnp.asarray(tokens), "targets": jnp.asarray(targets), "segments": jnp.zeros((2, 9), int)}
    model = made(coefficient)
    plain, count = next_token(made(0.0), batch)
    assert plain == cross_entropy(model(batch["tokens"], segment_ids=batch["segments"]), batch["targets"])[0]
    total, _ = next_token(model, batch)
    np.testing.assert_allclose(next_token(nn.stack(model), batch)[0], total, rtol=1e-5)
    # E times the sum over experts of (share of the tokens) * (mean probability), in NumPy, a layer after the other.
    graphdef, state = nnx.split(model)
    _, hidden = nnx.merge(graphdef, state)(batch["tokens"], return_hidden=True)
    losses = []
    for block, x in zip(model.layers, hidden, strict=False):
        x = x + block.mixer(block.mixer_norm(x))
        logits = np.asarray(block.mlp_norm(x), np.float64).reshape(18, -1) @ np.asarray(block.mlp.router.kernel[...])
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        chosen = np.argsort(-p, axis=1)[:, :2]
        share = np.bincount(chosen.ravel(), minlength=4) / len(chosen)
        losses.append(4 * (share * p.mean(0)).sum())
    np.testing.assert_allclose((total - plain) / count, coefficient * np.mean(losses), rtol=1e-4)


def test_a_step_moves_the_biases_of_the_selection_by_the_loads():
    """In microbatches and stacked layers; the loads counted in NumPy, a layer after the other."""
    config = DecoderConfig.from_dict(CONFIG | {"num_hidden_layers": 3, "num_dense_layers": 0, "layer_types": None})
    options = TrainOptions(steps=1, batch_size=4, length=8, accumulate=2, bias_rate=0.25, warmup=0)
    model = Decoder(config, rngs=nnx.Rngs(0))
    before = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32) / 8
    for block, bias in zip(model.layers, before, strict=True):
        block.mlp.selection_bias[...] = jnp.asarray(bias)
    rng = np.random.default_rng(0)
    tokens, targets = jnp.asarray(rng.integers(0, 256, (2, 4, 8)))
    batch = {"tokens": tokens, "targets": targets, "segments": jnp.zeros((4, 8), int)}
    _, hidden = model(tokens, return_hidden=True)
    wanted = []
    for block, x, bias in zip(model.layers, hidden, before, strict=False):
        x = x + block.mixer(block.mixer_norm(x))
        logits = np.asarray(block.mlp_norm(x), np.float64).reshape(32, -1) @ np.asarray(block.mlp.router.kernel[...])
        chosen = np.argsort(-(1 / (1 + np.exp(-logits)) + bias), axis=1)[:, :2]
        load = np.bincount(chosen.ravel(), minlength=4)
        assert load.std() > 0
        wanted.append(bias + 0.25 * np.sign(load.mean() - load))
    for made in (model, nn.stack(model)):
        graphdef, params, biases, rest = parts(made)
        state = init_state(params, biases, options)
        gradients = make_step(graphdef, rest, dataclasses.replace(options, bias_rate=0.0))(state, batch)[1]
        state, metrics = make_step(graphdef, rest, options)(init_state(params, biases, options), batch)
        assert metrics == gradients  # loads are in no norm of gradients
        found = np.concatenate([np.reshape(x, (-1, 4)) for x in jax.tree.leaves(state.biases)])
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_mistakes_are_one_sentence(text, tmp_path, capsys):
    other, odd = tmp_path / "other.json", tmp_path / "odd.json"
    other.write_text(json.dumps({"model_type": "nat"}))
    odd.write_text(json.dumps(CONFIG | {"num_experts_per_tok": 9}))
    small = tmp_path / "small.json"
    small.write_text(json.dumps(CONFIG | {"vocab_size": 100}))
    for arguments, words in [
        (["--model", "gpt"], ["--model must be one of mamba2, llama, qwen3_moe or a config.json", "gpt"]),
        (["--model", "llama", "--state-size", "8"], ["--model llama has no use for --state-size"]),
        (["--model", str(odd), "--layers", "3"], ["a config.json brings its own sizes, got --layers too"]),
        (["--model", str(odd)], ["odd.json", "num_experts_per_tok must be in 1..num_experts=4; got 9"]),
        (["--model", str(other)], ["other.json", "model_type must be one of", "'nat'"]),
        (["--model", str(small)], ["small.json knows 100 tokens, but bytes has 256"]),
        (["--model", "llama", "--init", "x"], ["--init brings its own sizes, got --model too"]),
        (["--model", "llama", "--head-dim", "0"], ["head_dim must be an integer of at least 1; got 0"]),
    ]:
        assert main(["train", str(text), *arguments, "--out", str(tmp_path / "run"), "--quiet"]) == 2, arguments
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
        assert len(said.strip().splitlines()) == 1, said


def test_a_step_of_training_differentiates_everything():
    """No parameter of a model with experts is left without a gradient."""
    config = DecoderConfig.from_dict(CONFIG | {"num_dense_layers": 0})
    graphdef, params, biases, rest = parts(Decoder(config, rngs=nnx.Rngs(0)))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 16)))

    def loss(params):
        return jnp.mean(nnx.merge(graphdef, params, biases, rest)(tokens) ** 2)

    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))

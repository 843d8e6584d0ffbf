"""Frequencies of every kind against transformers' tables, and rotations against complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable.nn import Rotary, rotary
from tests.oracles import need

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
_OURS_YARN = {"kind": "yarn", "factor": 4.0, "original_length": 64}
KINDS = {
    "default": ({"rope_type": "default"}, {}),
    "linear": ({"rope_type": "linear", "factor": 2.5}, {"kind": "linear", "factor": 2.5}),
    "yarn": (_YARN, _OURS_YARN),
    "yarn, other ends": (
        _YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        _OURS_YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    ),
    "yarn, two scales": (
        _YARN | {"mscale": 0.707, "mscale_all_dim": 0.3},
        _OURS_YARN | {"mscale": 0.707, "mscale_all_dim": 0.3},
    ),
    "yarn, its scale": (_YARN | {"attention_factor": 1.5}, _OURS_YARN | {"attention_factor": 1.5}),
    "yarn, where the ramp is a step": (
        _YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
        _OURS_YARN | {"beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    ),
    "llama3": (
        _LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"kind": "llama3", "factor": 8.0, "original_length": 64},
    ),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, {"kind": "dynamic", "factor": 3.0, "original_length": 128}),
}


@pytest.mark.oracle
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("name", KINDS)
def test_equals_transformers(name, theta):
    """Cosines and sines of far positions: equal to what float32 angles of this size allow."""
    torch, transformers = need("torch", "transformers")
    theirs, ours = KINDS[name]
    config = transformers.LlamaConfig(
        hidden_size=32,
        num_attention_heads=2,
        max_position_embeddings=128,
        rope_parameters=theirs | {"rope_theta": theta},
    )
    positions = np.arange(300)
    table = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    cos, sin = (z[0, :, :8].numpy() for z in table(torch.zeros(1), torch.tensor(positions)[None]))
    x = jnp.zeros((1, 300, 1, 16)).at[..., :8].set(1)
    y = rotary(x, jnp.asarray(positions), Rotary(theta, **ours), lengths=jnp.array([300]))[0, :, 0]
    np.testing.assert_allclose(y[:, :8], cos, atol=5e-5)
    np.testing.assert_allclose(y[:, 8:], sin, atol=5e-5)


@pytest.mark.parametrize("interleaved", [False, True])
def test_pairs_turn_as_complex_numbers(interleaved):
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 10))
    rope = Rotary(100.0, dims=6, interleaved=interleaved)
    with jax.enable_x64(True):
        y = np.asarray(rotary(jnp.asarray(x), jnp.arange(5) + 7, rope))
    first, second = (slice(0, 6, 2), slice(1, 6, 2)) if interleaved else (slice(0, 3), slice(3, 6))
    angles = (np.arange(5) + 7)[:, None, None] * 100.0 ** (-np.arange(3) / 3)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angles)
    np.testing.assert_allclose(y[..., first], turned.real, atol=1e-12)
    np.testing.assert_allclose(y[..., second], turned.imag, atol=1e-12)
    np.testing.assert_array_equal(y[..., 6:], x[..., 6:])


def test_dynamic_frequencies_follow_each_row():
    rope = Rotary(kind="dynamic", factor=2.0, original_length=8)
    x = jax.random.normal(jax.random.key(0), (2, 12, 1, 8))
    y = rotary(x, jnp.arange(12), rope, lengths=jnp.array([8, 12]))
    np.testing.assert_array_equal(y[0], rotary(x[:1], jnp.arange(12), Rotary())[0])
    base = 10000.0 * (2.0 * 12 / 8 - 1) ** (8 / 6)
    np.testing.assert_allclose(y[1], rotary(x[1:], jnp.arange(12), Rotary(base))[0], atol=1e-5)


BAD = [
    ({"kind": "longrope"}, "kind must be one of default, linear, dynamic, yarn, llama3; got 'longrope'"),
    ({"theta": 0.0}, "theta must be positive; got 0.0"),
    ({"kind": "linear", "factor": 0.5}, "factor must be at least 1; got 0.5"),
    ({"kind": "yarn", "factor": 2.0}, "yarn needs original_length"),
    (
        {"kind": "llama3", "original_length": 8, "high_freq_factor": 1.0},
        "high_freq_factor must exceed low_freq_factor; got 1.0 and 1.0",
    ),
]


@pytest.mark.parametrize("options, sentence", BAD)
def test_refusals(options, sentence):
    with pytest.raises(ValueError) as error:
        Rotary(**options)
    assert sentence in str(error.value)

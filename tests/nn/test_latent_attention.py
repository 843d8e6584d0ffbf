"""Latent attention: the absorbed form against keys and values, the cache against the whole sequence.

transformers' layers are the oracle in tests/models/test_decoder.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn
from portable.checks import PortableError


def _layer(**options):
    sizes = {"num_heads": 4, "kv_rank": 12, "query_rank": 10, "head_dim": 6, "rope_dim": 4, "value_dim": 5}
    return nn.LatentAttention(32, **sizes | {"rngs": nnx.Rngs(0)} | options)


def _inputs(b=2, t=14):
    return jax.random.normal(jax.random.key(1), (b, t, 32))


@pytest.mark.parametrize("options", [{}, {"query_rank": None, "use_bias": True, "rope": nn.Rotary(), "scale": 0.2}])
def test_both_forms_and_pieces_equal_the_whole(options):
    """A ragged first piece and a second one, which build keys and values, then steps, which do not."""
    layer, u, lengths = _layer(**options), _inputs(), jnp.array([3, 5])
    whole = layer(u)
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, u):
        layer = nnx.merge(graphdef, params)
        y1, state = layer(u[:, :5], state=layer.init_state(2, 14), lengths=lengths, return_state=True)
        rest = jnp.take_along_axis(u, (lengths[:, None] + jnp.arange(9))[..., None], axis=1)
        y2, state = layer(rest[:, :6], state=state, return_state=True)
        made = []
        for i in range(6, 9):
            y, state = layer.step(rest[:, i], state)
            made.append(y)
        return y1, jnp.concatenate([y2, jnp.stack(made, 1)], 1), state

    y1, later, state = run(params, u)
    for row, n in enumerate([3, 5]):
        np.testing.assert_allclose(y1[row, :n], whole[row, :n], atol=3e-6)
        np.testing.assert_allclose(later[row], whole[row, n : n + 9], atol=3e-6)
    assert state.length.tolist() == [12, 14]


def test_a_position_costs_the_latent_and_one_key():
    state = _layer(num_heads=64).init_state(3, 7)
    assert state.latents.shape == (3, 7, 12 + 4)


def test_a_step_builds_no_keys_and_values():
    """Nothing as large as the keys of all heads is in the program of a step: 64 heads of 6 channels, 512 positions."""
    layer = _layer(num_heads=64)
    graphdef, params = nnx.split(layer)
    state = layer.init_state(1, 512)
    text = jax.jit(lambda p, u, s: nnx.merge(graphdef, p).step(u, s)).lower(params, _inputs(1)[:, 0], state).as_text()
    sizes = [np.prod([int(n) for n in found.split("x")]) for found in _shapes(text)]
    assert max(sizes) < 512 * 64 * 6


def _shapes(text):
    import re

    return re.findall(r"tensor<([0-9x]+)x[a-z]", text)


def test_packed_documents_with_a_cache():
    layer, u = _layer(), _inputs(1, 12)
    segments = jnp.array([[1, 1, 2, 2, 2, 2, 2]])
    _, state = layer(u[:, :3], state=layer.init_state(1, 12), return_state=True)
    y, state = layer(u[:, 3:10], state=state, segment_ids=segments, return_state=True)
    z, _ = layer.step(u[:, 10], state)
    np.testing.assert_allclose(y[0, :2], layer(u[:, :5])[0, 3:], atol=3e-6)
    alone = layer(u[:, 5:11])[0]
    np.testing.assert_allclose(y[0, 2:], alone[:5], atol=3e-6)
    np.testing.assert_allclose(z[0], alone[5], atol=3e-6)


BAD = [
    (lambda: _layer(rope_dim=3), "rope_dim must be even; got 3"),
    (lambda: _layer()(_inputs()[..., :31]), "u must be [b, t, d] with d=32; got [2, 14, 31]"),
    (lambda: _layer()(_inputs(), return_state=True), "return_state needs a state"),
    (
        lambda: _layer()(_inputs(), state=_layer().init_state(2, 10)),
        "the state holds 10 positions, and more came; give init_state a larger length",
    ),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_refusals(call, sentence):
    with pytest.raises((ValueError, PortableError)) as error:
        call()
    assert sentence in str(error.value)

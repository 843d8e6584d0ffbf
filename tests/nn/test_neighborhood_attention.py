"""The layer: its projections around the op, its decoding, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn, ops


def _layer(**options):
    options = {"rank": 2, "num_heads": 4, "window": 3, "rngs": nnx.Rngs(0)} | options
    return nn.NeighborhoodAttention(16, **options)


def test_is_the_op_between_projections():
    layer = _layer(num_kv_heads=2, head_dim=6, dilation=(2, 1), rel_pos_bias=True, rngs=nnx.Rngs(1))
    layer.rel_pos_bias[...] = jax.random.normal(jax.random.key(2), layer.rel_pos_bias.shape)
    u = jax.random.normal(jax.random.key(3), (2, 7, 5, 16))
    mask = jax.random.bernoulli(jax.random.key(4), 0.8, (2, 7, 5))

    def heads(linear, n):
        return (u @ linear.kernel[...] + linear.bias[...]).reshape(2, 7, 5, n, 6)

    wanted = ops.neighborhood_attention(
        heads(layer.query, 4),
        heads(layer.key, 2),
        heads(layer.value, 2),
        window=3,
        dilation=(2, 1),
        rel_pos_bias=layer.rel_pos_bias[...],
        key_mask=mask,
        implementation="reference",
    ).reshape(2, 7, 5, 24)
    wanted = wanted @ layer.out.kernel[...] + layer.out.bias[...]
    assert layer.rel_pos_bias.shape == (4, 5, 5)
    np.testing.assert_allclose(layer(u, key_mask=mask), wanted, atol=2e-6)


# (space, options): each with every axis of space in reach of a window's border.
DECODED = {
    "one axis": ((13,), {"rank": 1, "window": 4, "is_causal": True}),
    "one axis, strided and dilated": ((17,), {"rank": 1, "window": 3, "stride": 2, "dilation": 3, "is_causal": True}),
    "two causal axes": ((6, 5), {"window": (3, 2), "dilation": (1, 2), "is_causal": True, "num_kv_heads": 2}),
    "frames": ((7, 4), {"window": (3, 3), "dilation": (2, 1), "is_causal": (True, False)}),
    "frames of images": ((5, 4, 3), {"rank": 3, "window": (2, 3, 2), "is_causal": (True, False, False)}),
}


@pytest.mark.parametrize("name", DECODED)
def test_step_by_step_equals_the_whole(name):
    space, options = DECODED[name]
    layer = _layer(**options)
    u = jax.random.normal(jax.random.key(1), (2, *space, 16))
    causal = sum(layer.is_causal)
    steps = jnp.moveaxis(u.reshape(2, -1, *space[causal:], 16), 1, 0)
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, steps):
        layer = nnx.merge(graphdef, params)
        step = lambda state, u: layer.step(u, state, space=space)[::-1]  # noqa: E731
        return jax.lax.scan(step, layer.init_state(2, space), steps)

    state, made = run(params, steps)
    np.testing.assert_allclose(jnp.moveaxis(made, 0, 1).reshape(u.shape), layer(u), atol=2e-6)
    assert state.position == len(steps)
    assert state.k.shape[1] == min(space[0], (layer.window[0] - 1) * layer.dilation[0] + 1)


BAD = [
    (lambda: _layer(rank=4), "rank must be 1, 2 or 3; got 4"),
    (lambda: _layer(num_heads=3), "num_heads must divide d; got d=16, num_heads=3"),
    (lambda: _layer(num_kv_heads=3), "num_kv_heads must divide num_heads; got num_heads=4, num_kv_heads=3"),
    (lambda: _layer(window=(3, 3, 3)), "window must be one value or one for each of 2 axes; got (3, 3, 3)"),
    (lambda: _layer()(jnp.zeros([2, 5, 16])), "u must be [b, *space, d] with 2 axes of space and d=16; got [2, 5, 16]"),
    (lambda: _layer().init_state(2, (5, 5)), "step by step needs causal axes, before all others; got is_causal="),
    (lambda: _layer(is_causal=(False, True)).init_state(2, (5, 5)), "got is_causal=(False, True)"),
    (lambda: _layer(is_causal=True).init_state(2, (5,)), "space must have 2 axes, as the layer; got [5]"),
]


@pytest.mark.parametrize(("call", "sentence"), BAD)
def test_refusals(call, sentence):
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)

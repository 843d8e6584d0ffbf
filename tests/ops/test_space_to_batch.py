"""Dilation groups gathered once: the op without a dilation on them is the op with it, for a stack of layers too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn, ops
from portable.parity.numbers import relative

FULL = pytest.mark.full


@pytest.mark.parametrize(
    "space, dilation, window",
    [
        ((8, 9), (4, 3), (2, 3)),
        pytest.param((12,), (3,), 3, marks=FULL),
        pytest.param((4, 6, 2), (2, 3, 1), (2, 1, 2), marks=FULL),
    ],
)
def test_attention_in_groups_is_the_dilated_one(space, dilation, window, seed):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k, v, dout = (jax.random.normal(key, (2, *space, 2, 4)) for key in keys)

    def dilated(q, k, v):
        return ops.neighborhood_attention(
            q, k, v, window=window, dilation=dilation, pad_small=True, implementation="reference"
        )

    def grouped(q, k, v):
        q, k, v = (ops.space_to_batch(x, dilation) for x in (q, k, v))
        y = ops.neighborhood_attention(q, k, v, window=window, pad_small=True)
        return ops.batch_to_space(y, dilation)

    def both(f):
        def run(q, k, v, dout):
            y, pull = jax.vjp(f, q, k, v)
            return y, *pull(dout)

        return jax.jit(run)(q, k, v, dout)

    for got, want in zip(both(grouped), both(dilated), strict=True):
        assert relative(got, want) <= 5e-6


def test_a_group_holds_the_positions_a_dilation_apart(seed):
    x = jax.random.normal(jax.random.key(seed), (2, 6, 10, 3))
    rows = ops.space_to_batch(x, (3, 5))
    for i, j, k in np.ndindex(2, 3, 5):
        np.testing.assert_array_equal(rows[i * 15 + j * 5 + k], x[i, j::3, k::5])
    np.testing.assert_array_equal(ops.batch_to_space(rows, (3, 5)), x)


def test_a_stack_of_layers_gathers_groups_once(seed):
    make = lambda i: nn.NeighborhoodAttention(  # noqa: E731
        16, rank=2, num_heads=2, window=3, dilation=(2, 3), rel_pos_bias=True, rngs=nnx.Rngs(i)
    )
    layers = [make(i) for i in range(2)]
    for i, layer in enumerate(layers):
        layer.rel_pos_bias[...] = jax.random.normal(jax.random.key(i), layer.rel_pos_bias.shape)
    u = jax.random.normal(jax.random.key(seed), (2, 8, 12, 16))
    mask = jax.random.bernoulli(jax.random.key(seed + 1), 0.8, u.shape[:3])
    want, got, seen = u, ops.space_to_batch(u, (2, 3)), ops.space_to_batch(mask, (2, 3))
    for layer in layers:
        want = want + layer(want, key_mask=mask)
        got = got + layer(got, key_mask=seen, in_groups=True)
    assert relative(ops.batch_to_space(got, (2, 3)), want) <= 4e-6  # two layers


@pytest.mark.parametrize(
    "function, shape, dilation, sentence",
    [
        (ops.space_to_batch, (1, 9, 2), (2,), "dilation must divide its axis; got 2 on axis 0 of 9 positions"),
        (ops.space_to_batch, (1, 9), (0,), "dilation must be at least 1 on each of at least one axis; got [0]"),
        (ops.space_to_batch, (1, 9), (3, 3), "x must be [b, *space, ...] with 2 axes of space"),
        (ops.batch_to_space, (9, 4, 2), (2,), "rows must be a multiple of the 2 groups of [2]; got 9"),
    ],
)
def test_what_does_not_fit_is_a_sentence(function, shape, dilation, sentence):
    with pytest.raises(ValueError) as caught:
        function(jnp.zeros(shape), dilation)
    assert sentence in str(caught.value)
    with pytest.raises(TypeError, match="dilation must be integers"):
        function(jnp.zeros(shape), (1.5,))

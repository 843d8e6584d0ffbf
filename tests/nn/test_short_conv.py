"""The gated short convolution, written out in NumPy; padding, packed documents and steps."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable import nn


def definition(layer, u):
    """y [t, d] of one row u [t, d]."""
    b, c, x = (np.asarray(u, np.float64) @ np.asarray(f.kernel[...]) for f in (layer.in_B, layer.in_C, layer.in_x))
    taps = np.asarray(layer.conv.kernel[...], np.float64)
    gated = np.concatenate([np.zeros((len(taps) - 1, u.shape[1])), b * x])
    mixed = sum(taps[i] * gated[i : i + len(u)] for i in range(len(taps)))
    return (c * mixed) @ np.asarray(layer.out.kernel[...])


def test_every_way_to_read_a_row():
    layer = nn.ShortConv(8, taps=4, rngs=nnx.Rngs(0))
    u = np.asarray(jax.random.normal(jax.random.key(0), (2, 9, 8)))
    mask = np.array([[False, False, True, True, True, True, True, False, False], [True] * 9])
    segments = jnp.array([[0] * 4 + [1] * 5, [0] * 9])
    y, masked, packed = layer(u), layer(u, mask=jnp.array(mask)), layer(u, segment_ids=segments)
    for row in range(2):
        np.testing.assert_allclose(y[row], definition(layer, u[row]), atol=1e-5)
        np.testing.assert_allclose(masked[row][mask[row]], definition(layer, u[row][mask[row]]), atol=1e-5)
    np.testing.assert_allclose(packed[0, 4:], definition(layer, u[0, 4:]), atol=1e-5)
    # A ragged piece with a document that ends in it, then a step.
    lengths = jnp.array([5, 8])
    _, state = layer(u, lengths=lengths, segment_ids=segments, state=layer.init_state(2), return_state=True)
    step, _ = layer.step(u[jnp.arange(2), lengths], state)
    np.testing.assert_allclose(step[0], definition(layer, u[0, 4:6])[-1], atol=1e-5)
    np.testing.assert_allclose(step[1], definition(layer, u[1])[-1], atol=1e-5)

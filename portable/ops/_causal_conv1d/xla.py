"""A sum of shifted products. XLA's own depthwise convolution is slow on a CPU, and its filter gradient is dense."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def _same_segment(boundaries, offset: int):
    """Returns [b, t, 1]: whether position t and the one `offset` before it lie in one segment."""
    before = jnp.pad(boundaries, ((0, 0), (offset, 0)))[:, : boundaries.shape[1]]
    return (boundaries == before)[..., None]


def _convolve(u, kernel, bias, boundaries):
    dtype = accumulator(u, kernel)
    taps, t = kernel.shape[0], u.shape[1] - kernel.shape[0] + 1
    kernel = kernel.astype(dtype)
    y = jnp.zeros((), dtype) if bias is None else bias.astype(dtype)
    for j in range(taps):
        term = kernel[j] * u[:, j : j + t].astype(dtype)
        offset = taps - 1 - j
        y = y + (jnp.where(_same_segment(boundaries, offset), term, 0) if boundaries is not None and offset else term)
    return y


def fwd(u, kernel, bias, boundaries, *, activation):
    """See `reference.fwd`."""
    y = _convolve(u, kernel, bias, boundaries)
    return ((y if activation is None else jax.nn.silu(y)).astype(u.dtype),)


def bwd(residuals, cotangents, *, activation):
    """Recomputes the sum before the activation; the filter gradient is a product with a row of ones.

    The barriers keep XLA from fusing the shifts into the reductions, which it would then evaluate tap by tap.
    """
    u, kernel, bias, boundaries = residuals
    dtype = accumulator(u, kernel)
    taps, t = kernel.shape[0], u.shape[1] - kernel.shape[0] + 1
    dy = cotangents[0].astype(dtype)
    if activation is not None:
        y = _convolve(u, kernel, bias, boundaries)
        gate = jax.nn.sigmoid(y)
        dy = dy * gate * (1 + y * (1 - gate))
    u_, dy = jax.lax.optimization_barrier((u, dy))
    b, _, channels = dy.shape
    ones = jnp.ones((1, b * t), dtype)
    du, rows = jnp.zeros(u.shape, dtype), []
    for j in range(taps):
        offset = taps - 1 - j
        dj = dy if boundaries is None or not offset else jnp.where(_same_segment(boundaries, offset), dy, 0)
        du = du + jnp.pad(kernel[j].astype(dtype) * dj, ((0, 0), (j, offset), (0, 0)))
        rows.append(ones @ (u_[:, j : j + t].astype(dtype) * dj).reshape(b * t, channels))
    dbias = None if bias is None else (ones @ dy.reshape(b * t, channels))[0].astype(bias.dtype)
    return du.astype(u.dtype), jnp.concatenate(rows).astype(kernel.dtype), dbias, None


IMPL = Impl(fwd=fwd, bwd=bwd)

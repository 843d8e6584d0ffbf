"""The definition: y[t] = sum over taps of kernel[j] * u[t + j]; exact in the dtype of its arguments."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def fwd(u, kernel, bias, boundaries, *, activation):
    """u [b, k - 1 + t, c] holds the state in front; a tap across a segment boundary reads zero."""
    dtype = accumulator(u, kernel)
    taps, t = kernel.shape[0], u.shape[1] - kernel.shape[0] + 1
    counts = jnp.zeros((u.shape[0], t), jnp.int32) if boundaries is None else boundaries
    seen = jnp.pad(counts, ((0, 0), (taps - 1, 0)))
    windows = jnp.arange(t)[:, None] + jnp.arange(taps)
    inside = seen[:, windows] == seen[:, windows[:, -1:]]
    y = jnp.einsum("btkc,kc->btc", jnp.where(inside[..., None], u.astype(dtype)[:, windows], 0), kernel.astype(dtype))
    y = y if bias is None else y + bias.astype(dtype)
    return ((y if activation is None else jax.nn.silu(y)).astype(u.dtype),)


IMPL = Impl(fwd=fwd)

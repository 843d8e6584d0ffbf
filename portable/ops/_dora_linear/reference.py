"""The definition: every row with its own weight, its own update and its own gain, step by step."""

import jax
import jax.numpy as jnp

from portable.ops._dora_linear.arguments import Arguments, dropped
from portable.selection import Impl


def fwd(*arrays, scale, rate, generator, whole, out_dtype):
    """Returns (y [*tokens, o],) for the arrays of `Arguments`."""
    given = Arguments(*arrays)
    wide = given.wide

    def product(x, w):
        return jnp.einsum("...d,...do->...o", x, w, precision=jax.lax.Precision.HIGHEST)

    x, w, a, b = (z.astype(given.x.dtype).astype(wide) for z in given[:4])
    bias = jnp.zeros(w.shape[-1], wide) if given.bias is None else given.bias.astype(wide)
    gain = jnp.ones(w.shape[-1], wide) if given.gain is None else given.gain
    if given.w_scale is not None:
        w = w * given.w_scale.astype(wide)
    if given.group_sizes is not None:
        rows = jnp.searchsorted(jnp.cumsum(given.group_sizes), jnp.arange(x.shape[0]), side="right")
        real = (rows < w.shape[0])[:, None, None]
        rows = jnp.minimum(rows, w.shape[0] - 1)
        w, a, b = w[rows] * real, a[rows], b[rows] * real
        gain, bias = (z if z.ndim == 1 else z[rows] for z in (gain, bias))
    elif given.ids is not None:
        ids = given.ids.reshape(*given.ids.shape, *[1] * (x.ndim - 1 - given.ids.ndim))
        ids = jnp.broadcast_to(ids, x.shape[:-1])
        own = jnp.maximum(ids, 0)
        a, b = a[own], b[own] * (ids >= 0)[..., None, None]
        gain = gain if gain.ndim == 1 else jnp.where(ids[..., None] >= 0, gain[own], 1)
    low = dropped(x, given, rate, generator)
    y = gain * (product(low if whole else x, w) + scale * product(product(low, a), b))
    if whole:  # what dropout takes from the frozen layer itself comes back without the gain
        y = y + product(x - low, w)
    return ((y + bias).astype(out_dtype),)


IMPL = Impl(fwd=fwd)

"""The definition, in the order of the formula; exact in the dtype of its arguments."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def fwd(x, scale, gate, *, groups, norm_before_gate, eps):
    """Gate, normalise each group by its root mean square, scale; or normalise, scale, gate."""
    dtype = accumulator(x, scale)
    y = x.astype(dtype)
    if gate is not None and not norm_before_gate:
        y = y * jax.nn.silu(gate.astype(dtype))
    grouped = y.reshape(*y.shape[:-1], groups, y.shape[-1] // groups)
    y = (grouped / jnp.sqrt(jnp.mean(grouped**2, -1, keepdims=True) + eps)).reshape(y.shape)
    y = y * scale.astype(dtype)
    if gate is not None and norm_before_gate:
        y = y * jax.nn.silu(gate.astype(dtype))
    return (y.astype(x.dtype),)


IMPL = Impl(fwd=fwd)

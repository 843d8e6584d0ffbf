"""Fused elementwise work around one reduction; the backward keeps the arguments and nothing else."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def _normalise(y, groups: int, eps: float):
    grouped = y.reshape(*y.shape[:-1], groups, y.shape[-1] // groups)
    return (grouped * jax.lax.rsqrt(jnp.mean(grouped * grouped, -1, keepdims=True) + eps)).reshape(y.shape)


def fwd(x, scale, gate, *, groups, norm_before_gate, eps):
    """See `reference.fwd`."""
    dtype = accumulator(x, scale)
    y = x.astype(dtype)
    if gate is None:
        y = _normalise(y, groups, eps) * scale.astype(dtype)
    elif norm_before_gate:
        y = _normalise(y, groups, eps) * scale.astype(dtype) * jax.nn.silu(gate.astype(dtype))
    else:
        y = _normalise(y * jax.nn.silu(gate.astype(dtype)), groups, eps) * scale.astype(dtype)
    return (y.astype(x.dtype),)


def bwd(residuals, cotangents, **options):
    """Recomputes the forward; the barrier keeps XLA from keeping its intermediates alive instead."""
    x, scale, gate = jax.lax.optimization_barrier(residuals)
    _, pull = jax.vjp(lambda *arrays: fwd(*arrays, **options), x, scale, gate)
    return pull(cotangents)


IMPL = Impl(fwd=fwd, bwd=bwd)

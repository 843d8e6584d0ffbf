"""Fused elementwise work around one reduction; the backward keeps the arguments and nothing else."""

import math

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


def bwd(residuals, cotangents, *, groups, norm_before_gate, eps):
    """Recomputes the forward from its arguments and keeps nothing else.

    The barriers keep XLA from holding the forward's intermediates alive instead, and from evaluating the gate anew
    inside each reduction. The scale's gradient is a product with a row of ones: on a CPU far faster than a reduction
    over the leading axes.
    """
    x, scale, gate = jax.lax.optimization_barrier(residuals)
    dtype = accumulator(x, scale)
    wide, dout, gain = x.astype(dtype), cotangents[0].astype(dtype), scale.astype(dtype)
    sigmoid = jax.nn.sigmoid(0.0 if gate is None else gate.astype(dtype))
    silu = 1.0 if gate is None else gate.astype(dtype) * sigmoid
    y = wide if norm_before_gate else wide * silu
    dout_norm = dout * silu if norm_before_gate else dout  # cotangent of (normalised y) * scale
    y, dnorm = jax.lax.optimization_barrier((y, dout_norm * gain))

    blocks = (*x.shape[:-1], groups, x.shape[-1] // groups)
    y_, dnorm_ = y.reshape(blocks), dnorm.reshape(blocks)
    root = jax.lax.rsqrt(jnp.mean(y_ * y_, -1, keepdims=True) + eps)
    slope = root * root * root * jnp.mean(y_ * dnorm_, -1, keepdims=True)
    normal = (y_ * root).reshape(x.shape)
    dy = (dnorm_ * root - y_ * slope).reshape(x.shape)

    rows = math.prod(x.shape[:-1])
    dscale = (jnp.ones((1, rows), dtype) @ (dout_norm * normal).reshape(rows, x.shape[-1]))[0]
    dx, dgate = (dy, None) if norm_before_gate else (dy * silu, None)
    if gate is not None:
        dsilu = dout * normal * gain if norm_before_gate else dy * wide
        dgate = (dsilu * sigmoid * (1 + gate.astype(dtype) * (1 - sigmoid))).astype(gate.dtype)
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dgate


IMPL = Impl(fwd=fwd, bwd=bwd)

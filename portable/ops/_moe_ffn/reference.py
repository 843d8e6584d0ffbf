"""The definition: every expert on every token, each output weighted by what the router gave it, mostly 0."""

import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._moe_ffn.activations import activate
from portable.ops._moe_ffn.arguments import Arguments
from portable.selection import Impl


def fwd(*arrays, activation, capacity):
    """Returns (y [t, d],); the arguments are those of `Arguments`, and the capacity has been kept to."""
    del capacity
    a = Arguments(*arrays)
    wide = accumulator(a.x, a.weights)
    x = a.x.astype(wide)

    def product(x, w, bias, e):
        y = x @ w[e].astype(wide)
        return y if bias is None else y + bias[e].astype(wide)

    y = jnp.zeros(x.shape, wide)
    for e in range(len(a.w_up)):
        gate = None if a.w_gate is None else product(x, a.w_gate, a.b_gate, e)
        out = product(activate(activation, gate, product(x, a.w_up, a.b_up, e)), a.w_down, a.b_down, e)
        mine = a.indices == e
        # A token that is not the expert's may hold what times 0 is NaN.
        weight = jnp.sum(jnp.where(mine, a.weights, 0), axis=1, keepdims=True)
        y = y + jnp.where(mine.any(axis=1, keepdims=True), weight * out, 0)
    return (y.astype(a.x.dtype),)


IMPL = Impl(fwd=fwd)

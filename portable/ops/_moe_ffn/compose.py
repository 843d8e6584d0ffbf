"""The experts' networks as grouped products, whichever way those are computed: what backward passes are made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._moe_ffn import plan as plans
from portable.ops._moe_ffn.activations import activate
from portable.ops._moe_ffn.arguments import Arguments


class Engine(NamedTuple):
    """Attributes:
    matmul: (rows [m, d], w, group_sizes, transposed) -> rows times their experts' matrices, in the rows' dtype.
    outer: (rows [m, d], rows [m, f], group_sizes, dtype, i) -> each expert's sum of products, [e, d, f]; the i-th.
    """

    matmul: Callable
    outer: Callable


def expert_of_rows(plan, experts: int):
    """Returns each row's expert [m], the last one's for rows of no expert."""
    ends = jnp.cumsum(plan.group_sizes)
    return jnp.minimum(jnp.searchsorted(ends, jnp.arange(plan.order.size), side="right"), experts - 1)


def make_plan(a: Arguments):
    return plans.make(a.indices, len(a.w_up))


def finish(a: Arguments, plan, y):
    """Returns the result from the experts' rows y [m, d]."""
    return (plans.combine(y, plan, a.weights, a.indices < len(a.w_up)).astype(a.x.dtype),)


def save(engine: Engine, *arrays, activation, capacity):
    """Returns the result and what `bwd` needs: the products with w_gate (or None) and w_up, in the plan's order."""
    del capacity
    a = Arguments(*arrays)
    plan = make_plan(a)
    rows, x = expert_of_rows(plan, len(a.w_up)), a.x[plan.token]

    def product(x, w, bias):
        if w is None:
            return None
        y = engine.matmul(x, w, plan.group_sizes, False)
        return y if bias is None else y + bias[rows]

    saved = product(x, a.w_gate, a.b_gate), product(x, a.w_up, a.b_up)
    y = product(_hidden(activation, *saved), a.w_down, a.b_down)
    return finish(a, plan, y), saved


def _hidden(activation: str, gate, up):
    wide = jnp.promote_types(up.dtype, jnp.float32)
    gate = None if gate is None else gate.astype(wide)
    return activate(activation, gate, up.astype(wide)).astype(up.dtype)


def bwd(engine: Engine, residuals, cotangents, *, activation, capacity):
    """Returns the cotangents of `Arguments`; residuals are those arguments and what `save` kept."""
    del capacity
    *arrays, saved = residuals
    a, (dout,) = Arguments(*arrays), cotangents
    plan, experts = make_plan(a), len(a.w_up)
    weights = a.weights.reshape(-1)[plan.order]
    wide, dtype = weights.dtype, a.x.dtype
    real = (jnp.arange(plan.order.size) < plan.group_sizes.sum())[:, None]
    dy = jnp.where(real, dout[plan.token].astype(wide), 0)
    # The slope of the weights is <dy, h w_down>, and <dy w_down^T, h> needs no second product with w_down.
    dh = engine.matmul(dy.astype(dtype), a.w_down, plan.group_sizes, True).astype(wide)
    hidden, pull = jax.vjp(lambda *s: _hidden(activation, *s), *saved)
    dweights = jnp.sum(jnp.where(real, dh * hidden, 0), axis=1)
    if a.b_down is not None:
        dweights = dweights + jnp.sum(dy * a.b_down[expert_of_rows(plan, experts)], axis=1)
    dy = (dy * weights[:, None]).astype(dtype)
    dgate, dup = pull((dh * weights[:, None]).astype(dtype))
    return finish_bwd(engine, a, plan, hidden, dgate, dup, dy, dweights, None)


def finish_bwd(engine: Engine, a: Arguments, plan, hidden, dgate, dup, dy, dweights, dx) -> Any:
    """Returns the cotangents of `Arguments` from those of rows; dx [m, d] of x's rows is computed where None."""
    real = (jnp.arange(plan.order.size) < plan.group_sizes.sum())[:, None]
    x, own = a.x[plan.token], plan.group_sizes
    given = [(s, w) for s, w in ((dgate, a.w_gate), (dup, a.w_up)) if w is not None]
    if dx is None:
        dx = sum(engine.matmul(slope, w, own, True).astype(a.weights.dtype) for slope, w in given)

    def outer(rows, slope, w, i):
        if w is None:
            return None
        dw = engine.outer(rows, slope, own, w[0].dtype, i)
        return tuple(dw) if isinstance(w, tuple) else dw

    def of_bias(slope, bias):
        if bias is None:
            return None
        rows = jnp.where(real, slope, 0).astype(a.weights.dtype)
        return jax.ops.segment_sum(rows, expert_of_rows(plan, len(a.w_up)), len(a.w_up)).astype(bias.dtype)

    everything = jnp.ones(a.indices.shape, a.weights.dtype)
    return (
        plans.combine(dx, plan, everything, a.indices < len(a.w_up)).astype(a.x.dtype),
        outer(x, dgate, a.w_gate, 0),
        outer(x, dup, a.w_up, 1),
        outer(hidden, dy, a.w_down, 2),
        None,
        jnp.where(a.indices < len(a.w_up), dweights[plan.rank], 0),
        of_bias(dgate, a.b_gate),
        of_bias(dup, a.b_up),
        of_bias(dy, a.b_down),
    )

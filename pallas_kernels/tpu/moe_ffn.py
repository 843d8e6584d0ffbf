"""`moe_ffn` on a TPU: the products with gate and up and the activation in one kernel, that with down in another.

Rows are gathered into blocks, stay there between the kernels, and are taken from them by the sum over choices.
"""

import functools

import jax.numpy as jnp

from portable.ops._grouped_matmul import blocks as layout
from portable.ops._moe_ffn import compose
from portable.ops._moe_ffn.arguments import Arguments
from portable.pallas_kernels.tpu import _grouped
from portable.selection import Impl


def why_not(*arrays, activation, capacity) -> str | None:
    """Says in a sentence why the kernels cannot take a call."""
    del activation, capacity
    a = Arguments(*arrays)
    if isinstance(a.w_up, tuple):
        return (
            f"w_gate, w_up and w_down must be stacked arrays, [e, d, f] and [e, f, d]; got {len(a.w_up)} arrays each."
        )
    e, d, f = a.w_up.shape
    products = 1 if a.w_gate is None else 2
    rows, dtype, of_rows = a.indices.size, a.x.dtype, _rows(a)
    hidden = _grouped.refuses(rows, e, d, f, dtype, of_rows=of_rows, products=products)
    return hidden or _grouped.refuses(rows, e, f, d, dtype, of_rows=of_rows)


def _rows(a: Arguments) -> int:
    e, *shape = a.w_up.shape
    return _grouped.block_rows(a.indices.size, e, max(shape), a.x.dtype)


def _run(keep: bool, *arrays, activation, capacity):
    """Returns the result, and the products with w_gate and w_up where `keep` is set."""
    del capacity
    a = Arguments(*arrays)
    plan, rows = compose.make_plan(a), a.indices.size
    blocks = layout.make(plan.group_sizes, rows, _rows(a))
    gate = None if a.w_gate is None else (a.w_gate, a.b_gate)
    x = a.x[plan.token[blocks.rows]]
    h, *kept = _grouped.products(x, blocks, gate, (a.w_up, a.b_up), activation=activation, keep=keep)
    (y,) = _grouped.products(h, blocks, None, (a.w_down, a.b_down))
    out = compose.finish(a, plan._replace(rank=blocks.place[plan.rank]), y)
    real = (jnp.arange(rows) < plan.group_sizes.sum())[:, None]
    kept = [jnp.where(real, k[blocks.place], 0) for k in kept]
    return out, (kept[0] if len(kept) == 2 else None, kept[-1] if kept else None)


def fwd(*arrays, **options):
    """See `portable.ops._moe_ffn.reference.fwd`."""
    return _run(False, *arrays, **options)[0]


save = functools.partial(_run, True)

IMPL = Impl(
    fwd=fwd,
    save=save,
    why_not=why_not,
    interpret=functools.partial(_grouped.interpreted, {"fwd": fwd, "save": save}),
)

"""`grouped_matmul` on a TPU; see `_grouped`."""

import functools

import jax.numpy as jnp

from portable.ops._grouped_matmul import blocks as layout
from portable.pallas_kernels.tpu import _grouped
from portable.selection import Impl


def why_not(x, w, group_sizes) -> str | None:
    """Says in a sentence why the kernel cannot take a call."""
    if isinstance(w, tuple):
        return f"w must be one stacked array, [e, d, f]; got {len(w)} arrays."
    groups, inner, width = w.shape
    del group_sizes
    return _grouped.refuses(x.shape[0], groups, inner, width, x.dtype, of_rows=_rows(x, w))


def _rows(x, w) -> int:
    return _grouped.block_rows(x.shape[0], w.shape[0], x.shape[1], x.dtype)


def fwd(x, w, group_sizes):
    """See `portable.ops._grouped_matmul.reference.fwd`."""
    rows = x.shape[0]
    blocks = layout.make(group_sizes, rows, _rows(x, w))
    (y,) = _grouped.products(x[blocks.rows], blocks, None, (w, None))
    return (jnp.where((jnp.arange(rows) < group_sizes.sum())[:, None], y[blocks.place], 0),)


IMPL = Impl(fwd=fwd, why_not=why_not, interpret=functools.partial(_grouped.interpreted, {"fwd": fwd}))

"""The definition: the updated weight, squared, summed and rooted."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def fwd(w, a, b, squares, *, scale, shards, out_dtype):
    """Returns (norms [*e, o],) for w [*e, d, o], a [*e, d, r], b [*e, r, o]; squares stand for those of w."""
    del shards
    wide = accumulator(w, a, b)
    a, b = a.astype(w.dtype).astype(wide), b.astype(w.dtype).astype(wide)
    w = w.astype(wide)
    updated = w + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(updated * updated, axis=-2)
    if squares is not None:
        square = square - jnp.sum(w * w, axis=-2) + squares
    return (root(square).astype(out_dtype),)


def root(square):
    """Returns the square root of what is positive, and 0, with slope 0, of the rest; NaN of NaN."""
    positive = ~(square <= 0)
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


IMPL = Impl(fwd=fwd)

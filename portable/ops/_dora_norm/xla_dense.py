"""The definition as one product and one reduction: XLA:TPU fuses them, and the updated weight is never in memory."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._dora_norm.reference import root
from portable.selection import Impl


def why_not(w, a, b, squares, *, scale, shards, out_dtype) -> str | None:
    """Returns the sentence that says why the expansion is the better form."""
    del w, a, b, scale, shards, out_dtype
    return None if squares is None else "it has no use for squares, with which xla_factored reads the weight once."


def fwd(w, a, b, squares, *, scale, shards, out_dtype):
    """See `reference.fwd`."""
    del squares, shards
    wide = accumulator(w, a, b)
    a, b = a.astype(w.dtype), b.astype(w.dtype)
    update = jnp.matmul(a, b, preferred_element_type=wide, precision=full(w.dtype))
    updated = w.astype(wide) + scale * update
    return (root(jnp.sum(updated * updated, axis=-2)).astype(out_dtype),)


def full(dtype):
    """Returns the precision at which products of this dtype are exact in float32, as far as they can be."""
    return jax.lax.Precision.HIGHEST if dtype in (jnp.float32, jnp.float64) else None


IMPL = Impl(fwd=fwd, why_not=why_not)

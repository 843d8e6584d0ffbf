"""The expansion of the square: products with r columns, and no second weight."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._dora_norm.reference import root
from portable.ops._dora_norm.xla_dense import full
from portable.selection import Impl


def fwd(w, a, b, squares, *, scale, shards, out_dtype):
    """See `reference.fwd`."""
    wide = accumulator(w, a, b)
    a, b = a.astype(w.dtype), b.astype(w.dtype)
    if shards > 1:  # the parts of d that lie together: only the last sum below crosses devices
        w, a = (x.reshape(*x.shape[:-2], shards, x.shape[-2] // shards, x.shape[-1]) for x in (w, a))
        b = b[..., None, :, :]
    # Products of bfloat16 are exact in float32: a wider copy of the weight would add nothing.
    options = {"preferred_element_type": wide, "precision": full(w.dtype)}
    met = jnp.einsum("...dr,...do->...ro", a, w, **options)
    gram = jnp.einsum("...dr,...ds->...rs", a, a, **options)
    b = b.astype(wide)
    quadratic = jnp.matmul(gram, b, precision=jax.lax.Precision.HIGHEST)
    square = jnp.sum(b * (2 * scale * met + scale**2 * quadratic), axis=-2)
    if squares is None:
        square = square + jnp.sum(jnp.square(w.astype(wide)), axis=-2)
    if shards > 1:
        square = jnp.sum(square, axis=-2)
    return (root(square if squares is None else squares + square).astype(out_dtype),)


IMPL = Impl(fwd=fwd)

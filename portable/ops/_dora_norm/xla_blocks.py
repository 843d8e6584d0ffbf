"""The definition over blocks of rows: one product a block, and no more of the updated weight in memory than that."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._dora_norm.reference import root
from portable.ops._dora_norm.xla_dense import full
from portable.selection import Impl

# Bytes of the updated weight at a time: whole, a large weight is fresh memory, which a processor waits for.
BLOCK = 16 * 2**20
# Columns of a from which the expansion's products cost more than one product and a pass over it (4096 x 4096, 2 cores).
RANK = 64


def why_not(w, a, b, squares, *, scale, shards, out_dtype) -> str | None:
    """Returns the sentence that says why another form is the better one."""
    del b, squares, scale, out_dtype
    if shards > 1:
        return "it walks over the rows of a weight that lies on one device; xla_factored sums parts apart."
    if a.shape[-1] < RANK:
        return f"below a rank of {RANK} xla_factored is faster; got {a.shape[-1]}."
    if w.ndim > 2:
        return "it takes one weight at a time; xla_factored multiplies a stack of them together."
    return None


def fwd(w, a, b, squares, *, scale, shards, out_dtype):
    """See `reference.fwd`."""
    del shards
    wide = accumulator(w, a, b)
    a, b = a.astype(w.dtype), b.astype(w.dtype)
    rows, columns = w.shape
    count = max(1, min(rows, BLOCK // (columns * wide.itemsize)))
    blocks = rows // count

    def body(total, rows):
        w, a = rows
        update = jnp.matmul(a, b, preferred_element_type=wide, precision=full(w.dtype))
        w, update = w.astype(wide), scale * update
        # Where squares are known, what they are slopes of is not w here.
        square = jnp.square(w + update) if squares is None else update * (2 * w + update)
        return total + jnp.sum(square, axis=0), None

    # What is left over goes first, alone.
    left = rows - blocks * count
    start, _ = body(jnp.zeros(columns, wide), (w[:left], a[:left]))
    parts = tuple(x[left:].reshape(blocks, count, x.shape[-1]) for x in (w, a))
    total, _ = jax.lax.scan(body, start, parts)
    return (root(total if squares is None else squares + total).astype(out_dtype),)


IMPL = Impl(fwd=fwd, why_not=why_not)

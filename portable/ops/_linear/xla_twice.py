"""One bfloat16 row times a matrix by the units for matrices, which XLA does not use for a single row of its own accord.

XLA:CPU takes a single row element by element, at a tenth of the speed; a TPU's compiler takes it on the vector units,
which do not keep up with the memory. Two rows are a matrix product; the second is dropped. Under `vmap` every row is
one of its own, and each is taken twice.
"""

import math

import jax
import jax.numpy as jnp

from portable.selection import Impl


def why_not(x, kernel, *, transposed, out_dtype) -> str | None:
    """Returns the sentence that says why XLA's own product is the better one."""
    del kernel, transposed, out_dtype
    rows = math.prod(x.shape[:-1])
    if rows != 1:
        return f"it is for one row; got {rows}."
    if x.dtype != jnp.bfloat16:
        return f"it is for bfloat16, which both units round alike; got {x.dtype}."
    return None


def fwd(x, kernel, *, transposed, out_dtype):
    """See `reference.fwd`."""
    rows = jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1]))
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    y = jax.lax.dot_general(rows, kernel, dims, preferred_element_type=jnp.float32)[0]
    return (y.reshape(*x.shape[:-1], -1).astype(out_dtype),)


IMPL = Impl(fwd=fwd, why_not=why_not)

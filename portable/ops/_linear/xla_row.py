"""One row times a matrix on a CPU, in the shape of product that XLA:CPU reads at the memory's speed."""

import functools
import math

import jax.numpy as jnp

from portable.ops._linear import xla_twice
from portable.selection import Impl

# XLA:CPU runs a product of one float32 row on one core; cut into this many products, their sum uses all.
_PARTS = 4
# Elements of a kernel from which the cut pays for the sum.
_LARGE = 2**18


def why_not(x, kernel, *, transposed, out_dtype) -> str | None:
    """Returns the sentence that says why XLA's own product is the better one."""
    del out_dtype
    rows = math.prod(x.shape[:-1])
    if rows != 1:
        return f"it is for one row; got {rows}."
    if x.dtype == jnp.bfloat16:
        return None
    if x.dtype not in (jnp.float32, jnp.float64):
        return f"it knows bfloat16, float32 and float64; got {x.dtype}."
    if transposed:
        return f"XLA:CPU already reads a transposed {x.dtype} kernel at the memory's speed."
    if kernel.size < _LARGE or x.shape[-1] % _PARTS:
        return f"it cuts d into {_PARTS} from {_LARGE} elements on; got a kernel {list(kernel.shape)}."
    return None


def fwd(x, kernel, *, transposed, out_dtype):
    """See `reference.fwd`."""
    if x.dtype == jnp.bfloat16:
        return xla_twice.fwd(x, kernel, transposed=transposed, out_dtype=out_dtype)
    parts = kernel.reshape(_PARTS, x.shape[-1] // _PARTS, -1)
    # Added one by one: the sum then joins what comes next, where a reduction would be a program of its own.
    first, *others = jnp.einsum("sk,sko->so", x.reshape(_PARTS, -1), parts)
    y = functools.reduce(jnp.add, others, first)
    return (y.reshape(*x.shape[:-1], -1).astype(out_dtype),)


IMPL = Impl(fwd=fwd, why_not=why_not)

"""The definition: a sum of products, in the accumulator's dtype and at full precision on every platform."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def fwd(x, kernel, *, transposed, out_dtype):
    """y[o] = sum of x[d] * kernel[d, o] over d."""
    wide = accumulator(x)
    kernel = kernel.T if transposed else kernel
    return (jnp.matmul(x.astype(wide), kernel.astype(wide), precision=jax.lax.Precision.HIGHEST).astype(out_dtype),)


IMPL = Impl(fwd=fwd)

"""`jax.lax.ragged_dot`: a grouped kernel of XLA's on a TPU, a masked product with every group's matrix elsewhere."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def matmul(x, w, group_sizes):
    """Returns x's rows times their groups' matrices, in the accumulator's dtype; rows behind the last group are 0."""
    w = jnp.stack(w) if isinstance(w, tuple) else w
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=accumulator(x))
    # A kernel may leave rows of no group unwritten.
    return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], y, 0)


def fwd(x, w, group_sizes):
    """See `reference.fwd`."""
    return (matmul(x, w, group_sizes).astype(x.dtype),)


def bwd(residuals, cotangents):
    """Returns the cotangents of x and w; residuals are the arguments of `fwd`."""
    x, w, group_sizes = residuals
    (dy,) = cotangents
    dx, dw = jax.vjp(lambda x, w: fwd(x, w, group_sizes)[0], x, w)[1](dy)
    return dx, dw, None


IMPL = Impl(fwd=fwd, bwd=bwd)

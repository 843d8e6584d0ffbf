"""`jax.lax.ragged_dot`: a grouped kernel of XLA's on a TPU, a masked product with every group's matrix elsewhere."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl

# Sums over the rows of each group.
_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)


def matmul(x, w, group_sizes):
    """Returns x's rows times their groups' matrices, in the accumulator's dtype; rows behind the last group are 0."""
    w = (jnp.stack(w) if isinstance(w, tuple) else w).astype(x.dtype)
    y = jax.lax.ragged_dot(x, w, group_sizes, preferred_element_type=accumulator(x))
    # A kernel may leave rows of no group unwritten.
    return jnp.where((jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], y, 0)


def fwd(x, w, group_sizes):
    """See `reference.fwd`."""
    return (matmul(x, w, group_sizes).astype(x.dtype),)


def outer(x, dy, group_sizes):
    """Returns each group's x.T @ dy [e, d, f] in the accumulator's dtype."""
    return jax.lax.ragged_dot_general(x, dy, group_sizes, _OUTER, preferred_element_type=accumulator(x, dy))


def bwd(residuals, cotangents):
    """Returns the cotangents of x and w; residuals are the arguments of `fwd`."""
    # Not by JAX, which would multiply the sums' cotangents in their own dtype, float32.
    x, w, group_sizes = residuals
    (dy,) = cotangents
    turned = jnp.swapaxes(jnp.stack(w) if isinstance(w, tuple) else w, 1, 2)
    dx = matmul(dy, turned, group_sizes).astype(x.dtype)
    real = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    dw = outer(jnp.where(real, x, 0), jnp.where(real, dy, 0), group_sizes).astype(w[0].dtype)
    return dx, tuple(dw) if isinstance(w, tuple) else dw, None


IMPL = Impl(fwd=fwd, bwd=bwd)

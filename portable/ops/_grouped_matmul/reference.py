"""The definition: every group's product with every row, of which each row keeps its own."""

import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.selection import Impl


def fwd(x, w, group_sizes):
    """Returns (y [m, f],) for x [m, d], w [e, d, f] or e arrays [d, f], group_sizes [e]."""
    ends = jnp.cumsum(group_sizes)
    rows = jnp.arange(x.shape[0])[:, None]
    wide = accumulator(x)
    y = jnp.zeros((x.shape[0], w[0].shape[1]), wide)
    for e in range(len(w)):
        own = (rows >= ends[e] - group_sizes[e]) & (rows < ends[e])
        y = jnp.where(own, x.astype(wide) @ w[e].astype(wide), y)
    return (y.astype(x.dtype),)


IMPL = Impl(fwd=fwd)

"""Attention over blocks selected at run time by the Triton core, as the interpreter's process can import it."""

import jax.numpy as jnp

from portable.pallas_kernels import block_lists
from portable.pallas_kernels.gpu import _block_attention as core
from portable.selection import Impl


def fwd(table, q, k, v, dout, intervals, places, *, scale):
    """Returns result, log-sum-exp, dq, dk and dv."""
    lists, back = block_lists.selected(table), block_lists.selected(table, by_keys=places.shape[1])
    out, highest, total = core.attend(q, k, v, intervals, places, lists, scale=scale)
    alive = total > 0
    mean = jnp.where(alive, (out * dout).sum(-1), 0)
    sums = jnp.where(alive, highest, 0), jnp.where(alive, 1 / jnp.where(alive, total, 1), 0), mean
    dq = core.query_gradients(q, k, v, dout, *sums, intervals, places, lists, scale=scale)
    dk, dv = core.key_gradients(q, k, v, dout, *sums, intervals, places, back, scale=scale)
    return out, highest + jnp.log(total), dq, dk, dv


IMPL = Impl(fwd=fwd)

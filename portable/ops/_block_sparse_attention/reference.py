"""The definition: all pairs of positions under a mask; exact in the dtype of its arguments."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._block_sparse_attention.arguments import Arrays
from portable.selection import Impl


def fwd(*arrays, block_q, block_k, is_causal, scale):
    """Scores of all pairs, those that are not seen at -inf, and a softmax over all keys."""
    a = Arrays(*arrays)
    dtype = accumulator(a.q, a.k, a.v)
    (b, t, h, width), (s, g) = a.q.shape, a.k.shape[1:3]
    blocks = jnp.arange(-(-s // block_k))
    selected = (a.block_indices[..., None] == blocks).any(-2)  # [b, lists, nq, nk]
    allowed = jnp.repeat(selected, block_q, axis=2)[:, :, :t]
    allowed = jnp.repeat(allowed, block_k, axis=3)[..., :s]
    allowed = jnp.repeat(allowed, h // allowed.shape[1], axis=1)
    if is_causal:
        queries = jnp.arange(t)[None] if a.q_positions is None else a.q_positions
        keys = jnp.arange(s)[None] if a.kv_positions is None else a.kv_positions
        allowed &= (keys[:, None, :] <= queries[:, :, None])[:, None]
    if a.q_segments is not None:
        allowed &= (a.q_segments[:, :, None] == a.kv_segments[:, None, :])[:, None]
    q = a.q.reshape(b, t, g, h // g, width).astype(dtype)
    scores = jnp.einsum("btgrk,bsgk->bgrts", q, a.k.astype(dtype)) * scale
    allowed = allowed.reshape(b, g, h // g, t, s)
    top = jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - top, 0)), 0)
    total = weights.sum(-1, keepdims=True)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum("bgrts,bsgv->btgrv", weights / total, a.v.astype(dtype))
    return out.reshape(b, t, h, a.v.shape[-1]).astype(a.q.dtype), lse.reshape(b, h, t)


IMPL = Impl(fwd=fwd)

"""The definition: every score at once; exact in the dtype of its arguments."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator, vary_together
from portable.ops._attention.arguments import Arrays, Rules
from portable.selection import Impl


def _allowed(a: Arrays, rules: Rules, rows, heads, queries, keys):
    """Returns which query sees which key, [b, g, r, t, s]."""
    allowed = jnp.ones((*rows.shape, *heads.shape, queries.shape[-1], keys.shape[-1]), bool)
    apart = keys[:, None, None, None, :] - queries[:, None, None, :, None]
    if rules.left is not None:
        allowed &= apart >= -rules.left
    if rules.right is not None:
        allowed &= apart <= rules.right
    if a.key_mask is not None:
        allowed &= a.key_mask[:, None, None, None, :]
    if a.q_segments is not None:
        allowed &= a.q_segments[:, None, None, :, None] == a.kv_segments[:, None, None, None, :]
    if rules.mask_mod is not None:
        allowed &= rules.mask_mod.on_block(a.mask_arrays, None, rows, heads, queries, keys)
    return allowed


def fwd(*arrays, **options):
    """Scale, score_mod, soft_cap, mask; a softmax over the keys and the sink; the weighted mean of the values."""
    a, rules = Arrays(*arrays), Rules(**options)
    wide = accumulator(a.q, a.k, a.v, a.sinks)
    b, t, h, width = a.q.shape
    s, g = a.k.shape[1:3]
    q, k, v = (x.astype(wide) for x in (a.q.reshape(b, t, g, h // g, width), a.k, a.v))
    count = lambda n: jnp.arange(n, dtype=jnp.int32)  # noqa: E731
    rows, heads = count(b), count(h).reshape(g, h // g)
    queries = jnp.broadcast_to(count(t), (b, t)) if a.q_positions is None else a.q_positions
    keys = jnp.broadcast_to(count(s), (b, s)) if a.kv_positions is None else a.kv_positions
    _, rows, heads, queries, keys = vary_together(q, rows, heads, queries, keys)

    scores = jnp.einsum("btgrk,bsgk->bgrts", q, k) * rules.scale
    if rules.score_mod is not None:
        scores = rules.score_mod.on_block(a.score_arrays, scores, rows, heads, queries, keys).astype(wide)
    if rules.soft_cap is not None:
        scores = rules.soft_cap * jnp.tanh(scores / rules.soft_cap)
    # A score of -inf is a mask too. Every `where` keeps what it leaves out finite, for the sake of its derivative.
    allowed = _allowed(a, rules, rows, heads, queries, keys) & (scores != -jnp.inf)
    top = jnp.max(jnp.where(allowed, scores, -jnp.inf), axis=-1, initial=-jnp.inf)
    if a.sinks is not None:
        sinks = jnp.broadcast_to(a.sinks.astype(wide).reshape(g, h // g, 1), top.shape)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores, 0) - jnp.where(allowed, top[..., None], 0)), 0)
    total = weights.sum(-1)
    if a.sinks is not None:
        total = total + jnp.exp(sinks - top)
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, jnp.log(total) + top, -jnp.inf)
    out = jnp.einsum("bgrts,bsgv->btgrv", weights / total[..., None], v)
    return out.reshape(b, t, h, v.shape[-1]).astype(a.q.dtype), lse.reshape(b, h, t)


IMPL = Impl(fwd=fwd)

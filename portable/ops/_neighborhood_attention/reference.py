"""The definition: all pairs of positions, masked; exact in the dtype of its arguments."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from portable.ops._arguments import accumulator
from portable.selection import Impl


def interval(i: int, length: int, window: int, stride: int, dilation: int, causal: bool) -> range:
    """Returns the positions that position i sees on one axis."""
    group, p = i % dilation, i // dilation
    n = len(range(group, length, dilation))
    if causal:
        leader = min(p // stride * stride + stride - 1, n - 1)
        first, end = max(leader - window + 1, 0), p + 1
    else:
        leader = min(p // stride * stride + stride // 2, n - 1)
        first = min(max(leader - window // 2, 0), max(n - window, 0))
        end = min(first + window, n)
    return range(first * dilation + group, end * dilation + group, dilation)


@functools.lru_cache(maxsize=256)
def seen(length: int, window: int, stride: int, dilation: int, causal: bool) -> np.ndarray:
    """Returns which position (column) each position (row) of an axis sees."""
    table = np.zeros((length, length), bool)
    for i in range(length):
        table[i, list(interval(i, length, window, stride, dilation, causal))] = True
    return table


def fwd(q, k, v, rel_pos_bias, extra_k, extra_v, key_mask, *, window, stride, dilation, is_causal, scale):
    """Scores of all pairs, those that are not seen at -inf, and a softmax over all keys."""
    dtype = accumulator(q, k, v, rel_pos_bias)
    (b, *space, h, width), g = q.shape, k.shape[-2]
    n = math.prod(space)
    mask = np.ones((1, 1), bool)
    for axis in zip(space, window, stride, dilation, is_causal, strict=True):
        mask = np.kron(mask, seen(*axis))
    flat = lambda x: jnp.repeat(x.reshape(b, math.prod(x.shape[1:-2]), g, x.shape[-1]).astype(dtype), h // g, axis=2)  # noqa: E731
    scores = jnp.einsum("bqhk,bshk->bhqs", q.reshape(b, n, h, width).astype(dtype), flat(k)) * scale
    if rel_pos_bias is not None:
        positions = np.indices(space).reshape(len(space), n)
        index = []
        for p, w, d in zip(positions, window, dilation, strict=True):
            offset = p[None, :] // d - p[:, None] // d + w - 1
            index.append(np.clip(offset, 0, 2 * w - 2))  # what lies outside is not seen
        scores = scores + rel_pos_bias.astype(dtype)[(slice(None), *index)]
    allowed = jnp.broadcast_to(jnp.asarray(mask), (b, 1, n, n))
    if key_mask is not None:
        allowed = allowed & key_mask.reshape(b, 1, 1, n)
    values = flat(v)
    if extra_k is not None:
        more = jnp.einsum("bqhk,bshk->bhqs", q.reshape(b, n, h, width).astype(dtype), flat(extra_k)) * scale
        scores, values = jnp.concatenate([scores, more], -1), jnp.concatenate([values, flat(extra_v)], 1)
        allowed = jnp.concatenate([allowed, jnp.ones((b, 1, n, extra_k.shape[1]), bool)], -1)
    sees = allowed.any(-1, keepdims=True)
    highest = jnp.where(sees, jnp.max(jnp.where(allowed, scores, -jnp.inf), -1, keepdims=True), 0)
    highest = jax.lax.stop_gradient(highest)  # it cancels
    weights = jnp.where(allowed, jnp.exp(jnp.where(allowed, scores - highest, 0)), 0)
    total = jnp.where(sees, weights.sum(-1, keepdims=True), 1)
    out = jnp.einsum("bhqs,bshv->bqhv", weights / total, values)
    lse = jnp.where(sees, highest + jnp.log(total), -jnp.inf)[..., 0]
    return out.reshape(b, *space, h, v.shape[-1]).astype(q.dtype), jnp.moveaxis(lse, 1, -1).reshape(b, *space, h)


IMPL = Impl(fwd=fwd)

"""Selection through chunks of changing length (DHSA), and in the order of importance until little is added (S2O)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_float, check_groups, check_integer, check_shape
from portable.ops._sparse_selection.common import best, block_means, held, in_chunks, whole


def select_dhsa(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    chunk_ids: Int[Array, "b t"],
    *,
    chunks: int,
    top_k: int,
) -> Int[Array, "b h t n"]:
    """Chooses tokens by the scores of the chunks that they stand in, which may be of any length.

        Q[c] = sqrt(|c|) * mean(q of chunk c),  K[c] likewise;  s[i, j] = Q[chunk(i)] . K[chunk(j)]

    A query's own token (our choice) and those before it with the highest s, the earlier of a chunk first. Chunks of one
    token each give the top_k highest q . k. The paper's boundaries come from a small network on the keys; here they are
    given. For `block_sparse_attention` with block_q=1, block_k=1 and is_causal=True.

    Args:
      q: [b, t, h, d] queries.
      k: [b, t, g, d] keys of the same tokens, h % g == 0.
      chunk_ids: [b, t] integers from 0 to chunks - 1, the chunk of each token.
      chunks: how many there may be; some may be empty.
      top_k: tokens of a query; all if it is more than there are.

    Returns:
      [b, h, t, min(top_k, t)] int32, -1 where fewer tokens are visible.

    Raises:
      ValueError: shapes do not fit, a size is below 1, or a concrete chunk is out of range.
      TypeError: an array is of another kind, or a size no integer.

    Source: Xiong et al. 2025, Dynamic Hierarchical Sparse Attention (arXiv 2510.24606), section 3.
    """
    op, sizes = "select_dhsa", {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b t g d", sizes)
    check_shape(op, "chunk_ids", chunk_ids, "b t", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k must be [b, t, g, d]")
    check_float(op, q=q, k=k)
    check_integer(op, chunk_ids=chunk_ids)
    chunks, top_k = whole(op, "chunks", chunks), whole(op, "top_k", top_k)
    message = f"{op}: chunk_ids must lie from 0 to chunks - 1 = {chunks - 1}; got others."
    check_values(lambda c: (c >= 0) & (c < chunks), message, chunk_ids)
    (b, t, h, d), g, wide = q.shape, sizes["g"], accumulator(q, k)
    of = jnp.clip(chunk_ids, 0, chunks - 1).astype(jnp.int32)
    rows = jnp.arange(b)[:, None]
    count = jnp.zeros((b, chunks), wide).at[rows, of].add(1)[..., None, None]

    def pooled(x):
        total = jnp.zeros((b, chunks, *x.shape[2:]), wide).at[rows, of].add(x.astype(wide))
        return total / jnp.sqrt(jnp.maximum(count, 1))

    q, k = (pooled(x) for x in held(q, k))
    scores = jnp.einsum("bcgrd,bngd->bcgrn", q.reshape(b, chunks, g, h // g, d), k).reshape(b, chunks, h, chunks)
    token = jnp.arange(t, dtype=jnp.int32)

    def choose(of_query, at):
        chunk = scores[rows, of_query]  # [b, t, h, chunks]
        each = jnp.take_along_axis(chunk, jnp.broadcast_to(of[:, None, None], (b, 1, 1, t)), -1)
        own, hidden = token == at[..., None], token > at[..., None]
        return best(each, top_k, hidden=hidden[:, :, None], forced=own[:, :, None])

    at = jnp.broadcast_to(token, (b, t))
    return jnp.swapaxes(in_chunks(choose, b * h * (t + chunks), of, at), 1, 2)


def select_s2o(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b t g d"],
    *,
    block_q: int = 128,
    block_k: int = 128,
    tau: float = 0.01,
    budget: int | None = None,
    scale: float | None = None,
) -> Int[Array, "b h nq n"]:
    """Chooses blocks in the order of their importance until the next would add little to those before.

        p[I, J] = softmax over the visible blocks J of mean(q[block I]) . mean(k[block J]) * scale

    Blocks that hold keys of I's own tokens come first, the others by falling p; the first of them with
    p[J] < tau * (sum of p before it) and all behind it are left out. tau = 0 leaves out none. (The paper stops by what
    a block really added to the running sum, inside its kernel; that p stands for it is our choice, so that a list can
    be made before.)
    For `block_sparse_attention` with the same blocks and is_causal=True.

    Args:
      q: [b, t, h, d] queries.
      k: [b, t, g, d] keys of the same tokens, h % g == 0.
      block_q, block_k: of queries and of keys.
      tau: not negative.
      budget: blocks of a list at most; None for as many as there are.
      scale: of the scores; None for d**-0.5.

    Returns:
      [b, h, nq, min(budget, blocks)] int32 in that order, -1 behind the last.

    Raises:
      ValueError: shapes do not fit, a size is below 1, or tau is negative.
      TypeError: q or k is not floating point, or a size is no integer.

    Source: S2O, "Early Stopping for Sparse Attention via Online Permutation" (2026), from its abstract.
    """
    op, sizes = "select_s2o", {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b t g d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "k must be [b, t, g, d]")
    check_float(op, q=q, k=k)
    block_q, block_k = whole(op, "block_q", block_q), whole(op, "block_k", block_k)
    if not tau >= 0:
        raise ValueError(f"{op}: tau must not be negative; got {tau}.")
    (b, t, h, d), g = q.shape, sizes["g"]
    blocks = -(-t // block_k)
    count = blocks if budget is None else min(blocks, whole(op, "budget", budget))
    q, k = held(q, k)
    pooled, means = block_means(q, block_q), block_means(k, block_k)
    nq = pooled.shape[1]
    x = jnp.einsum("bngrd,bmgd->bgrnm", pooled.reshape(b, nq, g, h // g, d), means.astype(pooled.dtype))
    x = x.reshape(b, h, nq, blocks) * (max(1, d) ** -0.5 if scale is None else scale)
    first = jnp.arange(nq)[:, None] * block_q
    last, number = jnp.minimum(first + block_q, t) - 1, jnp.arange(blocks)
    hidden = number > last // block_k
    own = (number >= first // block_k) & ~hidden
    x = jnp.where(hidden, -jnp.inf, x)
    p = jnp.exp(x - x.max(-1, keepdims=True, initial=jnp.finfo(x.dtype).min))
    order = best(p, blocks, hidden=hidden, forced=own)
    found = jnp.where(order < 0, 0, jnp.take_along_axis(p, jnp.maximum(order, 0), -1))
    before = jnp.cumsum(found, -1) - found
    ends = (found < tau * before) & ~jnp.take_along_axis(jnp.broadcast_to(own, p.shape), jnp.maximum(order, 0), -1)
    kept = jnp.cumsum(ends, -1) == 0
    return jnp.where(kept, order, -1)[..., :count]

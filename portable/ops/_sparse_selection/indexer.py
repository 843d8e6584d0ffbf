"""Selection of tokens by a small attention of its own: DeepSeek's indexer, and HISA's two stages."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_shape
from portable.ops._sparse_selection.common import best, block_means, held, in_chunks, positions, whole


def select_dsa(
    q: Float[Array, "b t j d"],
    k: Float[Array, "b s d"],
    w: Float[Array, "b t j"],
    *,
    top_k: int = 2048,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
) -> Int[Array, "b 1 t n"]:
    """Chooses for each query the tokens that an indexer scores highest; all heads of attention share them.

        I[t, s] = sum_j w[t, j] * relu(q[t, j] . k[s]);  never one behind t;  the top_k highest

    A positive factor of all scores, such as DeepSeek's j**-0.5 * d**-0.5, does not change the choice. Ties go to the
    earlier token. For `block_sparse_attention` with block_q=1, block_k=1 and is_causal=True.

    Args:
      q: [b, t, j, d] queries of the indexer's heads.
      k: [b, s, d] one key a token.
      w: [b, t, j] weights of the heads.
      top_k: tokens of a query; all if it is more than there are.
      q_positions: [b, t] or [t]; 0, 1, ... unless given.

    Returns:
      [b, 1, t, min(top_k, s)] int32, -1 where fewer tokens are visible.

    Raises:
      ValueError: shapes do not fit or top_k is below 1.
      TypeError: an array is not floating point, or top_k is no integer.

    Source: DeepSeek-V3.2 (arXiv 2512.02556), equation 1.

    >>> import jax.numpy as jnp, portable
    >>> k = jnp.array([2.0, 1, 3, 0]).reshape(1, 4, 1)
    >>> q, w = jnp.ones([1, 4, 1, 1]), jnp.ones([1, 4, 1])
    >>> portable.ops.select_dsa(q, k, w, top_k=2)[0, 0].tolist()
    [[0, -1], [0, 1], [2, 0], [2, 0]]
    """
    op = "select_dsa"
    q, k, w, at = _check(op, q, k, w, q_positions)
    top_k, s = whole(op, "top_k", top_k), k.shape[1]

    def choose(q, w, at):
        return best(_index(q, k, w), top_k, hidden=jnp.arange(s, dtype=jnp.int32) > at[..., None])

    return in_chunks(choose, k.shape[0] * s * q.shape[2], q, w, at)[:, None]


def select_hisa(
    q: Float[Array, "b t j d"],
    k: Float[Array, "b s d"],
    w: Float[Array, "b t j"],
    *,
    block_k: int = 128,
    blocks: int = 64,
    top_k: int = 2048,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    means: Float[Array, "b n d"] | None = None,
) -> Int[Array, "b 1 t n"]:
    """Chooses tokens as `select_dsa` does, among those of the blocks that score highest by the mean of their keys.

        J[t, i] = sum_j w[t, j] * relu(q[t, j] . mean(k[block i]));  the `blocks` highest, then I[t, s] in those alone

    The first block and the query's own are always among them (our choice, as are the sizes; the abstract names none).
    The same as `select_dsa` where blocks * block_k covers all keys.

    Args:
      q, k, w, top_k, q_positions: as for `select_dsa`.
      block_k: keys of a block.
      blocks: whose tokens are looked at, at least 2.
      means: [b, ceil(s / block_k), d] of the keys' blocks, where a cache keeps them; made from k unless given.

    Returns:
      [b, 1, t, min(top_k, s, blocks * block_k)] int32, -1 where fewer tokens are visible.

    Raises:
      ValueError: shapes do not fit or a size is out of range.
      TypeError: an array is not floating point, or a size is no integer.

    Source: HISA, "Hierarchical Indexing for Sparse Attention", over DeepSeek-V3.2 (arXiv 2512.02556), equation 1.

    >>> import jax.numpy as jnp, portable
    >>> k = jnp.array([2.0, 1, 3, 0]).reshape(1, 4, 1)
    >>> q, w = jnp.ones([1, 4, 1, 1]), jnp.ones([1, 4, 1])
    >>> portable.ops.select_hisa(q, k, w, block_k=2, blocks=2, top_k=2)[0, 0].tolist()
    [[0, -1], [0, 1], [2, 0], [2, 0]]
    """
    op = "select_hisa"
    q, k, w, at = _check(op, q, k, w, q_positions)
    top_k, block_k, blocks = whole(op, "top_k", top_k), whole(op, "block_k", block_k), whole(op, "blocks", blocks, 2)
    (b, s, d), count = k.shape, -(-k.shape[1] // block_k)
    if means is None:
        means = block_means(k[:, :, None], block_k)[:, :, 0]
    else:
        check_shape(op, "means", means, "b n d", {"b": b, "n": count, "d": d})
        (means,) = held(means.astype(k.dtype))
    kept = min(blocks, count)
    parts = jnp.pad(k, ((0, 0), (0, count * block_k - s), (0, 0))).reshape(b, count, block_k, d)
    top_k = min(top_k, s)

    def choose(q, w, at):
        number, own = jnp.arange(count, dtype=jnp.int32), at[..., None] // block_k
        coarse = _index(q, means, w)
        chosen = best(coarse, kept, hidden=number > own, forced=(number == own) | (number == 0))
        chosen = jnp.sort(jnp.where(chosen < 0, count, chosen), -1)  # in order, so that ties go to the earlier token
        near = parts[jnp.arange(b)[:, None, None], jnp.minimum(chosen, count - 1)]
        near = near.reshape(*chosen.shape[:2], kept * block_k, d)
        weight = jnp.maximum(jnp.einsum("btjd,btsd->btjs", q, near), 0)
        fine = jnp.einsum("btjs,btj->bts", weight, w)
        token = (chosen[..., None] * block_k + jnp.arange(block_k, dtype=jnp.int32)).reshape(*chosen.shape[:2], -1)
        found = best(fine, top_k, hidden=(token > at[..., None]) | (token >= s))
        return jnp.where(found < 0, -1, jnp.take_along_axis(token, jnp.maximum(found, 0), -1))

    each = b * (q.shape[2] * (count + kept * block_k) + kept * block_k * d)
    return in_chunks(choose, each, q, w, at)[:, None]


def _check(op, q, k, w, q_positions):
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "b t j d", sizes)
    check_shape(op, "k", k, "b s d", sizes)
    check_shape(op, "w", w, "b t j", sizes)
    check_float(op, q=q, k=k, w=w)
    wide = accumulator(q, k, w)
    return *held(*(x.astype(wide) for x in (q, k, w))), positions(op, q_positions, sizes["b"], sizes["t"])


def _index(q, k, w):
    """Returns I [b, t, s]."""
    return jnp.einsum("btjs,btj->bts", jnp.maximum(jnp.einsum("btjd,bsd->btjs", q, k), 0), w)

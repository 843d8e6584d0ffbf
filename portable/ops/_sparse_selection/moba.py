"""Mixture of Block Attention, and the model of how well it finds a block."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
from portable.ops._sparse_selection.common import best, block_means, held, in_chunks, positions, whole


def select_moba(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s g d"] | None,
    *,
    block_k: int,
    top_k: int,
    block_q: int = 1,
    q_positions: Int[Array, "b t"] | Int[Array, " t"] | None = None,
    means: Float[Array, "b blocks g d"] | None = None,
) -> Int[Array, "b h nq n"]:
    """Chooses for each query the blocks of keys whose mean it has the highest product with.

        s[t, i] = q[t] . mean(k[block i]);  +inf for the block of t, never one behind it;  the top_k highest

    Products are not scaled, and taken after the rotation of positions. The last block's mean is that of the keys there
    are. For `block_sparse_attention` with the same blocks and is_causal=True. FlashMoBA is the same with small blocks,
    and keys that a short convolution has gone over (`portable.ops.causal_conv1d`): see `moba_snr`.

    Args:
      q: [b, t, h, d] queries.
      k: [b, s, g, d] keys, h % g == 0; None if means are given.
      block_k: keys of a block.
      top_k: blocks of a query, its own among them; all if it is more than there are.
      block_q: queries that choose together, by their mean (our choice: the paper has 1). It must divide block_k.
      q_positions: [b, t] or [t]; 0, 1, ... unless given. Queries of a block must be in order.
      means: [b, blocks, g, d] of the keys' blocks (`block_means`), where a cache keeps them.

    Returns:
      [b, h, ceil(t / block_q), min(top_k, blocks)] int32, -1 where fewer blocks are visible.

    Raises:
      ValueError: shapes do not fit, a size is below 1, or block_q does not divide block_k.
      TypeError: q or k is not floating point, or a size is no integer.

    Source: Lu et al. 2025 (arXiv 2502.13189), equations 3 to 6; FlashMoBA: Xiao et al. 2025 (arXiv 2511.11571).

    >>> import jax.numpy as jnp, portable
    >>> k = jnp.array([1.0, 1, 3, 3, 2, 2, 0, 0]).reshape(1, 8, 1, 1)
    >>> portable.ops.select_moba(jnp.ones([1, 8, 1, 1]), k, block_k=2, top_k=2)[0, 0, ::2].tolist()
    [[0, -1], [1, 0], [2, 1], [3, 1]]
    """
    op, sizes = "select_moba", {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "k", k, "b s g d", sizes)
    check_shape(op, "means", means, "b blocks g d", sizes)
    if (k is None) == (means is None):
        raise ValueError(f"{op}: give k or the means of its blocks; got {'neither' if k is None else 'both'}.")
    check_groups(op, sizes["h"], sizes["g"], "k must be [b, s, g, d]")
    check_float(op, q=q, k=k, means=means)
    block_k, top_k, block_q = (
        whole(op, name, x) for name, x in (("block_k", block_k), ("top_k", top_k), ("block_q", block_q))
    )
    if block_k % block_q:
        raise ValueError(f"{op}: block_q must divide block_k, so that queries have one block of their own; got "
                         f"block_q={block_q}, block_k={block_k}.")  # fmt: skip
    (b, t, h, d), g = q.shape, sizes["g"]
    at = positions(op, q_positions, b, t)
    q, k, means = held(q, k, means)
    means = block_means(jnp.asarray(k), block_k) if means is None else means.astype(accumulator(q, means))
    blocks = means.shape[1]
    first = last = at
    if block_q > 1:
        first, last = at[:, ::block_q], at[:, jnp.minimum(jnp.arange(block_q - 1, t - 1 + block_q, block_q), t - 1)]
        q = block_means(q, block_q)

    def choose(q, first, last):
        q = q.reshape(*q.shape[:2], g, h // g, d)
        scores = jnp.einsum("btgrd,bngd->btgrn", q.astype(means.dtype), means).reshape(*q.shape[:2], h, blocks)
        number = jnp.arange(blocks, dtype=jnp.int32)
        own = (number >= first[..., None] // block_k) & (number <= last[..., None] // block_k)
        hidden = number > last[..., None] // block_k
        return best(scores, top_k, hidden=hidden[:, :, None], forced=own[:, :, None])

    return jnp.swapaxes(in_chunks(choose, b * h * blocks, q, first, last), 1, 2)


def moba_snr(
    head_dim: int, block_k: int, *, gap: float = 1.0, clustered: int = 1, cluster_gap: float = 0.0
) -> tuple[float, float]:
    """Returns how clearly the mean of a block shows that one of its keys is the sought one, and how often it does not.

        SNR = (gap + (clustered - 1) * cluster_gap) * sqrt(head_dim / (2 * block_k));  p = Phi(-SNR)

    Query and keys are taken for random unit vectors whose products with the query have variance 1 / head_dim; the
    sought key's is `gap` higher. Smaller blocks help as the square root does, and so do keys that stand together, which
    a convolution over keys teaches them to. The sought block is among the top K of n where about p < K / n.

    Args:
      head_dim: width of a head.
      block_k: keys of a block.
      gap: of the expected products of the query with the sought and with another key.
      clustered: keys in the block that are related to the sought one, itself among them.
      cluster_gap: of the products of the query with those and with the others.

    Returns:
      (SNR, p), p the probability that another block's mean has the higher product.

    Raises:
      ValueError: a size is below 1.

    Source: Xiao et al. 2025 (arXiv 2511.11571), section 3.

    >>> import portable
    >>> [round(x, 3) for x in portable.ops.moba_snr(64, 128)]
    [0.5, 0.309]
    """
    d, block = (whole("moba_snr", name, x) for name, x in (("head_dim", head_dim), ("block_k", block_k)))
    whole("moba_snr", "clustered", clustered)
    snr = (gap + (clustered - 1) * cluster_gap) * math.sqrt(d / (2 * block))
    return snr, 0.5 * math.erfc(snr / math.sqrt(2))

"""Attention between clusters of queries and of keys that mean alike: SVG2, and SVG-EAR's compensation."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_integer, check_shape, vary_together
from portable.ops._attention.merge import merge_attentions
from portable.ops._block_sparse_attention.api import block_sparse_attention
from portable.ops._sparse_selection.common import held, whole
from portable.ops._sparse_selection.grouping import Layout, by_group, held_by
from portable.ops._sparse_selection.kmeans import KMeans


def select_svg2(
    queries: KMeans, keys: KMeans, *, top_p: float = 0.9, min_ratio: float = 0.1, scale: float | None = None
) -> Int[Array, "b h m n"]:
    """Chooses for each cluster of queries the clusters of keys that its attention falls on, judged by centroids.

        P[i, j] = N[j] exp(qc[i] . kc[j] * scale) / sum_l N[l] exp(qc[i] . kc[l] * scale)

    The fewest with a sum of P of at least top_p, and at least a share of `min_ratio` of all. For `clustered_attention`.
    An empty cluster is never chosen; a top_p of 1 or more chooses all others.

    Args:
      queries: `kmeans(jnp.swapaxes(q, 1, 2), m)` of q [b, t, h, d]; the paper has 300 clusters, 50 iterations at first
        and, with the centroids of the step before, 2 from then on.
      keys: `kmeans(jnp.swapaxes(k, 1, 2), n)` of k [b, s, g, d], h % g == 0; 1000 clusters.
      top_p: of the sum of P.
      min_ratio: of the clusters.
      scale: of the scores; None for d**-0.5.

    Returns:
      [b, h, m, n] int32 clusters of keys, the highest P first, -1 behind the last.

    Raises:
      ValueError: shapes do not fit, or a share is out of range.

    Source: Yang et al. 2025, Sparse VideoGen2 (arXiv 2505.18875), section 4.

    >>> import jax.numpy as jnp, portable
    >>> x = jnp.array([[4.0, 0], [0, 4], [4, 0], [0, 4]])[None, None]
    >>> found = portable.ops.kmeans(x, 2, centroids=x[..., :2, :])
    >>> portable.ops.select_svg2(found, found)[0, 0].tolist()
    [[0, -1], [1, -1]]
    """
    op = "select_svg2"
    if not top_p > 0 or not 0 <= min_ratio <= 1:
        raise ValueError(f"{op}: top_p must be above 0, min_ratio from 0 to 1; got {top_p} and {min_ratio}.")
    p, _, counts = _shares(op, queries, keys, scale)
    falling, sums = _falling(p)
    before = jnp.cumsum(sums, -1) - sums
    least = max(1, -(-p.shape[-1] * min_ratio // 1))
    kept = ~(before >= top_p) | (jnp.arange(p.shape[-1]) < least)
    kept = kept if top_p < 1 else jnp.ones_like(kept)
    some = jnp.take_along_axis(jnp.broadcast_to(counts[:, :, None] > 0, p.shape), falling, -1)
    return jnp.where(kept & some, falling, -1)


def select_svg_ear(
    queries: KMeans,
    keys: KMeans,
    k: Float[Array, "b s g d"],
    v: Float[Array, "b s g v"],
    *,
    density: float = 0.2,
    scale: float | None = None,
) -> Int[Array, "b h m n"]:
    """Chooses for each cluster of queries the clusters of keys that compensation by centroids would get most wrong.

    A cluster that is skipped stands in `clustered_attention` for its centroid. What that leaves out of the sums of
    exponentials and of values is, to the second order in the distances from the centroids, bounded by

        error[i, j] = P[i, j] (|a|^2 x[j]^2 / 2 * |vc[j]| + |a| x[j] y[j]),  a = qc[i] * scale

    with P of `select_svg2` and x and y the root mean squares of the distances of keys and values from their centroids.
    Chosen are clusters by falling error over cost, N[j], up to a share of all keys. (The paper computes exactly what
    has the highest estimated error for its cost; that the estimate is this bound is our choice.) A cluster whose keys
    are all the same has no error and is not chosen.

    Args:
      queries, keys: as for `select_svg2`.
      k, v: [b, s, g, d] and [b, s, g, v], what `keys` clusters and its values.
      density: share of the keys that a cluster of queries sees exactly; 0 for none.
      scale: of the scores; None for d**-0.5.

    Returns:
      [b, h, m, n] int32 clusters of keys, the highest error for its cost first, -1 behind the last.

    Raises:
      ValueError: shapes do not fit, or density is not from 0 to 1.

    Source: Zhou et al. 2026, SVG-EAR (arXiv 2603.08982).
    """
    op = "select_svg_ear"
    if not 0 <= density <= 1:
        raise ValueError(f"{op}: density must be from 0 to 1; got {density}.")
    axes: dict[str, int] = {}
    check_shape(op, "centroids of keys", keys.centroids, "b g n d", axes)
    check_shape(op, "k", k, "b s g d", axes)
    check_shape(op, "v", v, "b s g v", axes)
    check_float(op, k=k, v=v)
    p, centres, counts = _shares(op, queries, keys, scale)
    h, s, d = p.shape[1], k.shape[1], k.shape[-1]
    groups = counts.shape[-1]
    k, v = held(k, v)
    spreads, sizes = [], None
    for x in (k, v):
        x = jnp.swapaxes(x, 1, 2).astype(p.dtype)
        of = jnp.clip(keys.assignments, 0, groups - 1)
        mean = _means(x, of, groups)
        apart = x - jnp.take_along_axis(mean, of[..., None], 2)
        square = _means((apart * apart).sum(-1, keepdims=True), of, groups)[..., 0]
        spreads.append(jnp.repeat(jnp.sqrt(square), h // square.shape[1], 1)[:, :, None])
        sizes = jnp.repeat(jnp.sqrt((mean * mean).sum(-1)), h // mean.shape[1], 1)[:, :, None]
    a = jnp.sqrt((centres * centres).sum(-1))[..., None] * (max(1, d) ** -0.5 if scale is None else abs(scale))
    (x, y) = spreads
    error = p * (0.5 * (a * x) ** 2 * sizes + a * x * y)
    cost = jnp.broadcast_to(counts[:, :, None], p.shape)
    falling, worth = _falling(jnp.where(cost > 0, error / jnp.maximum(cost, 1), 0))
    total = jnp.cumsum(jnp.take_along_axis(cost, falling, -1), -1)
    kept = (total <= density * s) & ~(worth <= 0)
    return jnp.where(kept, falling, -1)


def clustered_attention(
    q: Float[Array, "b t h k"],
    k: Float[Array, "b s g k"],
    v: Float[Array, "b s g v"],
    queries: KMeans,
    keys: KMeans,
    chosen: Int[Array, "b h m n"],
    *,
    compensate: bool = False,
    block_q: int = 64,
    block_k: int = 64,
    max_blocks: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "b t h v"] | tuple[Float[Array, "b t h v"], Float[Array, "b h t"]]:
    """Computes attention of each query to the keys of the clusters that are chosen for its own cluster.

    Tokens are put into the order of their clusters, each from a block of its own, and back. With `compensate`, every
    other cluster counts as so many keys at its centroid, with the mean of its values:

        exp(lse[i]) = sum over keys j of chosen clusters of exp(q[i] . k[j] * scale)
                    + sum over other clusters c of N[c] exp(q[i] . mean k[c] * scale)

    Not causal. Differentiable in q, k and v, through means too; clusters are fixed. Clusters of one key each give
    attention to all keys whatever is chosen, and so do all clusters chosen.

    Args:
      q, k, v: [b, t, h, k], [b, s, g, k] and [b, s, g, v], h % g == 0.
      queries: `kmeans(jnp.swapaxes(q, 1, 2), m)`; only its assignments [b, h, t] are read.
      keys: `kmeans(jnp.swapaxes(k, 1, 2), n)`, [b, g, s].
      chosen: [b, h, m, n'] clusters of keys, the best first, -1 for none; of `select_svg2` or `select_svg_ear`.
      compensate: as above.
      block_q, block_k: tokens of a block. A cluster wastes half a block on average.
      max_blocks: of keys for a cluster of queries: what bounds work and memory. Clusters that do not fit, and all
        behind them, count as not chosen. None for room for all.
      scale, return_lse, implementation: of `block_sparse_attention`.

    Returns:
      As `block_sparse_attention`.

    Raises:
      ValueError: shapes do not fit, or a size is below 1.
      TypeError: an array has a dtype of another kind.

    Source: Yang et al. 2025, Sparse VideoGen2 (arXiv 2505.18875), section 4; compensation: Zhou et al. 2026, SVG-EAR
    (arXiv 2603.08982).

    >>> import jax.numpy as jnp, portable
    >>> q = k = jnp.array([[4.0, 0], [0, 4], [4, 0], [0, 4]])[None, :, None]
    >>> v = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> found = portable.ops.kmeans(jnp.swapaxes(k, 1, 2), 2, centroids=k[:, :2, 0][:, None])
    >>> chosen = portable.ops.select_svg2(found, found)
    >>> portable.ops.clustered_attention(q, k, v, found, found, chosen, block_q=2, block_k=2)[0, :, 0, 0].tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    op, sizes = "clustered_attention", {}
    check_shape(op, "q", q, "b t h k", sizes)
    check_shape(op, "k", k, "b s g k", sizes)
    check_shape(op, "v", v, "b s g v", sizes)
    check_float(op, q=q, k=k, v=v)
    check_groups(op, sizes["h"], sizes["g"], "k and v must be [b, s, g, ...]")
    check_shape(op, "assignments of queries", queries.assignments, "b h t", sizes)
    check_shape(op, "assignments of keys", keys.assignments, "b g s", sizes)
    check_shape(op, "chosen", chosen, "b h m n", sizes)
    check_integer(op, chosen=chosen)
    if compensate and scale == 0:
        raise ValueError(f"{op}: scale must not be 0 with compensate; got {scale}. Give q of zeros instead.")
    block_q, block_k = (whole(op, name, x) for name, x in (("block_q", block_q), ("block_k", block_k)))
    b, h, g, m = (sizes[x] for x in ("b", "h", "g", "m"))
    r, groups = h // g, keys.centroids.shape[-2]
    factor: float = max(1, sizes["k"]) ** -0.5 if scale is None else scale
    if queries.centroids.shape[-2] != m:
        raise ValueError(f"{op}: chosen must have a list for each of {queries.centroids.shape[-2]} clusters; got {m}.")
    of = jnp.clip(keys.assignments, 0, groups - 1)
    tokens = by_group(jnp.clip(queries.assignments, 0, m - 1), m, block_q)
    held_keys = by_group(of, groups, block_k)
    most = held_keys.size // block_k
    budget = most if max_blocks is None else min(most, whole(op, "max_blocks", max_blocks))
    per_head = lambda x: jnp.repeat(x, r, axis=1)[:, :, None]  # noqa: E731
    chosen = jnp.where((chosen >= 0) & (chosen < groups), chosen, -1)
    lists, taken = held_by(chosen, per_head(held_keys.first), per_head(held_keys.blocks), budget, complete=True)

    def of_blocks(x):
        """[b, h, m, n] of clusters of queries -> [b * g, r, blocks, n] of blocks of theirs."""
        x = jnp.take_along_axis(x, jnp.maximum(tokens.owner, 0)[..., None], 2)
        return jnp.where(tokens.owner[..., None] < 0, -1, x).reshape(b * g, r, -1, x.shape[-1])

    spread = lambda x, layout: _laid(jnp.swapaxes(x, 1, 2), layout)  # noqa: E731
    rows = spread(q, tokens).reshape(b * g, r, tokens.size, -1).swapaxes(1, 2)
    places = {"segment_ids": _segments(b * g, tokens, held_keys), "scale": factor, "implementation": implementation}
    keyed, valued = (spread(x, held_keys).reshape(b * g, held_keys.size, 1, -1) for x in (k, v))
    part: Any = {"block_q": block_q, "is_causal": False, "return_lse": True}
    out, lse = block_sparse_attention(rows, keyed, valued, of_blocks(lists), block_k=block_k, **part, **places)
    if compensate:
        wide = accumulator(q, k, v)
        centroids = [_means(jnp.swapaxes(x, 1, 2).astype(wide), of, groups) for x in (k, v)]
        counts = _counts(of, groups)
        # The logarithm of a cluster's size comes into the scores by a channel in which every query has a one.
        more = jnp.log(jnp.maximum(counts, 1)).astype(wide)[..., None] / factor
        keyed = jnp.concatenate([centroids[0], more], -1).reshape(b * g, groups, 1, -1)
        asked = jnp.concatenate([rows.astype(wide), jnp.ones((*rows.shape[:3], 1), wide)], -1)
        values = centroids[1].reshape(b * g, groups, 1, -1)
        at = jnp.where(taken, chosen, groups)
        exact = jnp.zeros((*chosen.shape[:3], groups + 1), bool)
        exact = exact.at[(*jnp.ogrid[:b, :h, :m, :1][:3], at)].set(True)[..., :groups]
        rest = jnp.where(exact | (per_head(counts) == 0), -1, jnp.arange(groups, dtype=jnp.int32))
        places["segment_ids"] = None
        other, level = block_sparse_attention(asked, keyed, values, of_blocks(rest), block_k=1, **part, **places)
        out, lse = merge_attentions([out, other.astype(out.dtype)], [lse, level])
    out = jnp.swapaxes(out, 1, 2).reshape(b, h, tokens.size, -1)
    out = jnp.swapaxes(jnp.take_along_axis(out, tokens.slots[..., None], 2), 1, 2).astype(q.dtype)
    if not return_lse:
        return out
    return out, jnp.take_along_axis(lse.reshape(b, h, -1), tokens.slots, 2)


def _shares(op: str, queries: KMeans, keys: KMeans, scale):
    """Returns (P [b, h, m, n], centroids of queries [b, h, m, d], keys of each cluster [b, h, n])."""
    sizes: dict[str, int] = {}
    check_shape(op, "centroids of queries", queries.centroids, "b h m d", sizes)
    check_shape(op, "centroids of keys", keys.centroids, "b g n d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "centroids of keys must be [b, g, n, d]")
    centres, others, counts = held(queries.centroids, keys.centroids, keys.counts)
    r, (b, h, m, d) = sizes["h"] // sizes["g"], centres.shape
    scale = max(1, d) ** -0.5 if scale is None else scale
    x = jnp.einsum("bgrmd,bgnd->bgrmn", centres.reshape(b, -1, r, m, d), others).reshape(b, h, m, -1) * scale
    counts = jnp.repeat(counts, r, 1)
    size = jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1)), -jnp.inf)
    return jax.nn.softmax(x + size[:, :, None], -1), centres, counts


def _falling(x):
    """Returns the order of falling numbers, NaN first, int32, and the numbers in it."""
    order = jnp.argsort(jnp.where(jnp.isnan(x), -jnp.inf, -x), axis=-1).astype(jnp.int32)
    return order, jnp.take_along_axis(x, order, -1)


def _at(of):
    first, second = jnp.ogrid[: of.shape[0], : of.shape[1]]
    return first[..., None], second[..., None], of


def _counts(of, groups: int):
    return jnp.zeros((*of.shape[:2], groups), jnp.int32).at[_at(of)].add(1)


def _means(x, of, groups: int):
    """Returns the mean of x [b, g, s, d] over each group, [b, g, groups, d]; 0 for an empty one."""
    sums = jnp.zeros((*of.shape[:2], groups, x.shape[-1]), x.dtype).at[_at(of)].add(x)
    return sums / jnp.maximum(_counts(of, groups), 1)[..., None]


def _laid(x, layout: Layout):
    """[b, heads, n, d] -> [b, heads, size, d]."""
    slots = layout.slots
    empty = vary_together(jnp.zeros((*x.shape[:2], layout.size, x.shape[-1]), x.dtype), x)[0]
    return empty.at[_at(slots)].set(x, unique_indices=True)


def _segments(rows: int, tokens: Layout, keys: Layout):
    """Returns the pair that keeps slots without a key out of sight."""
    real = jnp.full((*keys.slots.shape[:2], keys.size), -1, jnp.int32).at[_at(keys.slots)].set(0)
    return jnp.zeros((rows, tokens.size), jnp.int32), real.reshape(rows, keys.size)

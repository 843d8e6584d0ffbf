"""Squeezed Attention: keys of a text that stays, clustered once, looked up by their centroids."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
from portable.ops._sparse_selection.common import held, in_chunks, whole
from portable.ops._sparse_selection.grouping import held_by, ranks
from portable.ops._sparse_selection.kmeans import kmeans


class Squeezed(NamedTuple):
    """A text's keys by cluster.

    Attributes:
      centroids: [b, g, c, d], the means of the clusters' keys.
      counts: [b, g, c] int32, keys of each; 0 for an empty one.
      first: [b, g, c] int32, where a cluster begins in `order`.
      order: [b, g, s] int32, tokens by cluster.
      parents: [b, g, c] int32, the coarse cluster of each cluster, or None; so the next two.
      coarse_centroids: [b, g, m, d].
      coarse_counts: [b, g, m] int32, keys of each.
    """

    centroids: Any
    counts: Any
    first: Any
    order: Any
    parents: Any = None
    coarse_centroids: Any = None
    coarse_counts: Any = None


def squeeze(
    k: Float[Array, "b s g d"], clusters: int, *, coarse: int | None = None, iterations: int = 10, key: Any = None
) -> Squeezed:
    """Clusters the keys of a text that stays, once for all questions about it.

    k-means of keys of length 1 (by their cosine), for each head; a centroid is the mean of the keys themselves. With
    `coarse`, clusters are clustered again in the same way, for a lookup in two steps.

    Args:
      k: [b, s, g, d] keys.
      clusters: of each head, at most s; the paper has 5 % of s.
      coarse: clusters of clusters; the paper has 1 % of s.
      iterations: of Lloyd's.
      key: of the points drawn to start from; `jax.random.key(0)` unless given.

    Returns:
      `Squeezed`, float32 (float64 if k is).

    Raises:
      ValueError: k has another shape, there are more clusters than keys, or concrete keys are not finite.
      TypeError: k is not floating point, or a number is no integer.

    Source: Hooper et al. 2024 (arXiv 2411.09688), section 4.

    >>> import jax.numpy as jnp, portable
    >>> k = jnp.array([[1.0, 0], [0, 2], [3, 0], [0, 4]]).reshape(1, 4, 1, 2)
    >>> found = portable.ops.squeeze(k, 2)
    >>> sorted(found.centroids[0, 0].tolist()), found.counts[0, 0].tolist()
    ([[0.0, 3.0], [2.0, 0.0]], [2, 2])
    """
    op = "squeeze"
    check_shape(op, "k", k, "b s g d", {})
    check_float(op, k=k)
    clusters, iterations = whole(op, "clusters", clusters), whole(op, "iterations", iterations, 0)
    if clusters > k.shape[1]:
        raise ValueError(f"{op}: clusters must be at most the number of keys; got {clusters} for s={k.shape[1]}.")
    if coarse is not None and whole(op, "coarse", coarse) > clusters:
        raise ValueError(f"{op}: coarse must be at most clusters; got {coarse} for {clusters}.")
    wide = accumulator(k)
    x = jnp.swapaxes(jax.lax.stop_gradient(k).astype(wide), 1, 2)
    _, of, counts, centroids = _clustered(x, None, clusters, iterations, key)
    order, _, _ = ranks(of, clusters)
    found = Squeezed(centroids, counts, (jnp.cumsum(counts, -1) - counts).astype(jnp.int32), order)
    if coarse is None:
        return found
    _, parents, counts, centroids = _clustered(found.centroids, found.counts, coarse, iterations, key)
    return found._replace(parents=parents, coarse_centroids=centroids, coarse_counts=counts)


def squeezed_scores(
    q: Float[Array, "b t h d"], context: Squeezed, *, block_q: int = 1, scale: float | None = None, coarse: bool = False
) -> Float[Array, "b h nq c"]:
    """Returns the share of a query's attention that a key of each cluster gets, judged by centroids.

        S[t, i] = exp(q[t] . C[i] * scale) / sum_j N[j] exp(q[t] . C[j] * scale)

    A threshold that lets a share of clusters pass is their quantile, over questions like those to come, all heads and
    all layers: `jnp.quantile(squeezed_scores(q, context), 0.9)`. The paper takes the last 100 queries of the text.

    Args:
      q: [b, t, h, d] queries.
      context: of `squeeze`, whose g divides h.
      block_q: queries whose shares are averaged (our choice: the paper has 1).
      scale: of the scores; None for d**-0.5.
      coarse: of the coarse clusters.

    Returns:
      [b, h, ceil(t / block_q), c], 0 for an empty cluster.

    Raises:
      ValueError: shapes do not fit, or context has no coarse clusters.
      TypeError: q is not floating point, or block_q no integer.

    Source: Hooper et al. 2024 (arXiv 2411.09688), equations 1 and 2.
    """
    return _scores("squeezed_scores", q, context, block_q, scale, coarse, None)


def select_squeezed(
    q: Float[Array, "b t h d"],
    context: Squeezed,
    *,
    threshold: float,
    budget: int,
    coarse_threshold: float | None = None,
    block_q: int = 1,
    scale: float | None = None,
) -> Int[Array, "b h nq n"]:
    """Chooses the tokens of a clustered text whose clusters a query's attention falls on.

    Those of the clusters with S above the threshold (`squeezed_scores`), the highest first. With a coarse threshold,
    those whose coarse cluster is above it alone, and S is of these (our choice; all finer scores are computed, and what
    is not looked at is masked). Of a cluster that the budget cuts, the first tokens are taken; our choice, as the paper
    has no budget. For `block_sparse_attention` to the text with block_k=1 and is_causal=False; what came after the text
    is attended to densely, and both are joined by `merge_attentions`.

    Args:
      q: [b, t, h, d] queries behind the text.
      context: of `squeeze`, whose g divides h.
      threshold: of S; 0 takes all.
      budget: tokens of a query at most; all if it is more than there are.
      coarse_threshold: of S of coarse clusters.
      block_q: queries that choose together, by the mean of their S.
      scale: of the scores; None for d**-0.5.

    Returns:
      [b, h, ceil(t / block_q), min(budget, s)] int32 tokens, -1 behind the last.

    Raises:
      ValueError: shapes do not fit, budget is below 1, or there are no coarse clusters.
      TypeError: q is not floating point, or a size is no integer.

    Source: Hooper et al. 2024 (arXiv 2411.09688), section 4.

    >>> import jax.numpy as jnp, portable
    >>> k = jnp.array([[1.0, 0], [0, 2], [3, 0], [0, 4]]).reshape(1, 4, 1, 2)
    >>> q = jnp.array([[5.0, 0], [0, 5]]).reshape(1, 2, 1, 2)
    >>> portable.ops.select_squeezed(q, portable.ops.squeeze(k, 2), threshold=0.1, budget=3)[0, 0].tolist()
    [[0, 2, -1], [1, 3, -1]]
    """
    op = "select_squeezed"
    budget = min(whole(op, "budget", budget), context.order.shape[-1])
    if not threshold >= 0:
        raise ValueError(f"{op}: threshold must not be negative; got {threshold}.")
    allowed = None
    if coarse_threshold is not None:
        coarse = _scores(op, q, context, block_q, scale, True, None)
        parents = _per_head(context.parents, q.shape[2])[:, :, None]
        allowed = ~(jnp.take_along_axis(coarse, parents, -1) <= coarse_threshold)
    scores = _scores(op, q, context, block_q, scale, False, allowed)
    counts, first, order = (_per_head(x, q.shape[2]) for x in (context.counts, context.first, context.order))
    # What is NaN is looked at, and the result shows it.
    kept = (counts[:, :, None] > 0) & ~(scores <= threshold if threshold else scores < 0)
    kept = kept if allowed is None else kept & allowed
    ranked = jnp.where(jnp.isnan(scores), jnp.inf, scores)
    falling = jnp.argsort(jnp.where(kept, -ranked, jnp.inf), axis=-1).astype(jnp.int32)
    chosen = jnp.where(jnp.take_along_axis(kept, falling, -1), falling, -1)
    place, _ = held_by(chosen, first[:, :, None], counts[:, :, None], budget, complete=False)
    token = jnp.take_along_axis(order[:, :, None], jnp.maximum(place, 0), -1)
    return jnp.where(place < 0, -1, token)


def _clustered(x, weights, clusters, iterations, key):
    """Returns (k-means, assignments, keys of each cluster, means of the vectors themselves) of x [b, g, n, d]."""
    length = jnp.sqrt(jnp.einsum("bgnd,bgnd->bgn", x, x))[..., None]
    found = kmeans(x / jnp.where(length == 0, 1, length), clusters, iterations=iterations, key=key)
    of = jnp.clip(found.assignments, 0, clusters - 1)
    weights = jnp.ones(of.shape, jnp.int32) if weights is None else weights
    at = jnp.ogrid[: of.shape[0], : of.shape[1]]
    at = at[0][..., None], at[1][..., None], of
    counts = jnp.zeros((*of.shape[:2], clusters), jnp.int32).at[at].add(weights)
    part = jnp.where(weights[..., None] > 0, x * weights[..., None], 0)
    sums = jnp.zeros((*of.shape[:2], clusters, x.shape[-1]), x.dtype).at[at].add(part)
    return found, of, counts, sums / jnp.maximum(counts, 1)[..., None]


def _per_head(x, heads: int):
    return jnp.repeat(x, heads // x.shape[1], axis=1)


def _scores(op, q, context, block_q, scale, coarse, allowed):
    centroids, counts = context.centroids, context.counts
    if coarse:
        centroids, counts = context.coarse_centroids, context.coarse_counts
        if centroids is None:
            raise ValueError(f"{op}: the text has no coarse clusters; make it by squeeze(k, clusters, coarse=...).")
    sizes: dict[str, int] = {}
    check_shape(op, "q", q, "b t h d", sizes)
    check_shape(op, "centroids of context", centroids, "b g c d", sizes)
    check_groups(op, sizes["h"], sizes["g"], "centroids of context must be [b, g, c, d]")
    check_float(op, q=q)
    block_q, (b, t, h, d), g = whole(op, "block_q", block_q), q.shape, sizes["g"]
    scale = max(1, d) ** -0.5 if scale is None else scale
    q, centroids, counts = held(q, centroids, counts)
    nq, c = -(-t // block_q), centroids.shape[2]
    size = jnp.where(counts > 0, jnp.log(jnp.maximum(counts, 1)), -jnp.inf)[:, None, :, None]
    q = jnp.pad(q, ((0, 0), (0, nq * block_q - t), (0, 0), (0, 0))).reshape(b, nq, block_q, h, d)
    real = (jnp.arange(nq * block_q) < t).reshape(1, nq, block_q, 1, 1)
    seen = jnp.ones((b, nq, 1, 1), bool) if allowed is None else jnp.swapaxes(allowed, 1, 2)

    def judge(q, real, seen):
        q = q.reshape(*q.shape[:3], g, h // g, d).astype(centroids.dtype)
        x = jnp.einsum("bnigrd,bgcd->bnigrc", q, centroids) * scale
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], h, c)).reshape(*x.shape[:2], 1, g, h // g, c)
        among = jnp.where(seen, x + size[:, None], -jnp.inf)
        total = jax.nn.logsumexp(among, -1, keepdims=True)
        share = jnp.exp(x - jnp.where(total == -jnp.inf, jnp.inf, total))
        share = jnp.where(seen & (size > -jnp.inf)[:, None], share, 0).reshape(*x.shape[:3], h, c)
        return jnp.where(real, share, 0).sum(2) / jnp.maximum(real.sum(2), 1)

    real = jnp.broadcast_to(real, (b, nq, block_q, 1, 1))
    return jnp.swapaxes(in_chunks(judge, b * h * c * block_q, q, real, seen), 1, 2)

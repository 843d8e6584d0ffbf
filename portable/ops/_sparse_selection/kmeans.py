"""k-means, streamed: no array of all distances."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_array, check_float, vary_together
from portable.ops._sparse_selection.common import whole

SCORES = 2**19  # distances held at once


class KMeans(NamedTuple):
    """Clusters.

    Attributes:
      centroids: [*rows, clusters, d].
      assignments: [*rows, n] int32, the cluster of each point.
      counts: [*rows, clusters] int32, points of each cluster; 0 for one that came out empty.
      inertia: [*rows], the sum of squared distances of points to their centroids.
    """

    centroids: Any
    assignments: Any
    counts: Any
    inertia: Any


def kmeans(
    x: Float[Array, "*rows n d"],
    clusters: int,
    *,
    iterations: int = 10,
    key: Any = None,
    centroids: Float[Array, "*rows clusters d"] | None = None,
) -> KMeans:
    """Clusters points by Lloyd's iteration: each to its nearest centroid, each centroid to the mean of its points.

    Starts from given centroids (those of a step before, to go on from) or from points drawn without repetition. A
    cluster without points keeps its centroid. The assignments are those to the centroids that are returned. Memory is
    that of a few points' distances; sums are float32 (float64 if x is). For the cosine, give points of length 1.
    No gradient passes through it. Under jit, points that are not finite count in no mean: no other point suffers.

    Args:
      x: [*rows, n, d] points; each row is clustered by itself.
      clusters: how many, at most n.
      iterations: of Lloyd's; 0 only assigns.
      key: of the points drawn; `jax.random.key(0)` unless given.
      centroids: [*rows, clusters, d] to start from.

    Returns:
      `KMeans`.

    Raises:
      ValueError: shapes do not fit, clusters is not from 1 to n, iterations is negative, or concrete points are not
        finite.
      TypeError: x is not floating point, or a number is no integer.

    Source: Lloyd 1982 (IEEE Transactions on Information Theory 28), section 2; streamed as in Flash-KMeans (arXiv
    2603.09229).

    >>> import jax.numpy as jnp, portable
    >>> x = jnp.array([[0.0], [1.0], [10.0], [11.0]])
    >>> found = portable.ops.kmeans(x, 2, centroids=jnp.array([[0.0], [1.0]]))
    >>> found.centroids[:, 0].tolist(), found.assignments.tolist()
    ([0.5, 10.5], [0, 0, 1, 1])
    """
    op = "kmeans"
    clusters, iterations = whole(op, "clusters", clusters), whole(op, "iterations", iterations, 0)
    x = _points(op, x)
    rows, (n, d) = x.shape[:-2], x.shape[-2:]
    if clusters > n:
        raise ValueError(f"{op}: clusters must be at most the number of points; got {clusters} for n={n}.")
    if centroids is None:
        key = jax.random.key(0) if key is None else key
        drawn = jax.random.choice(key, n, (clusters,), replace=False)
        centroids = jnp.take(x, drawn, axis=-2)
    else:
        centroids = _centroids(op, centroids, x)
        if centroids.shape[-2] != clusters:
            raise ValueError(f"{op}: centroids must be [*rows, clusters={clusters}, d]; got {list(centroids.shape)}.")
    wide = accumulator(x)
    flat, start = x.reshape(-1, n, d), centroids.astype(wide).reshape(-1, clusters, d)

    def one(points, start):
        centre = _centre(points)

        def iterate(_, centroids):
            sums, counts = _streamed(points, centroids, centre, keep=True)
            some = (counts > 0)[:, None]
            return jnp.where(some, sums / jnp.where(some, counts[:, None], 1) + centre, centroids)

        centroids = jax.lax.fori_loop(0, iterations, iterate, vary_together(start, points)[0])
        nearest, distance = _streamed(points, centroids, centre)
        counts = jnp.zeros((clusters,), jnp.int32).at[nearest].add(1)
        return KMeans(centroids, nearest, counts, distance.sum())

    found = jax.lax.map(lambda given: one(*given), (flat, start)) if flat.shape[0] != 1 else None
    if found is None:
        found = jax.tree.map(lambda a: a[None], one(flat[0], start[0]))
    return KMeans(*(a.reshape(*rows, *a.shape[1:]) for a in found))


def kmeans_assign(
    x: Float[Array, "*rows n d"], centroids: Float[Array, "*rows clusters d"]
) -> tuple[Int[Array, "*rows n"], Float[Array, "*rows n"]]:
    """Returns the nearest centroid of each point, and the squared distance to it; the first of equally near ones.

    Args:
      x: [*rows, n, d] points.
      centroids: [*rows, clusters, d].

    Returns:
      [*rows, n] int32 and [*rows, n] float32 (float64 if x is).

    Raises:
      ValueError: shapes do not fit, there is no centroid, or concrete points are not finite.
      TypeError: an argument is not floating point.

    >>> import jax.numpy as jnp, portable
    >>> nearest, distance = portable.ops.kmeans_assign(jnp.array([[0.0], [9.0]]), jnp.array([[1.0], [7.0]]))
    >>> nearest.tolist(), distance.tolist()
    ([0, 1], [1.0, 4.0])
    """
    x = _points("kmeans_assign", x)
    centroids = _centroids("kmeans_assign", centroids, x)
    rows, (n, d) = x.shape[:-2], x.shape[-2:]
    flat = x.reshape(-1, n, d), centroids.astype(accumulator(x)).reshape(-1, *centroids.shape[-2:])
    found, distance = jax.lax.map(lambda xs: _streamed(xs[0], xs[1], _centre(xs[0])), flat)
    return found.reshape(*rows, n), distance.reshape(*rows, n)


def _points(op: str, x):
    check_array(op, x=x)
    if x.ndim < 2:
        raise ValueError(f"{op}: x must be [*rows, n, d]; got shape {list(x.shape)}.")
    check_float(op, x=x)
    if 0 in x.shape[-2:]:
        raise ValueError(f"{op}: x must have a point and a channel at least; got shape {list(x.shape)}.")
    finite = lambda a: abs(a) < float("inf")  # noqa: E731 - for numpy and jax alike; NaN is not
    check_values(finite, f"{op}: points must be finite; got NaN or infinity. A mean of such points is none.", x)
    return jax.lax.stop_gradient(x)


def _centroids(op: str, centroids, x):
    check_array(op, centroids=centroids)
    check_float(op, centroids=centroids)
    wanted = x.ndim, x.shape[:-2], x.shape[-1]
    if (centroids.ndim, centroids.shape[:-2], centroids.shape[-1]) != wanted or not centroids.shape[-2]:
        raise ValueError(
            f"{op}: centroids must be [*rows, clusters, d] with at least one, and rows and d of x {list(x.shape)}; got "
            f"{list(centroids.shape)}."
        )
    return jax.lax.stop_gradient(centroids)


def _centre(x):
    """Returns the mean [d] of the points [n, d] that are finite."""
    x = x.astype(accumulator(x))
    finite = jnp.isfinite(x).all(-1, keepdims=True)
    return jnp.where(finite, x, 0).sum(0) / jnp.maximum(finite.sum(), 1)


def _streamed(x, centroids, centre, keep: bool = False):
    """Returns (nearest [n], squared distances [n]), or (sums [clusters, d], counts [clusters]) if `keep`.

    Sums are of points less `centre`, around which distances are taken too: squares of points far from zero would drown
    what sets them apart.
    """
    (n, d), clusters = x.shape, centroids.shape[0]
    wide = accumulator(x)
    size = max(1, min(n, SCORES // clusters))
    centroids = centroids - centre
    half = 0.5 * jnp.einsum("cd,cd->c", centroids, centroids)
    number = jnp.arange(clusters, dtype=jnp.int32)

    def tile(carry, i):
        start = jnp.minimum(i * size, n - size)  # the last tile begins in the one before
        points = jax.lax.dynamic_slice_in_dim(x, start, size).astype(wide) - centre
        # Half the squared distance, less what a point's distances have in common.
        apart = half - jnp.einsum("nd,cd->nc", points, centroids, precision=jax.lax.Precision.HIGHEST)
        apart = jnp.where(jnp.isnan(apart), jnp.inf, apart)  # a centroid that is NaN is never the nearest
        least = apart.min(-1)
        nearest = jnp.where(apart == least[:, None], number, clusters).min(-1)
        if keep:
            sums, counts = carry
            fresh = (start + jnp.arange(size) >= i * size) & jnp.isfinite(points).all(-1)
            at = jnp.where(fresh, nearest, clusters)
            return (sums.at[at].add(points, mode="drop"), counts.at[at].add(1, mode="drop")), None
        distance = jnp.maximum(0, 2 * least + jnp.einsum("nd,nd->n", points, points))
        put = jax.lax.dynamic_update_slice_in_dim
        return tuple(put(x, part, start, 0) for x, part in zip(carry, (nearest, distance), strict=True)), None

    shapes = ((clusters, d), wide), ((clusters,), jnp.int32)
    if not keep:
        shapes = ((n,), jnp.int32), ((n,), wide)
    empty = vary_together(x, *(jnp.zeros(*shape) for shape in shapes))[1:]
    return jax.lax.scan(tile, tuple(empty), jnp.arange(-(-n // size)))[0]

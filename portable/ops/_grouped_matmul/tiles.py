"""A walk over tiles of rows, each of one group: as many as the groups' sizes ask for, which only the device knows.

A group is cut into tiles of a few sizes, large ones first, so that little is computed for no row, and products have
shapes that are quick. A loop of a trip count known on the device runs over each size's tiles.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from portable.ops._arguments import accumulator, vary_together


class Tile(NamedTuple):
    """Rows start..start + size, of which row..end belong to group `e`; start is before row at the end of the arrays.

    Attributes:
      product: (i, x, transposed=False) -> x @ w or x @ w.T in the accumulator's dtype, of the i-th of the weights.
    """

    e: jax.Array
    start: jax.Array
    row: jax.Array
    end: jax.Array
    size: int
    product: Callable

    def read(self, x):
        """Returns the tile's rows of x [m, ...]."""
        return lax.dynamic_slice_in_dim(x, self.start, self.size)

    def write(self, x, rows):
        """Returns x with the group's rows of the tile replaced."""
        at = self.start + jnp.arange(self.size)
        own = ((at >= self.row) & (at < self.end)).reshape(-1, *[1] * (x.ndim - 1))
        return lax.dynamic_update_slice_in_dim(x, jnp.where(own, rows.astype(x.dtype), self.read(x)), self.start, 0)


def sizes_for(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns those of the descending tile sizes that groups of at most `rows` rows need."""
    covering = [s for s in sizes if s >= rows]
    return tuple(s for s in sizes if s < rows or s == covering[-1]) if covering else sizes


def cut(group_sizes, sizes: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """Returns, for each tile size, the groups' first rows [e] and their numbers of tiles [e]."""
    row, left, tiles = jnp.cumsum(group_sizes) - group_sizes, group_sizes, []
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        # Rows that would take more than two of the next smaller tiles take one of these.
        count = left // size + (left % size > 2 * smaller)
        tiles.append((row, count))
        row, left = row + count * size, jnp.maximum(left - count * size, 0)
    return tiles


def walk(body: Callable, carry, weights: tuple, group_sizes, sizes: tuple[int, ...], rows: int):
    """Returns the carry after `carry = body(carry, tile)` for every tile, in no order that `body` may rely on.

    Args:
      body: of a carry and a `Tile`.
      carry: arrays of `rows` rows that tiles read and write.
      weights: each [e, d, f], or e arrays [d, f].
      group_sizes: [e] int32.
      sizes: of tiles, descending.
      rows: static, of all arrays that tiles touch; at least the largest size.
    """
    apart = isinstance(weights[0], tuple)
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)

    def at(e, row, end, size, product):
        return Tile(e, jnp.minimum(row, rows - size), row, end, size, product)

    if apart or rows < groups:
        products = _product_of_chosen if apart else _product_of_slice
        for size, (first, count) in zip(sizes, cut(group_sizes, sizes), strict=True):
            behind = jnp.cumsum(count)

            def tile(i, carry, size=size, first=first, count=count, behind=behind):
                e = jnp.minimum(jnp.sum(behind <= i), groups - 1)
                row = first[e] + (i - behind[e] + count[e]) * size
                return body(carry, at(e, row, ends[e], size, functools.partial(products, weights, e)))

            carry = lax.fori_loop(0, behind[-1], tile, carry)
        return carry

    def group(carry, given):
        e, end, cuts, matrices = given
        for size, (first, count) in zip(sizes, cuts, strict=True):

            def tile(i, carry, size=size, first=first):
                product = functools.partial(_product_of_matrix, matrices)
                return body(carry, at(e, first + i * size, end, size, product))

            carry = lax.fori_loop(0, count, tile, carry)
        return carry, None

    # The scan copies a group's matrices once for all of its tiles.
    return lax.scan(group, carry, (jnp.arange(groups), ends, cut(group_sizes, sizes), weights))[0]


def _product_of_matrix(matrices, i: int, x, transposed: bool = False):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, matrices[i], dims, preferred_element_type=accumulator(x))


def _product_of_slice(weights, e, i: int, x, transposed: bool = False):
    w = weights[i]
    _, d, f = w.shape
    pieces = _pieces(d, f * w.dtype.itemsize)
    if x.shape[0] > 8 or transposed or pieces == 1:
        return _product_of_matrix((w[e],), 0, x, transposed)

    # A few rows wait for the matrix: copied piece by piece, it never leaves the cache.
    def add(p, y):
        part = lax.dynamic_slice(w, (e, p * (d // pieces), 0), (1, d // pieces, f))[0]
        return y + _product_of_matrix((part,), 0, lax.dynamic_slice_in_dim(x, p * (d // pieces), d // pieces, 1))

    zero = jnp.zeros((x.shape[0], f), accumulator(x))
    return lax.fori_loop(0, pieces, add, vary_together_like(x, zero)[0])


def _pieces(d: int, row: int) -> int:
    """Returns into how many equal pieces of at least half a MiB a matrix of d rows of this many bytes is cut."""
    pieces = 1
    while d % (2 * pieces) == 0 and d * row // (2 * pieces) >= 2**19:
        pieces *= 2
    return pieces


def _product_of_chosen(weights, e, i: int, x, transposed: bool = False):
    # A branch multiplies with an argument of the program where it lies; a slice would be a copy.
    branches = [functools.partial(_product_of_matrix, (w,), 0, transposed=transposed) for w in weights[i]]
    return lax.switch(e, branches, x)


def padded(x, sizes: tuple[int, ...]):
    """Returns x with at least as many rows as the largest tile."""
    return jnp.pad(x, ((0, max(0, sizes[0] - x.shape[0])), *[(0, 0)] * (x.ndim - 1)))


def matmul(x, w, group_sizes, sizes: tuple[int, ...], transposed: bool = False):
    """Returns y [m, f] in the dtype of x [m, d]; the groups' matrices are [d, f], or [f, d] if `transposed`."""
    rows, sizes = x.shape[0], sizes_for(x.shape[0], sizes)
    xs = padded(x, sizes)
    width = w[0].shape[0 if transposed else 1]
    (out,) = vary_together_like(x, jnp.zeros((xs.shape[0], width), x.dtype))

    def body(out, tile):
        return tile.write(out, tile.product(0, tile.read(xs), transposed))

    return walk(body, out, (w,), group_sizes, sizes, xs.shape[0])[:rows]


def outer(x, dy, group_sizes, dtype, i: int, buckets: tuple[int, ...]):
    """Returns dw [e, d, f], each group's x.T @ dy, for x [m, d] and dy [m, f].

    Args:
      x, dy: rows in the order of their groups.
      group_sizes: [e] int32.
      dtype: of the result.
      i: unequal for results of one shape in a program: XLA makes equal first values of loops once, and copies them.
      buckets: ascending: a group is summed in one product over as many rows as the next of these, or by the last.
    """
    wide, rows = accumulator(x, dy), x.shape[0]
    buckets = tuple(b for b in buckets if b < rows) + tuple(b for b in buckets if b >= rows)[:1]
    largest = buckets[-1]
    last = max(rows, largest)
    xs, dys = padded(x, (largest,)), padded(dy, (largest,))
    shape = (x.shape[1], dy.shape[1])

    def part(row, end, size: int):
        first = jnp.minimum(row, last - size)
        at = first + jnp.arange(size)
        own = ((at >= row) & (at < end))[:, None]
        # Both are masked: a row of another group may hold what times 0 is NaN.
        a, b = (jnp.where(own, lax.dynamic_slice_in_dim(v, first, size), 0) for v in (xs, dys))
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def group(dw, given):
        e, size, end = given
        start = end - size

        def loop():
            def add(i, total):
                return total + part(start + i * largest, end, largest)

            zero = vary_together_like(xs, jnp.zeros(shape, wide))[0]
            return lax.fori_loop(0, -(-size // largest), add, zero)

        def one(bucket: int):
            return lambda: part(start, end, bucket)

        def none():
            return vary_together_like(xs, jnp.zeros(shape, wide))[0]

        which = jnp.sum(size > jnp.asarray([0, *buckets]))
        own = lax.switch(which, [none, *map(one, buckets), loop]).astype(dtype)
        return lax.dynamic_update_index_in_dim(dw, own, e, 0), None

    (dw,) = vary_together_like(x, jnp.full((group_sizes.size, *shape), i, dtype))
    return lax.scan(group, dw, (jnp.arange(group_sizes.size), group_sizes, jnp.cumsum(group_sizes)))[0]


def vary_together_like(x, *arrays):
    """Gives the arrays the varying axes of x inside a `shard_map`."""
    return vary_together(x, *arrays)[1:]

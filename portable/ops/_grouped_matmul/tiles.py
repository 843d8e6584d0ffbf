"""A walk over tiles of rows, each of one group: as many as the groups' sizes ask for, which only the device knows.

A group is cut into tiles of a few sizes, large ones first, so that little is computed for no row, and products have
shapes that are quick. A loop of a trip count known on the device runs over each size's tiles.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from portable.ops._arguments import accumulator, vary_together


class Tiling(NamedTuple):
    """How a device is served.

    Attributes:
      sizes: of tiles, descending.
      buckets: ascending: a group's gradient is summed in one product over as many rows as the next of these; a larger
        one by the last of them, and its rest by an eighth, a quarter, a half or the whole of that.
      batched: groups of at most so many rows on average, none of which has more than twice that, are padded to the same
        rows and summed in one batched product: where they are small, reading and writing dw is what takes the time.
      guarded: 16-bit matrices are picked inside a conditional: XLA:CPU multiplies such numbers in float32, and would
        otherwise convert all groups' matrices before the loop.
    """

    sizes: tuple[int, ...]
    buckets: tuple[int, ...]
    batched: int
    guarded: bool

    def for_rows(self, rows: int) -> "Tiling":
        """Returns the tiling with those sizes that groups of at most `rows` rows need."""
        covering = [s for s in self.sizes if s >= rows]
        return self._replace(sizes=tuple(s for s in self.sizes if s < rows or s == covering[-1])) if covering else self


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


def cut(group_sizes, sizes: tuple[int, ...]) -> list[tuple[Any, Any]]:
    """Returns, for each tile size, the groups' first rows [e] and their numbers of tiles [e]."""
    row, left, tiles = jnp.cumsum(group_sizes) - group_sizes, group_sizes, []
    for size, smaller in zip(sizes, [*sizes[1:], 0], strict=True):
        # Rows that would take more than two of the next smaller tiles take one of these.
        count = left // size + (left % size > 2 * smaller)
        tiles.append((row, count))
        row, left = row + count * size, jnp.maximum(left - count * size, 0)
    return tiles


def walk(body: Callable, carry, weights: tuple, group_sizes, tiling: Tiling, rows: int, choices: int):
    """Returns the carry after `carry = body(carry, tile)` for every tile, in no order that `body` may rely on.

    Args:
      body: of a carry and a `Tile`.
      carry: arrays of `rows` rows that tiles read and write.
      weights: each [e, d, f], or e arrays [d, f].
      group_sizes: [e] int32.
      tiling: of the device.
      rows: static, of all arrays that tiles touch; at least the largest size.
      choices: static, how many rows groups have together at most.
    """
    apart, sizes = isinstance(weights[0], tuple), tiling.sizes
    groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes)

    def at(e, row, end, size, product):
        return Tile(e, jnp.minimum(row, rows - size), row, end, size, product)

    if apart or choices < groups:
        products = _product_of_chosen if apart else _product_of_slice
        for size, (first, count) in zip(sizes, cut(group_sizes, sizes), strict=True):
            behind = jnp.cumsum(count)

            def tile(i, carry, size=size, first=first, count=count, behind=behind):
                e = jnp.minimum(jnp.sum(behind <= i), groups - 1)
                row = first[e] + (i - behind[e] + count[e]) * size
                return body(carry, at(e, row, ends[e], size, functools.partial(products, weights, e, tiling.guarded)))

            carry = lax.fori_loop(0, behind[-1], tile, carry)
        return carry

    cuts = cut(group_sizes, sizes)

    def group(i, carry):
        e = busy[i]
        # Copied once for all tiles of the group.
        product = functools.partial(_product_of_matrix, [_matrix(w, e, tiling.guarded) for w in weights])
        for size, (first, count) in zip(sizes, cuts, strict=True):

            def tile(i, carry, size=size, first=first):
                return body(carry, at(e, first[e] + i * size, ends[e], size, product))

            carry = lax.fori_loop(0, count[e], tile, carry)
        return carry

    busy = jnp.argsort(group_sizes == 0, stable=True)
    return lax.fori_loop(0, jnp.sum(group_sizes > 0), group, carry)


def _matrix(w, e, guarded: bool):
    return _picked(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), w, e, guarded)


def _picked(part: Callable, w, e, guarded: bool):
    """Returns part(w), of matrix e of w."""
    if not guarded or w.dtype.itemsize != 2:
        return part(w)
    of = jax.eval_shape(part, w)
    return lax.cond(e < w.shape[0], part, lambda w: vary_together_like(w, jnp.zeros(of.shape, of.dtype))[0], w)


def _product_of_matrix(matrices, i: int, x, transposed: bool = False):
    dims = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(x, matrices[i].astype(x.dtype), dims, preferred_element_type=accumulator(x))


def _product_of_slice(weights, e, guarded: bool, i: int, x, transposed: bool = False):
    w = weights[i]
    _, d, f = w.shape
    pieces = _pieces(d, f * w.dtype.itemsize)
    if x.shape[0] > 8 or transposed or pieces == 1:
        return _product_of_matrix((_matrix(w, e, guarded),), 0, x, transposed)

    # A few rows wait for the matrix: copied piece by piece, it never leaves the cache.
    def add(p, y):
        rows = p * (d // pieces)
        part = _picked(lambda w: lax.dynamic_slice(w, (e, rows, 0), (1, d // pieces, f))[0], w, e, guarded)
        return y + _product_of_matrix((part,), 0, lax.dynamic_slice_in_dim(x, p * (d // pieces), d // pieces, 1))

    zero = jnp.zeros((x.shape[0], f), accumulator(x))
    return lax.fori_loop(0, pieces, add, vary_together_like(x, zero)[0])


def _pieces(d: int, row: int) -> int:
    """Returns into how many equal pieces of at least half a MiB a matrix of d rows of this many bytes is cut."""
    pieces = 1
    while d % (2 * pieces) == 0 and d * row // (2 * pieces) >= 2**19:
        pieces *= 2
    return pieces


def _product_of_chosen(weights, e, guarded: bool, i: int, x, transposed: bool = False):
    del guarded  # a branch is a conditional
    # A branch multiplies with an argument of the program where it lies; a slice would be a copy.
    branches = [functools.partial(_product_of_matrix, (w,), 0, transposed=transposed) for w in weights[i]]
    return lax.switch(e, branches, x)


def padded(x, rows: int):
    """Returns x with at least so many rows."""
    return jnp.pad(x, ((0, max(0, rows - x.shape[0])), *[(0, 0)] * (x.ndim - 1)))


def matmul(x, w, group_sizes, tiling: Tiling, transposed: bool = False):
    """Returns y [m, f] in the dtype of x [m, d]; the groups' matrices are [d, f], or [f, d] if `transposed`."""
    rows, tiling = x.shape[0], tiling.for_rows(x.shape[0])
    xs = padded(x, tiling.sizes[0])
    width = w[0].shape[0 if transposed else 1]
    (out,) = vary_together_like(x, jnp.zeros((xs.shape[0], width), x.dtype))

    def body(out, tile):
        return tile.write(out, tile.product(0, tile.read(xs), transposed))

    return walk(body, out, (w,), group_sizes, tiling, xs.shape[0], rows)[:rows]


def outer(x, dy, group_sizes, dtype, i: int, tiling: Tiling):
    """Returns dw [e, d, f], each group's x.T @ dy, for x [m, d] and dy [m, f].

    Args:
      x, dy: rows in the order of their groups.
      group_sizes: [e] int32.
      dtype: of the result.
      i: unequal for results of one shape in a program: XLA makes equal first values of loops once, and copies them.
      tiling: of the device.
    """
    rows, groups = x.shape[0], group_sizes.size
    lengths = sorted({8 * math.ceil(share * rows / groups / 8) for share in (1.25, 1.5, 2.0)})
    walk = functools.partial(_outer_by_group, x, dy, group_sizes, dtype, i, tiling.buckets)
    if rows > tiling.batched * groups:
        return walk()
    alike = [functools.partial(_outer_of_alike, x, dy, group_sizes, dtype, n) for n in lengths]
    return lax.switch(jnp.sum(group_sizes.max() > jnp.asarray(lengths)), [*alike, walk])


def _outer_of_alike(x, dy, group_sizes, dtype, length: int):
    """Returns `outer` of groups of at most `length` rows."""
    end = jnp.cumsum(group_sizes)[:, None]
    at = end - group_sizes[:, None] + jnp.arange(length)
    own = (at < end)[..., None]
    a, b = (jnp.where(own, v[jnp.minimum(at, x.shape[0] - 1)], 0) for v in (x, dy))
    return jnp.einsum("ebd,ebf->edf", a, b, preferred_element_type=accumulator(x, dy)).astype(dtype)


def _outer_by_group(x, dy, group_sizes, dtype, i: int, buckets: tuple[int, ...]):
    """Returns `outer`, one group after the other."""
    wide, rows = accumulator(x, dy), x.shape[0]
    buckets = tuple(b for b in buckets if b < rows) + tuple(b for b in buckets if b >= rows)[:1]
    largest = buckets[-1]
    last = max(rows, largest)
    xs, dys = padded(x, largest), padded(dy, largest)
    zero = vary_together_like(xs, jnp.zeros((x.shape[1], dy.shape[1]), wide))[0]

    def product(a, b):
        return lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=wide)

    def part(row, end, size: int):
        first = jnp.minimum(row, last - size)
        at = first + jnp.arange(size)
        own = ((at >= row) & (at < end))[:, None]
        # Both are masked: a row of another group may hold what times 0 is NaN.
        return product(*(jnp.where(own, lax.dynamic_slice_in_dim(v, first, size), 0) for v in (xs, dys)))

    def group(dw, given):
        e, size, end = given
        start = end - size

        def one(bucket: int):
            return lambda: part(start, end, bucket)

        def several():
            def block(i):
                return product(*(lax.dynamic_slice_in_dim(v, start + i * largest, largest) for v in (xs, dys)))

            whole = size // largest
            total = lax.fori_loop(1, whole, lambda i, total: total + block(i), block(0))
            row, ends = start + whole * largest, [largest // 8, largest // 4, largest // 2, largest]
            rest = [lambda total, b=b: total + part(row, end, b) for b in ends]
            return lax.switch(jnp.sum(end - row > jnp.asarray([0, *ends])), [lambda total: total, *rest], total)

        which = jnp.sum(size > jnp.asarray([0, *buckets]))
        own = lax.switch(which, [lambda: zero, *map(one, buckets), several]).astype(dtype)
        return lax.dynamic_update_index_in_dim(dw, own, e, 0), None

    (dw,) = vary_together_like(x, jnp.full((group_sizes.size, *zero.shape), i, dtype))
    return lax.scan(group, dw, (jnp.arange(group_sizes.size), group_sizes, jnp.cumsum(group_sizes)))[0]


def vary_together_like(x, *arrays):
    """Gives the arrays the varying axes of x inside a `shard_map`."""
    return vary_together(x, *arrays)[1:]

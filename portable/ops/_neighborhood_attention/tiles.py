"""Cutting space into tiles of queries and the keys that they need, and adding up what tiles give back.

Letters: b batch, G dilation groups, g key heads, r query heads of a key head, n positions of a group on each axis,
M tiles, R rows of a tile (r times its queries), K keys of a tile.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portable.ops._neighborhood_attention.tables import Axis, Tiling, bounds

# Masks of up to so many bytes are constants of the program.
CONSTANT_BYTES = 1 << 20


def grouped(x, axes: Sequence[Axis]):
    """[b, *space, h, k] -> [b, G, h, n1, .., k]: groups and heads in front, groups padded to one length."""
    rank, (b, h, k) = len(axes), (x.shape[0], *x.shape[-2:])
    pad = [(0, a.size * a.dilation - a.length) for a in axes]
    x = jnp.pad(x, [(0, 0), *pad, (0, 0), (0, 0)])
    x = x.reshape(b, *(s for a in axes for s in (a.size, a.dilation)), h, k)
    groups, positions = range(2, 2 * rank + 2, 2), range(1, 2 * rank + 1, 2)
    x = x.transpose(0, *groups, 2 * rank + 1, *positions, 2 * rank + 2)
    return x.reshape(b, -1, h, *(a.size for a in axes), k)


def ungrouped(x, axes: Sequence[Axis]):
    """The inverse of `grouped`, also of one whose positions are padded further."""
    rank, (b, _, h, *_, k) = len(axes), x.shape
    x = x[(slice(None),) * 3 + tuple(slice(a.size) for a in axes)]
    x = x.reshape(b, *(a.dilation for a in axes), h, *(a.size for a in axes), k)
    pairs = [i for j in range(rank) for i in (rank + 2 + j, 1 + j)]
    x = x.transpose(0, *pairs, rank + 1, 2 * rank + 2)
    x = x.reshape(b, *(a.size * a.dilation for a in axes), h, k)
    return x[(slice(None), *(slice(a.length) for a in axes))]


class Cut:
    """How one axis is cut: `trips` steps of `taken` tiles, and where the keys of a step and of its tiles begin."""

    def __init__(self, tiles: Tiling, taken: int) -> None:
        self.tiles, self.taken = tiles, taken
        self.trips = -(-len(tiles.starts) // taken)
        starts = np.pad(np.array(tiles.starts), (0, self.trips * taken - len(tiles.starts)), mode="edge")
        starts = starts.reshape(self.trips, taken)
        self.span = int((starts.max(1) - starts.min(1)).max()) + tiles.width
        self.base = np.minimum(starts.min(1), tiles.axis.size - self.span)  # [trips]
        self.inner = starts - self.base[:, None]  # [trips, taken]
        self.starts = starts
        first, end = bounds(tiles.axis)
        pad = ((0, 0), (0, self.padded - tiles.axis.size))
        shape = (len(first), self.trips, taken, tiles.tile)
        self.first, self.end = (np.pad(x, pad, mode="edge").reshape(shape) for x in (first, end))
        # Steps differ in few ways, as those inside are alike: [kinds, G or 1, taken, tile, width].
        relative = np.stack([self.first, self.end], 1) - starts[None, None, :, :, None]
        relative = np.moveaxis(relative, 2, 0)
        found = np.unique(relative.reshape(self.trips, -1), axis=0, return_index=True, return_inverse=True)
        low, high = np.moveaxis(relative[found[1]], 2, 0)[..., None]
        self.kinds = (np.arange(tiles.width) >= low) & (np.arange(tiles.width) < high)
        self.kind = found[2].reshape(self.trips)

    @property
    def queries(self) -> int:
        """Queries in a step."""
        return self.taken * self.tiles.tile

    @property
    def padded(self) -> int:
        """Queries in all steps."""
        return self.trips * self.queries


def at(table: np.ndarray, step):
    """Returns table[step], as numbers where every step has the same."""
    if isinstance(step, int):
        return table[step]
    if (table == table[:1]).all():
        return table[0]
    return jnp.asarray(table if table.dtype == bool else table.astype(np.int32))[step]


def piece(x, start, size: int, axis: int):
    """Returns `size` positions of x from `start` on."""
    if size == x.shape[axis]:
        return x
    if isinstance(start, (int, np.integer)):
        return jax.lax.slice_in_dim(x, int(start), int(start) + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=axis)


def add_piece(x, update, start, axis: int):
    """Returns x with `update` added from `start` on."""
    if update.shape[axis] == x.shape[axis]:
        return x + update
    old = piece(x, start, update.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(x, old + update, start, axis=axis)


def queries(x, cuts: Sequence[Cut], steps, groups: int):
    """Returns a step's rows [b, G, g, M, R, k] of x [b, G, h, n1, .., k], padded to whole steps."""
    for i, (cut, step) in enumerate(zip(cuts, steps, strict=True)):
        x = piece(x, step * cut.queries, cut.queries, 3 + i)
    (b, G, h, *_, k), rank = x.shape, len(cuts)
    x = x.reshape(b, G, groups, h // groups, *(s for c in cuts for s in (c.taken, c.tiles.tile)), k)
    outer, inner = range(4, 4 + 2 * rank, 2), range(5, 5 + 2 * rank, 2)
    x = x.transpose(0, 1, 2, *outer, 3, *inner, 4 + 2 * rank)
    return x.reshape(b, G, groups, math.prod(c.taken for c in cuts), -1, k)


def unqueries(x, cuts: Sequence[Cut], h: int):
    """The inverse of `queries`, for one step: [b, G, g, M, R, k] -> [b, G, h, n1, .., k]."""
    (b, G, g, _, _, k), rank = x.shape, len(cuts)
    x = x.reshape(b, G, g, *(c.taken for c in cuts), h // g, *(c.tiles.tile for c in cuts), k)
    pairs = [i for j in range(rank) for i in (3 + j, 4 + rank + j)]
    x = x.transpose(0, 1, 2, 3 + rank, *pairs, 4 + 2 * rank)
    return x.reshape(b, G, h, *(c.queries for c in cuts), k)


def keys(x, cuts: Sequence[Cut], steps):
    """Returns the keys of a step's tiles [b, G, g, M, K, k] of x [b, G, g, n1, .., k]."""
    for i, (cut, step) in enumerate(zip(cuts, steps, strict=True)):
        x = piece(x, at(cut.base, step), cut.span, 3 + i)
    for i, (cut, step) in enumerate(zip(cuts, steps, strict=True)):
        inner, axis = at(cut.inner, step), 3 + 2 * i  # i axes of tiles stand in front of the positions
        x = jnp.stack([piece(x, inner[j], cut.tiles.width, axis) for j in range(cut.taken)], 3 + i)
    return x.reshape(*x.shape[:3], math.prod(c.taken for c in cuts), -1, x.shape[-1])


def add_keys(total, x, cuts: Sequence[Cut], steps):
    """Adds [b, G, g, M, K, k], what tiles give back to their keys, to a total [b, G, g, n1, .., k]."""
    rank = len(cuts)
    x = x.reshape(*x.shape[:3], *(c.taken for c in cuts), *(c.tiles.width for c in cuts), x.shape[-1])
    for i in reversed(range(rank)):
        inner, axis = at(cuts[i].inner, steps[i]), 3 + i + i  # of the positions, once the tiles' axis is gone
        shape = list(jax.lax.index_in_dim(x, 0, 3 + i, keepdims=False).shape)
        shape[axis] = cuts[i].span
        slab = jnp.zeros(shape, x.dtype)
        for j in range(cuts[i].taken):
            slab = add_piece(slab, jax.lax.index_in_dim(x, j, 3 + i, keepdims=False), inner[j], axis)
        x = slab
    starts = [0, 0, 0, *(at(c.base, s) for c, s in zip(cuts, steps, strict=True)), 0]
    if x.shape == total.shape:
        return total + x
    starts = [jnp.asarray(s, jnp.int32) for s in starts]
    old = jax.lax.dynamic_slice(total, starts, x.shape)
    return jax.lax.dynamic_update_slice(total, old + x, starts)


def mask(cuts: Sequence[Cut], steps, rows: int, dtype, *, flip: bool):
    """Returns 0 for the keys of its tile that a row sees, else -inf: [1, G or 1, 1, M, R, K]; None where all see all.

    `rows` is r, the query heads in a row's place. With `flip` keys stand before rows. Where few kinds of steps have
    small tiles what is seen is a constant, and a step picks one: comparisons made in a step would be worked into each
    pass over the scores.
    """
    if not any(c.tiles.masked for c in cuts):
        return None
    sizes = [c.kinds.size // len(c.kinds) for c in cuts]
    if math.prod(len(c.kinds) for c in cuts) * math.prod(sizes) * rows <= CONSTANT_BYTES:
        table = np.stack([_mask(kinds, cuts, rows, flip) for kinds in itertools.product(*(c.kinds for c in cuts))])
        kind = 0
        for cut, step in zip(cuts, steps, strict=True):
            kind = kind * len(cut.kinds) + at(cut.kind, step)
        seen = jnp.asarray(table[kind]) if isinstance(kind, (int, np.integer)) else jnp.asarray(table)[kind]
    else:
        seen = _mask([at(c.kinds[c.kind], step) for c, step in zip(cuts, steps, strict=True)], cuts, rows, flip)
    return jnp.where(seen, 0, -jnp.inf).astype(dtype)


def _mask(sees: Sequence, cuts: Sequence[Cut], rows: int, flip: bool):
    """Returns what is seen on all axes [1, G or 1, 1, M, R, K], of [G or 1, taken, tile, width] on each axis."""
    rank = len(cuts)

    def spread(i, one):  # the axes' own dimensions apart: groups, then tiles, queries, keys
        shape = [1] * (4 * rank)
        shape[i::rank] = one.shape
        return one.reshape(shape)

    seen: Any = functools.reduce(operator.and_, (spread(i, one) for i, one in enumerate(sees)))
    xp: Any = np if isinstance(seen, np.ndarray) else jnp
    if math.prod(seen.shape[:rank]) > 1:
        seen = xp.broadcast_to(seen, (*(c.tiles.axis.dilation for c in cuts), *seen.shape[rank:]))
    groups, M, Q, K = (math.prod(seen.shape[i * rank : (i + 1) * rank]) for i in range(4))
    seen = xp.broadcast_to(seen.reshape(1, groups, 1, M, 1, Q, K), (1, groups, 1, M, rows, Q, K))
    seen = seen.reshape(1, groups, 1, M, rows * Q, K)
    return xp.swapaxes(seen, -1, -2) if flip else seen


def bias_tables(cut: Cut, step) -> jax.Array:
    """Returns 1 where a pair of a tile has an offset, [taken, tile * width, 2 * window - 1] float32."""
    tile, width, window = cut.tiles.tile, cut.tiles.width, cut.tiles.axis.window
    p = (np.arange(cut.padded)).reshape(cut.trips, cut.taken, tile)
    offset = cut.starts[..., None, None] + np.arange(width) - p[..., None] + window - 1
    offset = jnp.asarray(at(offset.reshape(cut.trips, cut.taken, tile * width), step))
    return (offset[..., None] == np.arange(2 * window - 1)).astype(jnp.float32)

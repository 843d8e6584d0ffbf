"""Space in the order of tiles, so that a tile is a run of rows; which tiles of keys a tile of queries needs.

A tile of queries is a block of `multiple` tiles of keys, whose rows follow one another: one order serves both. Every
dilation group is a space of its own and joins the batch. Letters: b batch, G dilation groups, h heads, T tiles of
queries of R rows, S tiles of keys of C rows.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from portable.ops._neighborhood_attention.tables import Axis, bounds

# The place of a key that nobody sees: it lies in no interval.
NOWHERE = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Side:
    """One axis: tiles of `tile` keys, of which `multiple` make a tile of queries."""

    axis: Axis
    tile: int
    multiple: int = 1

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return self.tile * self.multiple

    @property
    def count(self) -> int:
        """Tiles of queries of a dilation group."""
        return -(-self.axis.size // self.queries)

    @property
    def padded(self) -> int:
        """Positions of a dilation group in whole tiles."""
        return self.count * self.queries


class Pairs(NamedTuple):
    """Pairs of tiles with something to see, sorted by queries; those that all see come last.

    `full` says that each query of the one sees each key of the other.
    """

    queries: np.ndarray
    keys: np.ndarray
    full: np.ndarray


def rows(sides: Sequence[Side]) -> tuple[int, int]:
    """Returns R and C, the rows of a tile of queries and of one of keys."""
    return math.prod(s.queries for s in sides), math.prod(s.tile for s in sides)


def groups(sides: Sequence[Side]) -> int:
    """Returns G, the number of dilation groups."""
    return math.prod(s.axis.dilation for s in sides)


def to_tiles(x, sides: Sequence[Side]):
    """[b, *space, ...] -> [b * G, tokens, ...]: groups in the batch, positions in the order of tiles, padded by 0."""
    rank, rest = len(sides), x.shape[len(sides) + 1 :]
    pad = [(0, s.padded * s.axis.dilation - s.axis.length) for s in sides]
    x = jnp.pad(x, [(0, 0), *pad, *[(0, 0)] * len(rest)])
    x = x.reshape(x.shape[0], *(n for s in sides for n in (s.count, s.multiple, s.tile, s.axis.dilation)), *rest)
    order = [1 + 4 * i + part for part in (3, 0, 1, 2) for i in range(rank)]
    x = x.transpose(0, *order, *range(1 + 4 * rank, x.ndim))
    return x.reshape(x.shape[0] * groups(sides), -1, *rest)


def from_tiles(x, sides: Sequence[Side]):
    """The inverse of `to_tiles`."""
    rank, rest = len(sides), x.shape[2:]
    parts = [[getattr(s, name) for s in sides] for name in ("count", "multiple", "tile")]
    x = x.reshape(-1, *(s.axis.dilation for s in sides), *itertools.chain(*parts), *rest)
    order = [1 + part * rank + i for i in range(rank) for part in (1, 2, 3, 0)]
    x = x.transpose(0, *order, *range(1 + 4 * rank, x.ndim))
    x = x.reshape(x.shape[0], *(s.padded * s.axis.dilation for s in sides), *rest)
    return x[(slice(None), *(slice(s.axis.length) for s in sides))]


@functools.lru_cache(maxsize=4096)
def _touched(side: Side) -> tuple[np.ndarray, ...]:
    """Returns of each tile of queries the first and end of the tiles of keys it needs, and of those it sees whole."""
    first, end = (np.pad(x, ((0, 0), (0, side.padded - side.axis.size)), mode="edge") for x in bounds(side.axis))
    first, end = (x.reshape(len(x), side.count, side.queries) for x in (first, end))
    low, high = first.min((0, 2)) // side.tile, -(-end.max((0, 2)) // side.tile)
    inner, outer = -(-first.max((0, 2)) // side.tile), end.min((0, 2)) // side.tile
    return low, high, inner, np.maximum(inner, outer)


class Count(NamedTuple):
    """Pairs of tiles of an axis: all, and those that see all of each other."""

    pairs: int
    full: int


def count(side: Side) -> Count:
    """Counts what `pairs` lists."""
    low, high, inner, outer = _touched(side)
    return Count(int((high - low).sum()), int((outer - inner).sum()))


def pairs(sides: Sequence[Side]) -> Pairs:
    """Lists the pairs of tiles of the whole space, for every dilation group the same ones."""
    own, block, inner, full = (np.zeros(1, np.int64) for _ in range(4))
    full = full == 0
    for side in sides:
        low, high, first, end = _touched(side)
        one = np.repeat(np.arange(side.count), high - low)
        key = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)])
        whole = (key >= first[one]) & (key < end[one])
        own = np.add.outer(own * side.count, one).ravel()
        block = np.add.outer(block * side.count, key // side.multiple).ravel()
        inner = np.add.outer(inner * side.multiple, key % side.multiple).ravel()
        full = np.logical_and.outer(full, whole).ravel()
    keys = block * math.prod(s.multiple for s in sides) + inner
    order = np.lexsort((keys, full, own))
    return Pairs(*(x[order].astype(t) for x, t in ((own, np.int32), (keys, np.int32), (full, bool))))


def intervals(sides: Sequence[Side]) -> jax.Array:
    """Returns what each query sees: [G or 1, T, 2 * rank, R] int32, the axes' first positions, then their ends."""
    found = [_spread(x, i, sides) for part in (0, 1) for i, s in enumerate(sides) for x in [bounds(s.axis)[part]]]
    return _rows(jnp.broadcast_arrays(*found), sides, rows(sides)[0])


def places(sides: Sequence[Side]) -> jax.Array:
    """Returns where each key is: [1, S, rank, C] int32, its positions in its dilation group."""
    found = [_spread(np.arange(s.padded)[None], i, sides) for i, s in enumerate(sides)]
    return _rows(jnp.broadcast_arrays(*found), sides, rows(sides)[1])


def _spread(x: np.ndarray, i: int, sides: Sequence[Side]) -> jax.Array:
    """Lays numbers of axis i, [groups or 1, positions], along its dimensions of (groups.., counts.., .., tiles..)."""
    rank, side = len(sides), sides[i]
    x = np.pad(x, ((0, 0), (0, side.padded - x.shape[1])), mode="edge").astype(np.int32)
    shape = [1] * (4 * rank)
    shape[i::rank] = [len(x), side.count, side.multiple, side.tile]
    return jnp.asarray(x.reshape(shape))


def _rows(found: Sequence[jax.Array], sides: Sequence[Side], size: int) -> jax.Array:
    rank = len(sides)
    several = groups(sides) if math.prod(found[0].shape[:rank]) > 1 else 1
    if several > 1:
        shape = (*(s.axis.dilation for s in sides), *found[0].shape[rank:])
        found = [jnp.broadcast_to(x, shape) for x in found]
    return jnp.stack([x.reshape(several, -1, size) for x in found], axis=2)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What suits a kernel; costs are in pairs of a query and a key.

    Attributes:
      keys: least and most rows of a tile of keys.
      queries: most rows of a tile of queries, all heads that share its keys counted.
      fetch: what fetching a key costs.
      visit: what a tile of keys costs beside its rows.
      mask: what a masked pair costs more than one that is not.
    """

    keys: tuple[int, int]
    queries: int
    fetch: int
    visit: int
    mask: float


@functools.lru_cache(maxsize=512)
def choose(axes: tuple[Axis, ...], shared: int, costs: Costs) -> tuple[Side, ...]:
    """Returns the cheapest tiles: sides are powers of two, `shared` query heads read the same keys."""
    sizes = [[1 << i for i in range(max(1, (a.size - 1).bit_length() + 1))] for a in axes]
    least = min(costs.keys[0], math.prod(s[-1] for s in sizes))  # a small space is one tile, filled up
    best = None
    for tile in itertools.product(*sizes):
        if not least <= math.prod(tile) <= costs.keys[1]:
            continue
        for several in itertools.product((1, 2, 4, 8), repeat=len(axes)):
            queries = shared * math.prod(tile) * math.prod(several)
            if math.prod(several) > 1 and queries > costs.queries:
                continue
            sides = tuple(map(Side, axes, tile, several))
            every, full = (math.prod(n) for n in zip(*map(count, sides), strict=True))
            keys = math.prod(tile)
            each = queries * keys * (1 + costs.mask * (1 - full / max(1, every))) + keys * costs.fetch + costs.visit
            if best is None or every * each < best[0]:
                best = (every * each, sides)
    assert best is not None
    if math.prod(s.tile for s in best[1]) < costs.keys[0]:  # the last axis takes what the rest leaves
        *rest, last = best[1]
        return (*rest, Side(last.axis, costs.keys[0] // math.prod(s.tile for s in rest)))
    return best[1]

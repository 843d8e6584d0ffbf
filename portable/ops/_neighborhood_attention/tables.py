"""Static tables of an axis: what each query sees, which keys a tile of queries needs, which tile to take.

All of it is numpy, at trace time, and of the size of an axis; nothing has the size of all pairs.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Axis:
    """One axis of space and what a query sees on it."""

    length: int
    window: int
    stride: int
    dilation: int
    causal: bool

    @property
    def size(self) -> int:
        """Positions in the longest dilation group; shorter groups are padded to it."""
        return -(-self.length // self.dilation)


def axes(space, window, stride, dilation, is_causal) -> tuple[Axis, ...]:
    """Returns the axes of a call with these options."""
    return tuple(map(Axis, space, window, stride, dilation, is_causal))


@functools.lru_cache(maxsize=512)
def bounds(axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Returns first and end [groups, size] of the keys that the queries of a dilation group see, counted inside it.

    One row serves all groups where they are equally long. Padding repeats its group's last query.
    """
    w, s, d = axis.window, axis.stride, axis.dilation
    groups = [len(range(g, axis.length, d)) for g in range(d)]
    first, end = [], []
    for n in groups if len(set(groups)) > 1 else groups[:1]:
        p = np.minimum(np.arange(axis.size), max(n - 1, 0))
        if axis.causal:
            leader = np.minimum(p // s * s + s - 1, max(n - 1, 0))
            first.append(np.maximum(leader - w + 1, 0))
            end.append(np.minimum(p + 1, n))
        else:
            leader = np.minimum(p // s * s + s // 2, max(n - 1, 0))
            first.append(np.clip(leader - w // 2, 0, max(n - w, 0)))
            end.append(np.minimum(first[-1] + w, n))
    return np.stack(first), np.stack(end)


@dataclasses.dataclass(frozen=True)
class Tiling:
    """An axis cut into tiles of `tile` queries, each with `width` keys from `starts` on.

    `masked` is False where every query of every tile sees all of its tile's keys.
    """

    axis: Axis
    tile: int
    width: int
    starts: tuple[int, ...]
    masked: bool


@functools.lru_cache(maxsize=4096)
def tiling(axis: Axis, tile: int) -> Tiling:
    """Returns the tiles of an axis: as many keys for each as the neediest has, inside the axis."""
    first, end = (np.pad(x, ((0, 0), (0, -axis.size % tile)), mode="edge") for x in bounds(axis))
    first, end = (x.reshape(len(x), -1, tile) for x in (first, end))
    low, high = first.min((0, 2)), end.max((0, 2))
    width = int((high - low).max())
    starts = np.minimum(low, axis.size - width)
    masked = bool((first != starts[:, None]).any() or (end != starts[:, None] + width).any())
    return Tiling(axis, tile, width, tuple(starts.tolist()), masked)


@dataclasses.dataclass(frozen=True)
class Setting:
    """What suits a platform.

    Attributes:
      rows: what the keys of a tile cost beside the products, in rows of queries: their copies.
      mask: what a masked score costs, relative to one that is not.
      tile: bytes that a tile of one key head may hold, as far as there is a choice.
      budget: bytes that one step of the loop over tiles may hold; a step has at least one tile.
      unroll: most tiles of an axis in one step.
    """

    rows: int
    mask: float
    tile: int
    budget: int
    unroll: int


def candidates(axis: Axis) -> list[int]:
    """Returns tiles worth trying: powers of two, divisors of the axis, multiples of the stride."""
    n = axis.size
    tiles = {1 << i for i in range(11)} | {axis.stride << i for i in range(4)} | {n}
    tiles |= {i for i in range(2, 65) if n % i == 0}
    return sorted(t for t in tiles if t <= min(n, 1024))


@functools.lru_cache(maxsize=512)
def choose(axes: tuple[Axis, ...], rows: int, key: int, pair: int, setting: Setting) -> tuple[Tiling, ...]:
    """Returns the cheapest tiling of each axis: few products on pairs that nobody sees, few copies of keys.

    Args:
      axes: of space.
      rows: query heads that share keys.
      key, pair: bytes of a tile's key, and of its pair of a query and a key, for one key head.
      setting: of the platform.
    """
    options = []
    for axis in axes:
        found = [tiling(axis, t) for t in candidates(axis)]
        options.append(sorted(found, key=lambda t: len(t.starts) * t.width * t.tile)[:24])

    def cost(tiles: Sequence[Tiling]) -> float:
        keys = math.prod(len(t.starts) * t.width for t in tiles)
        queries = math.prod(t.tile for t in tiles)
        masked = setting.mask if any(t.masked for t in tiles) else 1.0
        held = math.prod(t.width for t in tiles) * (key + pair * queries)
        return keys * (rows * queries * masked + setting.rows) * max(1, held / setting.tile) ** 2

    return min(itertools.product(*options), key=cost)


def steps(tiles: Sequence[Tiling], each: int, setting: Setting) -> tuple[int, ...]:
    """Returns how many tiles of each axis are taken in one step of the loop, within the budget of bytes.

    Args:
      tiles: of each axis.
      each: bytes that one tile holds.
      setting: of the platform.
    """
    taken = [_share(len(t.starts), setting.unroll) for t in tiles]
    for i, t in enumerate(tiles):
        rest = math.prod(taken) // taken[i] * each
        taken[i] = _share(len(t.starts), min(taken[i], max(1, setting.budget // max(1, rest))))
    return tuple(taken)


def _share(count: int, most: int) -> int:
    """Returns the largest number up to `most` in whose multiples `count` tiles fit with 3 % of padding at most."""
    return next(m for m in range(min(count, most), 0, -1) if -(-count // m) * m <= 1.03 * count or m == 1)

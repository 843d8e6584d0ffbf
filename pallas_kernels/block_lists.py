"""Which blocks meet which: the lists that kernels of attention over selected blocks walk along.

A list belongs to one side: for each of its blocks ("own") the blocks of the other side that it meets. The forward and
the queries' gradients go by query blocks, the keys' gradients by key blocks. Lists are known when a program is traced
(numpy), or are made from a table at run time.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# What a step of `Steps` is: bits of its kind.
FIRST, LAST, MASKED, FULL = 1, 2, 4, 8


class Ranges(NamedTuple):
    """A list for programs of one own block each, all arrays int32 with the leading axes [rows, heads], 1 where shared.

    Block i meets `other[start[i] : stop[i]]`, and from `middle[i]` on sees all of them.
    """

    start: Any
    middle: Any
    stop: Any
    other: Any


class Steps(NamedTuple):
    """A list for a grid that walks along all own blocks, `fan` blocks a step; leading axes as of `Ranges`.

    own [s]: of each step. other [s, fan]: what it meets; ~i stands for a block i that is read and not looked at.
    kind [s]: FIRST and LAST of its own block, MASKED or FULL where there is something to compute.
    """

    own: Any
    other: Any
    kind: Any


def known(own: np.ndarray, other: np.ndarray, full: np.ndarray, count: int) -> Ranges:
    """Returns the list of `count` own blocks from pairs in any order."""
    order = np.lexsort((other, full, own))
    own, other, full = own[order], other[order], full[order]
    start, stop = (np.searchsorted(own, np.arange(count), side) for side in ("left", "right"))
    middle = stop - np.bincount(own[full], minlength=count)
    return Ranges(*(x.astype(np.int32)[None, None] for x in (start, middle, stop, other)))


def selected(table, *, by_keys: int | None = None) -> Ranges:
    """Returns the list of a table [rows, heads, own, n] of key blocks, -1 where there is none, in any order.

    A block that a row names twice counts once.

    Args:
      table: int32, an array of a running program.
      by_keys: the number of key blocks, for the keys' list; the queries' unless given.
    """
    table = jnp.sort(table, axis=-1)
    twice = jnp.pad(table[..., 1:] == table[..., :-1], [(0, 0)] * (table.ndim - 1) + [(1, 0)])
    none = jnp.iinfo(jnp.int32).max
    table = jnp.where(twice | (table < 0), none, table)
    *lead, count, n = table.shape
    if by_keys is None:
        start = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32) * n, (*lead, count))
        stop = start + (table != none).sum(-1, dtype=jnp.int32)
        other = jnp.sort(table, axis=-1).reshape(*lead, -1)
        return Ranges(start, stop, stop, jnp.where(other == none, 0, other))
    flat = table.reshape(*lead, -1)
    order = jnp.argsort(flat, axis=-1, stable=True)
    hits = jnp.zeros((*lead, by_keys + 1), jnp.int32)
    rows, heads = (jnp.arange(size).reshape(shape) for size, shape in ((lead[0], (-1, 1, 1)), (lead[1], (-1, 1))))
    hits = hits.at[rows, heads, jnp.minimum(flat, by_keys)].add(1)[..., :by_keys]
    stop = jnp.cumsum(hits, axis=-1, dtype=jnp.int32)
    return Ranges(stop - hits, stop, stop, (order // n).astype(jnp.int32))


def steps(ranges: Ranges, fan: int, most: int | None = None) -> Steps:
    """Returns a list as steps of `fan` blocks; an own block that meets none has a step without work.

    Args:
      ranges: the list.
      fan: blocks a step.
      most: steps that there may be, for lists made at run time: by queries (own blocks) * ceil(n / fan), in general
        own blocks + pairs // fan. Steps that are left over have no work.
    """
    xp: Any = np if isinstance(ranges.other, np.ndarray) else jnp
    length = ranges.stop - ranges.start
    count = length.shape[-1]
    each = xp.maximum(1, -(-length // fan))
    ends = xp.cumsum(each, axis=-1)
    total = int(ends.max()) if most is None else most
    j = xp.arange(total)
    own = _find(ends, j)
    spare, own = own >= count, xp.minimum(own, count - 1)
    at = lambda x: xp.take_along_axis(x, own, axis=-1)  # noqa: E731
    step = j - at(ends - each)
    entry = at(ranges.start)[..., None] + step[..., None] * fan + xp.arange(fan)
    there = (entry < at(ranges.stop)[..., None]) & ~spare[..., None]
    size = max(1, ranges.other.shape[-1])
    other = ranges.other if ranges.other.shape[-1] else xp.zeros((*own.shape[:2], 1), xp.int32)
    # What is read in vain is what stood there a step before: a pipeline does not fetch it again.
    before = xp.where((step > 0)[..., None], entry - fan, entry)
    shown = xp.where(there, entry, xp.clip(xp.minimum(before, at(ranges.stop)[..., None] - 1), 0, size - 1))
    found = xp.take_along_axis(other, shown.reshape(*own.shape[:2], -1), axis=-1).reshape(entry.shape)
    whole = (there & (entry >= at(ranges.middle)[..., None])).all(-1)
    work = xp.where(whole, FULL, xp.where(there.any(-1), MASKED, 0))
    kind = work + FIRST * (step == 0) + LAST * ((step == at(each) - 1) & ~spare)
    kind = xp.where(spare, 0, kind)
    arrays = (own, xp.where(there, found, ~found), kind)
    return Steps(*(x.astype(np.int32) for x in arrays))


def _find(ends, j):
    """Returns the own block of each step, from the ends [rows, heads, count] of their runs."""
    if isinstance(ends, np.ndarray):
        return np.searchsorted(ends[0, 0], j, "right")[None, None]
    search = jnp.vectorize(lambda e: jnp.searchsorted(e, j, side="right"), signature="(n)->(s)")
    return search(ends)


def best_fan(ranges: Ranges, most: int, visit: float) -> int:
    """Returns the fan, up to `most`, that makes a known list cheapest, where a step costs `visit` blocks more."""
    length = (ranges.stop - ranges.start).ravel()
    return min(range(1, most + 1), key=lambda fan: int(np.maximum(1, -(-length // fan)).sum()) * (fan + visit))

"""Blocks of rows, each of one group, for kernels: as many as there could be, and on the device those that there are.

Rows are in the order of their groups. A kernel either reads a block's rows where they lie (`row`, `end`), or in an
array in which every block has all of its `size` rows (`rows`, `place`), so that each group starts at a multiple of it.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp


class Blocks(NamedTuple):
    """Attributes:
    size: rows of a block.
    group: [n] int32, the group of each block; e, the number of groups, is that of the rows behind the last one.
    row: [n] int32, its first row. end: [n] int32, behind its last one, at most row + size.
    count: [1] int32, how many blocks there are; those behind it repeat the last.
    place: [m] int32, where each row lies in an array of n * size rows.
    """

    size: int
    group: Any
    row: Any
    end: Any
    count: Any
    place: Any

    @property
    def rows(self):
        """The row [n * size] at each place; a place that no row has names some other."""
        at = self.row[:, None] + jnp.arange(self.size, dtype=jnp.int32)
        return jnp.minimum(at, self.place.size - 1).reshape(-1)


def number(rows: int, groups: int, size: int) -> int:
    """Returns how many blocks any sizes of this many groups can need."""
    return (rows + min(groups, rows) * (size - 1)) // size


def make(group_sizes, rows: int, size: int, *, rest: bool = False) -> Blocks:
    """Returns the blocks of groups of these sizes [e] among `rows` >= 1 rows; `rest` has blocks of the others too."""
    sizes = group_sizes.astype(jnp.int32)
    if rest:
        sizes = jnp.append(sizes, rows - sizes.sum())
    groups = sizes.size
    ends, blocks = jnp.cumsum(sizes), -(-sizes // size)
    starts, behind = ends - sizes, jnp.cumsum(blocks)
    count = behind[-1:]
    block = jnp.minimum(jnp.arange(number(rows, groups, size), dtype=jnp.int32), jnp.maximum(count - 1, 0))
    # Comparisons with every group are one pass; a binary search is a loop.
    group = jnp.minimum(jnp.sum(behind <= block[:, None], axis=1, dtype=jnp.int32), groups - 1)
    row = starts[group] + (block - behind[group] + blocks[group]) * size
    at = jnp.arange(rows, dtype=jnp.int32)
    own = jnp.minimum(jnp.sum(ends <= at[:, None], axis=1, dtype=jnp.int32), groups - 1)
    place = (behind - blocks)[own] * size + at - starts[own]
    place = jnp.minimum(place, block.size * size - 1)  # of rows of no group
    return Blocks(size, group, row, jnp.minimum(row + size, ends[group]), count, place)

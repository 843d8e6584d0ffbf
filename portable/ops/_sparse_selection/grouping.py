"""Groups of tokens (clusters) laid out in blocks, and lists of groups as lists of what they hold."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from portable.checks import check_values
from portable.ops._arguments import check_array, check_integer, check_shape


class Layout(NamedTuple):
    """Groups of unequal size, each from a block of its own.

    Attributes:
      slots: [*rows, n] of each item.
      owner: [*rows, blocks] the group of each block; -1 where there is none.
      first: [*rows, groups] the first block of each group.
      blocks: [*rows, groups] how many it has, 0 if it is empty.
      size: slots there are, a multiple of the block.
    """

    slots: Any
    owner: Any
    first: Any
    blocks: Any
    size: int


def ranks(ids, groups: int):
    """Returns (order, rank in its group of each item, items of each group) for ids [*rows, n] from 0 to groups - 1."""
    n = ids.shape[-1]
    order = jnp.argsort(ids, axis=-1, stable=True).astype(jnp.int32)
    counts = (jnp.zeros((*ids.shape[:-1], groups), jnp.int32)).reshape(-1, groups)
    flat = ids.reshape(-1, n)
    counts = counts.at[jnp.arange(flat.shape[0])[:, None], flat].add(1).reshape(*ids.shape[:-1], groups)
    begin = jnp.cumsum(counts, -1) - counts
    place = jnp.argsort(order, axis=-1).astype(jnp.int32)
    return order, place - jnp.take_along_axis(begin, ids, -1), counts


def by_group(ids, groups: int, block: int) -> Layout:
    """Returns the layout of items with the groups `ids` [*rows, n], whose order inside a group stays."""
    n = ids.shape[-1]
    _, rank, counts = ranks(ids, groups)
    blocks = -(-counts // block)
    ends = jnp.cumsum(blocks, -1)
    first = ends - blocks
    slots = jnp.take_along_axis(first, ids, -1) * block + rank
    room = (n + min(n, groups) * (block - 1)) // block
    number = jnp.arange(room, dtype=jnp.int32)
    search = lambda e: jnp.searchsorted(e, number, side="right")  # noqa: E731
    owner = jax.vmap(search)(ends.reshape(-1, groups)).reshape(*ids.shape[:-1], room).astype(jnp.int32)
    owner = jnp.where(number < ends[..., -1:], owner, -1)
    return Layout(slots, owner, first, blocks, room * block)


def held_by(chosen, first, count, budget: int, *, complete: bool):
    """Returns what the chosen groups hold, one group behind the other, and which of them are in it.

    Args:
      chosen: [*rows, n] groups, the best first; -1 for none.
      first, count: [*rows, groups] (broadcast), the number of a group's first unit, and how many it has.
      budget: units at most.
      complete: whether a group that does not fit is left out with all behind it; else its first units are taken.

    Returns:
      ([*rows, budget] int32 units, -1 behind the last; [*rows, n] booleans).
    """
    rows, n = chosen.shape[:-1], chosen.shape[-1]
    at = jnp.maximum(chosen, 0)
    size = jnp.where(chosen >= 0, jnp.take_along_axis(count, at, -1), 0)
    ends = jnp.cumsum(size, -1)
    taken = (chosen >= 0) & ((ends if complete else ends - size + 1) <= budget)
    total = jnp.where(taken, jnp.minimum(ends, budget), 0).max(-1, keepdims=True, initial=0)
    unit = jnp.arange(budget, dtype=jnp.int32)
    search = lambda e: jnp.searchsorted(e, unit, side="right")  # noqa: E731
    which = jax.vmap(search)(ends.reshape(-1, n)).reshape(*rows, budget) if n else jnp.zeros((*rows, budget), int)
    which = jnp.minimum(which, max(0, n - 1)).astype(jnp.int32)
    start = jnp.take_along_axis(first, at, -1) - (ends - size)
    found = jnp.take_along_axis(start, which, -1) + unit
    return jnp.where(unit < total, found, -1).astype(jnp.int32), taken


def check_permutation(op: str, name: str, order, letters: str, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `order` is [*letters] and, where it is concrete, a permutation along the last axis."""
    check_array(op, **{name: order})
    check_shape(op, name, order, letters, sizes)
    check_integer(op, **{name: order})
    n = order.shape[-1]
    check_values(
        lambda x: (np.sort(x, -1) if isinstance(x, np.ndarray) else jnp.sort(x, -1)) == np.arange(n),
        f"{op}: {name} must be a permutation of 0 to {n - 1} in every row; got one that lacks some of them.",
        order,
    )

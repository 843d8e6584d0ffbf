"""Which pairs of blocks of queries and keys see each other, known before the program runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Axis:
    """`length` positions in `count` blocks of `size`, the last one filled up."""

    length: int
    count: int
    size: int

    def split(self, x, axis: int = 1, fill: float = 0):
        """[..., length, ...] -> [count, ..., size, ...], filled up with `fill`."""
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, self.count * self.size - self.length)
        x = jnp.pad(x, widths, constant_values=fill) if widths[axis][1] else x
        return jnp.moveaxis(x.reshape(*x.shape[:axis], self.count, self.size, *x.shape[axis + 1 :]), axis, 0)

    def join(self, x, axis: int = 1):
        """The inverse of `split`."""
        x = jnp.moveaxis(x, 0, axis)
        x = x.reshape(*x.shape[:axis], self.count * self.size, *x.shape[axis + 2 :])
        return jax.lax.slice_in_dim(x, 0, self.length, axis=axis)


def blocks(length: int, limit: int) -> Axis:
    """Cuts an axis into blocks as equal as can be, of a multiple of 8 positions where there are several."""
    count = max(1, -(-length // limit))
    size = -(-length // count)
    return Axis(length, count, size if count == 1 else -(-size // 8) * 8)


def pairs(queries: Axis, keys: Axis, left: int | None, right: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs (block of queries, block of keys) [n, 2] in which all see all, and in which some see some.

    Positions are 0, 1, ...; a query sees the keys `left` before it to `right` after it, None for all.
    """
    i, j = np.arange(queries.count)[:, None], np.arange(keys.count)
    first, last = i * queries.size, np.minimum((i + 1) * queries.size, queries.length) - 1
    start, end = j * keys.size, np.minimum((j + 1) * keys.size, keys.length) - 1
    some = (first <= last) & (start <= end)
    every = some & (end - start == keys.size - 1)
    if left is not None:
        some &= end - first >= -left
        every &= start - last >= -left
    if right is not None:
        some &= start - last <= right
        every &= end - first <= right
    every &= some
    return np.argwhere(every).astype(np.int32), np.argwhere(some & ~every).astype(np.int32)

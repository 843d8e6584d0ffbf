"""Packed documents for layers that cut a text into blocks: each is laid out so that it begins with a block."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from portable.checks import check_values
from portable.ops._arguments import segment_counts


class Documents(NamedTuple):
    """Where the tokens of packed documents lie in the layout, of `size` slots.

    Attributes:
      slots: [b, t] of each token.
      within: [b, t], its position in its document.
      starts: [b, size], of each slot the one where its document begins; 0 where there is no token.
      segments: [b, size], the number of its document; -1 where there is no token.
      positions: [b, size], its position in its document; 0 where there is no token.
    """

    slots: Int[Array, "b t"]
    within: Int[Array, "b t"]
    starts: Int[Array, "b size"]
    segments: Int[Array, "b size"]
    positions: Int[Array, "b size"]

    def put(self, x, fill: Any = 0):
        """[b, t, ...] -> [b, size, ...]."""
        return _put(x, self.slots, self.starts.shape[1], fill)

    def take(self, x):
        """The inverse of `put`; NaN for a token that the layout had no room for."""
        return x.at[jnp.arange(x.shape[0])[:, None], self.slots].get(mode="fill", fill_value=jnp.nan)


def documents(name: str, segment_ids: Int[Array, "b t"], block: int, most: int | None) -> Documents:
    """Returns the layout in which each run of equal ids begins at a multiple of `block`.

    Args:
      name: of the caller, for the error.
      segment_ids: [b, t].
      block: slots.
      most: documents of a row that there is room for in any case; None for as many as t has blocks, which at most
        doubles the length. More fit if they are long.

    Raises:
      ValueError: concrete documents do not fit. In compiled code their tokens become NaN.
    """
    b, t = segment_ids.shape
    number: Any = segment_counts(segment_ids)
    rows = jnp.arange(b)[:, None]
    lengths = jnp.zeros((b, t), jnp.int32).at[rows, number].add(1)
    blocks = -(-lengths // block)
    ends = jnp.cumsum(blocks, 1)
    count = min(t, -(-t // block) + 1 if most is None else most)
    room = (t + count * (block - 1)) // block
    check_values(
        lambda n: n <= room,
        f"{name}: documents must fit a layout of {room} blocks of {block}, each from a block of its own; got more of "
        f"them. Give the layer max_segments, the number of documents in a row of {t}.",
        ends[:, -1:],
    )
    first = jnp.take_along_axis(ends - blocks, number, 1) * block
    within = jnp.arange(t, dtype=jnp.int32) - jnp.take_along_axis(jnp.cumsum(lengths, 1) - lengths, number, 1)
    slots = first + within
    put = lambda x, fill=0: _put(x, slots, room * block, fill)  # noqa: E731
    return Documents(slots, within, put(first), put(number, -1), put(within))


def _put(x, slots, size: int, fill: Any):
    empty = jnp.full((x.shape[0], size, *x.shape[2:]), fill, x.dtype)
    return empty.at[jnp.arange(x.shape[0])[:, None], slots].set(x, mode="drop", unique_indices=True)

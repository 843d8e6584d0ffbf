"""What layers of attention keep of positions read: written in place, read by position."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from portable.checks import check_values


class Seen(NamedTuple):
    """What new positions attend to.

    Attributes:
      arrays: of the cache, [b, s, ...] each.
      positions: [b, s], -1 where there is nothing.
      segments: pair for `portable.ops.attention`'s segment_ids, or None.
    """

    arrays: tuple[Array, ...]
    positions: Int[Array, "b s"]
    segments: Any


def extend(
    name: str,
    arrays: tuple[Array, ...],
    positions: Int[Array, "b s"],
    length: Int[Array, " b"],
    new: tuple[Array, ...],
    new_positions: Int[Array, "b t"],
    *,
    real: Bool[Array, "b t"] | None,
    segment_ids: Int[Array, "b t"] | None,
    is_ring: bool,
) -> tuple[tuple[Array, ...], Int[Array, "b s"], Int[Array, " b"], Seen]:
    """Writes new positions into a cache.

    Args:
      name: of the layer, for the error.
      arrays: [b, s, ...]; position p of a row lies at p % s.
      positions: [b, s], -1 where there is nothing.
      length: [b], positions read before.
      new: [b, t, ...], what is to be written.
      new_positions: [b, t].
      real: [b, t], false at padding; None for none.
      segment_ids: [b, t] or None; the cache belongs to the first, and holds the last afterwards.
      is_ring: whether old positions may be overwritten.

    Returns:
      (arrays, positions, length) afterwards, and what the new positions see.

    Raises:
      ValueError: concrete positions are more than the cache holds, and it is no ring.
    """
    b, t, held = *new_positions.shape, positions.shape[1]
    count = jnp.full((b,), t, jnp.int32) if real is None else jnp.sum(real, axis=1, dtype=jnp.int32)
    after = length + count
    if not is_ring:
        check_values(
            lambda n: n <= held,
            f"{name}: the state holds {held} positions, and more came; give init_state a larger length.",
            after,
        )
    segments: Any = None
    if segment_ids is not None and t:
        segments = (segment_ids, jnp.broadcast_to(segment_ids[:, :1], (b, held)))
    added = jnp.where(real, new_positions, -1) if real is not None else new_positions
    # A position that a later one of the same call overwrites is not written at all.
    kept = (added >= 0) & (added >= after[:, None] - held)
    slots = jnp.where(kept, added % max(1, held), held + jnp.arange(t))
    rows = jnp.arange(b)[:, None]

    def write(cache, values):
        return cache.at[rows, slots].set(values.astype(cache.dtype), mode="drop", unique_indices=True)

    placed, earlier = added, positions
    if segment_ids is not None and segments is not None:
        last = jnp.take_along_axis(segment_ids, jnp.maximum(count - 1, 0)[:, None], axis=1)
        placed = jnp.where(segment_ids == last, added, -1)
        earlier = jnp.where((segments[1] == last) | (count == 0)[:, None], positions, -1)
    written, marked = tuple(map(write, arrays, new)), write(earlier, placed)
    if not is_ring and segments is None:  # nothing is overwritten: the new state has every key
        return written, marked, after, Seen(written, marked, None)
    both = tuple(jnp.concatenate(pair, axis=1) for pair in zip(arrays, new, strict=True))
    joined = jnp.concatenate([positions, added], axis=1)
    if segments is not None:
        segments = (segments[0], jnp.concatenate(segments[::-1], axis=1))
    return written, marked, after, Seen(both, joined, segments)


def fresh_state(model: Any, batch: int, length: int) -> Any:
    """Returns a language model's decode state before any token.

    Args:
      model: with `init_state(batch)`, or `init_state(batch, length)` if its `needs_length` is true: a cache of
        positions must be as long as what is read and made.
      batch: rows.
      length: positions that a row has at most.
    """
    return model.init_state(batch, length) if getattr(model, "needs_length", False) else model.init_state(batch)

"""Padded batches: any contiguous block of real positions becomes right padding, which recurrences handle exactly."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from portable.checks import check_values
from portable.ops._arguments import check_integer, check_shape


def right_padded(name: str, x, lengths, mask, segment_ids):
    """Returns (x, lengths, segment_ids, inverse) with each row's real positions in front; inverse is None without mask.

    Args:
      name: of the caller, for the error.
      x: [b, t] or [b, t, d].
      lengths: [b] or None; not together with a mask.
      mask: [b, t], true at real positions, or None.
      segment_ids: [b, t] or None.

    Raises:
      ValueError: a shape does not fit x, both lengths and mask are given, or a concrete mask has holes.
      TypeError: lengths or segment_ids are not integers.
    """
    check_rows(name, x, lengths, segment_ids)
    check_shape(name, "mask", mask, "b t", {"b": x.shape[0], "t": x.shape[1]})
    if mask is None:
        return x, lengths, segment_ids, None
    if lengths is not None:
        raise ValueError(f"{name}: give lengths (right padding) or mask (any padding), not both.")
    indices, inverse, lengths = align_left(mask)
    x = jnp.take_along_axis(x, indices if x.ndim == 2 else indices[..., None], axis=1)
    if segment_ids is not None:
        segment_ids = jnp.take_along_axis(segment_ids, indices, axis=1)
    return x, lengths, segment_ids, inverse


def check_rows(name: str, x, lengths, segment_ids) -> None:
    """Raises unless lengths are [b] and segment_ids [b, t] integers of x [b, t, ...]; None passes."""
    sizes = {"b": x.shape[0], "t": x.shape[1]}
    check_shape(name, "lengths", lengths, "b", sizes)
    check_shape(name, "segment_ids", segment_ids, "b t", sizes)
    check_integer(name, lengths=lengths, segment_ids=segment_ids)


def align_left(
    mask: Bool[Array, "b t"],
) -> tuple[Int[Array, "b t"], Int[Array, "b t"], Int[Array, " b"]]:
    """Returns indices that move each row's real positions to its front, their inverse, and the rows' lengths.

    Args:
      mask: [b, t], true at real positions, which must be contiguous in a row (left, right or both-sided padding).

    Returns:
      (indices [b, t], inverse [b, t], lengths [b]); gather with `jnp.take_along_axis`.

    Raises:
      ValueError: (concrete masks only) a row has a hole.
    """
    t = mask.shape[1]
    mask = mask.astype(jnp.int32)
    check_values(
        lambda m: ((m[:, 1:] > m[:, :-1]).sum(1) + m[:, :1].sum(1)) <= 1,
        "mask: the real positions of a row must be contiguous; got a row with a hole. Pack documents with segment_ids.",
        mask,
    )
    start = jnp.argmax(mask, axis=1).astype(jnp.int32)[:, None]
    steps = jnp.arange(t, dtype=jnp.int32)
    return (steps + start) % max(t, 1), (steps - start) % max(t, 1), mask.sum(1)

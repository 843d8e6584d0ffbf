"""Padded batches: any contiguous block of real positions becomes right padding, which recurrences handle exactly."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from portable.checks import check_values


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

"""What the selectors share: means of blocks, the best of visible blocks, chunks of queries."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from portable.ops._arguments import accumulator, check_array, check_float, check_integer, check_shape

SCORES = 2**24  # held at once


def block_means(
    k: Float[Array, "b s g d"], block_size: int, *, stride: int | None = None
) -> Float[Array, "b blocks g d"]:
    """Returns the mean of each block of keys, what blocks are chosen by.

    Args:
      k: [b, s, g, d] keys (or any vectors).
      block_size: keys of a block.
      stride: from the start of a block to that of the next; block_size unless given, and the last block is then the
        mean of as many keys as there are. With another stride, blocks overlap and only whole ones count.

    Returns:
      [b, ceil(s / block_size), g, d], or [b, (s - block_size) // stride + 1 (0 if negative), g, d] with a stride, in
      float32 (float64 if k is).

    Raises:
      ValueError: k has another shape, or a size is below 1.
      TypeError: k is not floating point, or a size is no integer.

    >>> import jax.numpy as jnp, portable
    >>> portable.ops.block_means(jnp.arange(5.0).reshape(1, 5, 1, 1), 2)[0, :, 0, 0].tolist()
    [0.5, 2.5, 4.0]
    """
    op = "block_means"
    check_shape(op, "k", k, "b s g d", {})
    check_float(op, k=k)
    size = whole(op, "block_size", block_size)
    x, s = k.astype(accumulator(k)), k.shape[1]
    if stride is None or stride == size:
        count = -(-s // size)
        x = jnp.pad(x, ((0, 0), (0, count * size - s), (0, 0), (0, 0)))
        if stride is not None and s % size:
            count -= 1
            x = x[:, : count * size]
        lengths = jnp.minimum(size, s - jnp.arange(count) * size).astype(x.dtype)
        return x.reshape(x.shape[0], count, size, *x.shape[2:]).sum(2) / lengths[:, None, None]
    stride = whole(op, "stride", stride)
    count = max(0, (s - size) // stride + 1)
    if size % stride == 0 and count:  # of sums of strides
        parts = x[:, : (s // stride) * stride].reshape(x.shape[0], -1, stride, *x.shape[2:]).sum(2)
        total: Any = sum(parts[:, i : i + count] for i in range(size // stride))
        return total / size
    at = jnp.arange(count)[:, None] * stride + jnp.arange(size)
    return x[:, at].mean(2)


def whole(op: str, name: str, x: Any, least: int = 1) -> int:
    """Returns an integer of at least `least`."""
    try:
        found = operator.index(x)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer; got {type(x).__name__}.") from None
    if isinstance(x, bool) or found < least:
        raise ValueError(f"{op}: {name} must be at least {least}; got {x!r}.")
    return found


def positions(op: str, q_positions, b: int, t: int):
    """Returns [b, t] int32: those given as [b, t] or [t], or 0, 1, ..."""
    if q_positions is None:
        return jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (b, t))
    check_array(op, q_positions=q_positions)
    check_integer(op, q_positions=q_positions)
    check_shape(op, "q_positions", q_positions, "t" if q_positions.ndim == 1 else "b t", {"b": b, "t": t})
    return jnp.broadcast_to(q_positions, (b, t)).astype(jnp.int32)


def best(scores, count: int, *, hidden, forced=None):
    """Returns the numbers of the highest scores along the last axis, int32 [..., min(count, size)], -1 for none.

    Args:
      scores: [..., size]. One that is NaN comes behind those that are forced and before all others: what it stands for
        is then looked at, and the result shows it.
      count: how many.
      hidden: [..., size], what is never chosen.
      forced: [..., size], what is chosen first.
    """
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).max, scores)
    if forced is not None:
        scores = jnp.where(forced, jnp.inf, scores)
    scores = jnp.where(hidden, -jnp.inf, scores)
    values, found = jax.lax.top_k(scores, min(count, scores.shape[-1]))
    return jnp.where(values == -jnp.inf, -1, found).astype(jnp.int32)


def in_chunks(fn: Callable, each: int, *arrays):
    """Returns fn(*arrays), of arrays [b, t, ...] to [b, t, ...], with at most `SCORES` scores at once.

    Args:
      fn: looks at each t alone.
      each: scores of one t, of all rows of the batch.
      *arrays: [b, t, ...].
    """
    t = arrays[0].shape[1]
    trips = max(1, -(-t // max(1, SCORES // max(1, each))))
    if trips == 1:
        return fn(*arrays)
    size = -(-t // trips)

    def cut(x):
        x = jnp.pad(x, ((0, 0), (0, trips * size - t), *[(0, 0)] * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], trips, size, *x.shape[2:]), 1, 0)

    found = jnp.moveaxis(jax.lax.map(lambda xs: fn(*xs), tuple(map(cut, arrays))), 0, 1)
    return found.reshape(found.shape[0], trips * size, *found.shape[3:])[:, :t]


def held(*arrays) -> tuple[Any, ...]:
    """Returns the arrays without a derivative: indices have none."""
    return tuple(None if x is None else jax.lax.stop_gradient(x) for x in arrays)

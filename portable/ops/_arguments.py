"""Checks that every op shares. Letters: b batch, t time, h heads, g groups, p and n state, c channels."""

from typing import Any

import jax
import jax.numpy as jnp


def check_array(op: str, **arrays) -> None:
    """Raises TypeError unless every argument that is not None is an array."""
    for name, x in arrays.items():
        if x is not None and not hasattr(x, "ndim"):
            raise TypeError(f"{op}: {name} must be an array; got {type(x).__name__}. Wrap it in jnp.asarray.")


def check_float(op: str, **arrays) -> None:
    """Raises TypeError unless every array that is not None has a floating dtype."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} must be floating point; got {x.dtype}. Cast it with .astype(float32).")


def check_shape(op: str, name: str, x, letters: str, sizes: dict[str, int]) -> None:
    """Raises ValueError unless `x` is [*letters]; `sizes` holds the letters known so far and learns new ones.

    Args:
      op: the op's name.
      name: the argument's name.
      x: an array, or None (which passes).
      letters: space-separated axis names, for example "b t h p".
      sizes: axis sizes by letter.
    """
    if x is None:
        return
    check_array(op, **{name: x})
    axes = letters.split()
    wanted = f"[{', '.join(axes)}]"
    if x.ndim != len(axes):
        raise ValueError(f"{op}: {name} must be {wanted}; got rank {x.ndim}, shape {list(x.shape)}.")
    for axis, size in zip(axes, x.shape, strict=True):
        if sizes.setdefault(axis, size) != size:
            raise ValueError(f"{op}: {name} must be {wanted} with {axis}={sizes[axis]}; got shape {list(x.shape)}.")


def check_groups(op: str, h: int, g: int, which: str = "B and C must be [b, t, g, n]") -> None:
    """Raises ValueError unless the heads divide evenly among the groups; `which` says whose those are."""
    if g == 0 or h % g:
        raise ValueError(f"{op}: {which} with h % g == 0; got h={h}, g={g}.")


def check_integer(op: str, **arrays) -> None:
    """Raises TypeError unless every array that is not None has an integer dtype."""
    for name, x in arrays.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{op}: {name} must be integers; got {x.dtype}.")


def check_segments(op: str, segment_ids, sizes: dict[str, int]) -> tuple[Any, Any]:
    """Returns the ids of queries [b, t] and of keys [b, s], from one array where t = s, a pair, or None.

    Raises:
      ValueError: they have another shape, or one array is given and t != s.
      TypeError: they are not integers.
    """
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if isinstance(segment_ids, tuple) and (len(pair) != 2 or any(x is None for x in pair)):
        raise ValueError(f"{op}: segment_ids must be one array or a pair of arrays; got a tuple of {len(pair)}.")
    if segment_ids is not None and not isinstance(segment_ids, tuple) and sizes["t"] != sizes["s"]:
        raise ValueError(
            f"{op}: segment_ids must be a pair ([b, t], [b, s]) where queries and keys are not the same positions; "
            f"got one array, t={sizes['t']} and s={sizes['s']}."
        )
    check_shape(op, "segment_ids of queries", pair[0], "b t", sizes)
    check_shape(op, "segment_ids of keys", pair[1], "b s", sizes)
    check_integer(op, segment_ids=pair[0], kv_segments=pair[1])
    return pair


def check_positions(op: str, name: str, x, letter: str, sizes: dict[str, int]):
    """Returns positions [b, letter] or [letter] as [b, letter] int32; None passes.

    Raises:
      ValueError: they have another shape.
      TypeError: they are not integers.
    """
    check_array(op, **{name: x})
    if x is None:
        return None
    if x.ndim not in (1, 2):
        raise ValueError(f"{op}: {name} must be [b, {letter}] or [{letter}]; got shape {list(x.shape)}.")
    check_shape(op, name, x, letter if x.ndim == 1 else f"b {letter}", sizes)
    check_integer(op, **{name: x})
    return jnp.broadcast_to(x, (sizes["b"], sizes[letter])).astype(jnp.int32)


def accumulator(*arrays):
    """Returns the dtype of sums and states: float32, or float64 where an argument is float64."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*[a.dtype for a in arrays if a is not None]))


def segment_counts(segment_ids):
    """Returns how many segment boundaries lie in 0..t, [b, t] int32; ids may repeat later in a row."""
    if segment_ids is None:
        return None
    starts = segment_ids[:, 1:] != segment_ids[:, :-1]
    counts = jnp.pad(jnp.cumsum(starts.astype(jnp.int32), axis=1), ((0, 0), (1, 0)))
    return counts[:, : segment_ids.shape[1]]  # t = 0 has no first position


def vary_together(*arrays) -> tuple[Any, ...]:
    """Gives the arrays (None passes) the same varying axes inside a `shard_map`; elsewhere returns them untouched.

    A scan's carry and a custom backward must agree with their inputs in these types. The cast's own transpose is the
    sum over devices that a replicated argument's cotangent needs.
    """
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays if x is not None))

    def cast(x):
        missing = () if x is None else tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return tuple(map(cast, arrays))

"""The contract of `grouped_matmul`: checks and preparation. No algorithm."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import check_array, check_float, check_integer, check_shape, vary_together


def grouped_matmul(
    x: Float[Array, "m d"],
    w: Float[Array, "e d f"] | Sequence[Float[Array, "d f"]],
    group_sizes: Int[Array, " e"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m f"]:
    """Multiplies the first group_sizes[0] rows of x by w[0], the next group_sizes[1] rows by w[1], and so on.

    Sums are float32. It has the contract of `jax.lax.ragged_dot`, and its speed on a TPU, and elsewhere computes only
    what it returns (rounded up to tiles of rows). Differentiable in x and w, in reverse mode.

    Args:
      x: [m, d], rows in the order of their groups.
      w: [e, d, f], a matrix for each group; or e arrays [d, f], which a CPU multiplies with where they lie: of a
        stacked one it reads a copy of each group's matrix.
      group_sizes: [e], integers; their sum is at most m.
      implementation: "reference", "xla" (the platform's form) or "xla_small_tiles", "xla_large_tiles", "xla_ragged";
        "pallas_tpu", "triton" (a stacked w).

    Returns:
      [m, f] in x's dtype; rows behind the last group are 0.

    Raises:
      ValueError: shapes do not fit, or a concrete size is negative or their sum above m.
      TypeError: x or w is not floating point, or group_sizes are not integers.

    >>> import jax.numpy as jnp, portable
    >>> x, w = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([[[1.0]], [[10.0]]])
    >>> portable.ops.grouped_matmul(x, w, jnp.array([2, 1])).ravel().tolist()
    [1.0, 2.0, 30.0]
    """
    arrays, options = prepare(x, w, group_sizes)
    (y,) = selection.call("grouped_matmul", implementation, arrays, options)
    return y


def prepare(x, w, group_sizes):
    """Checks the arguments; returns the core's (x, w, group_sizes) and its options."""
    sizes: dict[str, int] = {}
    check_shape("grouped_matmul", "x", x, "m d", sizes)
    w = check_experts("grouped_matmul", "w", w, "d f", sizes)
    check_shape("grouped_matmul", "group_sizes", group_sizes, "e", sizes)
    check_integer("grouped_matmul", group_sizes=group_sizes)
    rows = sizes["m"]
    check_values(
        lambda sizes: (sizes >= 0) & (sizes.sum() <= rows),
        f"grouped_matmul: group_sizes must not be negative, and sum to at most the rows of x, {rows}.",
        group_sizes,
    )
    check_float("grouped_matmul", x=x)
    leaves = w if isinstance(w, tuple) else (w,)
    dtype = jnp.result_type(x, *leaves)
    x, group_sizes, *leaves = vary_together(x.astype(dtype), group_sizes.astype(jnp.int32), *leaves)
    return (x, tuple(leaves) if isinstance(w, tuple) else leaves[0], group_sizes), {}


def check_experts(op: str, name: str, w, letters: str, sizes: dict[str, int]):
    """Checks matrices of experts, [e, *letters] or e arrays [*letters]; returns the latter as a tuple."""
    if w is None or hasattr(w, "ndim"):
        check_shape(op, name, w, f"e {letters}", sizes)
        check_float(op, **{name: w})
        return w
    if not isinstance(w, Sequence) or not w:
        raise TypeError(f"{op}: {name} must be an array, or a sequence of arrays, one a group; got {type(w).__name__}.")
    for i, matrix in enumerate(w):
        check_array(op, **{f"{name}[{i}]": matrix})
        check_shape(op, f"{name}[{i}]", matrix, letters, sizes)
        check_float(op, **{f"{name}[{i}]": matrix})
    if sizes.setdefault("e", len(w)) != len(w):
        raise ValueError(f"{op}: {name} must have e={sizes['e']} arrays; got {len(w)}.")
    return tuple(w)

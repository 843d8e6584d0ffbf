"""The contract of `linear`: checks and preparation. No algorithm."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from portable import selection
from portable.ops._arguments import check_array, check_float, vary_together


def linear(
    x: Float[Array, "... d"],
    kernel: Float[Array, "d o"] | Float[Array, "o d"],
    *,
    transposed: bool = False,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "... o"]:
    """Multiplies vectors by a matrix: y = x @ kernel, or x @ kernel.T with the kernel read in place.

    Operands are brought to their common dtype and multiplied at JAX's default precision for it, as `x @ kernel` is.
    Everything but a single row on a CPU or a TPU is XLA's own product, differentiable in every mode; a single row is
    differentiable in reverse mode.

    Args:
      x: [..., d].
      kernel: [d, o], or [o, d] if `transposed` (an embedding used as the head).
      transposed: whether the kernel's second axis meets x.
      out_dtype: dtype of the result; None takes the operands' common dtype.
      implementation: "reference", "xla" (the platform's form), "xla_row" or "xla_twice".

    Returns:
      [..., o] in `out_dtype`.

    Raises:
      ValueError: shapes do not fit.
      TypeError: an argument has an integer dtype.
      portable.Unavailable: the named implementation cannot take these arguments.

    >>> import jax.numpy as jnp, portable
    >>> portable.ops.linear(jnp.array([1.0, 2.0]), jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    arrays, options = prepare(x, kernel, transposed=transposed, out_dtype=out_dtype)
    (y,) = selection.call("linear", implementation, arrays, options)
    return y


def prepare(x, kernel, *, transposed=False, out_dtype=None):
    """Checks the arguments; returns the core's (x, kernel) in their common dtype and its options."""
    check_array("linear", x=x, kernel=kernel)
    form = "[o, d]" if transposed else "[d, o]"
    if kernel.ndim != 2 or x.ndim < 1 or x.shape[-1] != kernel.shape[1 if transposed else 0]:
        raise ValueError(
            f"linear: x must be [..., d] and kernel {form}; got x {list(x.shape)} and kernel {list(kernel.shape)}."
        )
    check_float("linear", x=x, kernel=kernel)
    common = jnp.promote_types(x.dtype, kernel.dtype)
    options = {"transposed": transposed, "out_dtype": jnp.dtype(out_dtype or common)}
    return vary_together(x.astype(common), kernel.astype(common)), options

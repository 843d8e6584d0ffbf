"""The contract of `dora_norm`: checks and preparation. No algorithm."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from portable import selection
from portable.ops._arguments import accumulator, check_float, check_shape, vary_together


def dora_norm(
    w: Float[Array, "*e d o"],
    a: Float[Array, "*e d r"],
    b: Float[Array, "*e r o"],
    *,
    scale: float = 1.0,
    squares: Float[Array, "*e o"] | None = None,
    shards: int = 1,
    out_dtype=None,
    implementation: str | None = None,
) -> Float[Array, "*e o"]:
    """Returns the Euclidean norm of each column of w + scale * a @ b, one for each output channel.

    Either the updated weight is formed (`xla_dense`; a block of rows at a time, `xla_blocks`), or the square is
    expanded (`xla_factored`), ||w + s a b||^2 = ||w||^2 + 2 s <b, a^T w> + s^2 <b, (a^T a) b>, column by column, which
    needs memory for [r, o] alone and never forms w's own part again where its `squares` are given. The expansion loses
    digits where the update cancels the weight: its relative error is some 1e-7 * (||w|| / ||w + s a b||)^2.

    Operands meet in w's dtype, products of float32 at full precision; sums are float32 (float64 in float64).
    Differentiable in w, a and b, in reverse mode, with slope 0 where a norm is 0.

    Args:
      w: [*e, d, o]; leading axes are separate weights, such as experts.
      a, b: [*e, d, r] and [*e, r, o].
      scale: s.
      squares: [*e, o], the sums of w's squares over d, where they are known: the weight is frozen.
      shards: devices that d is cut over, for `xla_factored` under an automatic mesh: each then expands its own part,
        and the norms cost one all-reduce of [*e, o]. `xla_dense` costs that by itself.
      out_dtype: of the result; None takes float32 (float64 if an argument is).
      implementation: "reference", "xla" (the platform's form), "xla_dense" (takes no squares), "xla_blocks" (ranks from
        64 of one weight on one device) or "xla_factored".

    Returns:
      [*e, o] in out_dtype.

    Raises:
      ValueError: shapes do not fit, or shards does not divide d.
      TypeError: an argument is not floating point.
      portable.Unavailable: the named implementation cannot take these arguments.

    Source: DoRA (Liu et al. 2024, arXiv:2402.09353), equation 5; the expansion is arXiv:2603.22276's.

    >>> import jax.numpy as jnp, portable
    >>> w, a, b = jnp.array([[3.0, 1.0], [2.0, 0.0]]), jnp.array([[0.0], [1.0]]), jnp.array([[1.0, 0.0]])
    >>> portable.ops.dora_norm(w, a, b, scale=2.0).tolist()
    [5.0, 1.0]
    """
    arrays, options = prepare(w, a, b, scale=scale, squares=squares, shards=shards, out_dtype=out_dtype)
    (norms,) = selection.call("dora_norm", implementation, arrays, options)
    return norms


def prepare(w, a, b, *, scale=1.0, squares=None, shards=1, out_dtype=None):
    """Checks the arguments; returns the core's (w, a, b, squares) and its options."""
    check_float("dora_norm", w=w, a=a, b=b, squares=squares)
    lead = " ".join(f"e{i}" for i in range(max(0, getattr(w, "ndim", 2) - 2)))
    sizes: dict[str, int] = {}
    for name, x, letters in (("w", w, "d o"), ("a", a, "d r"), ("b", b, "r o"), ("squares", squares, "o")):
        check_shape("dora_norm", name, x, f"{lead} {letters}".strip(), sizes)
    if shards < 1 or sizes["d"] % shards:
        raise ValueError(f"dora_norm: shards must divide d; got d={sizes['d']}, shards={shards}.")
    wide = accumulator(w, a, b, squares)
    dtype = wide if wide == jnp.float64 else w.dtype
    squares = None if squares is None else squares.astype(wide)
    arrays = vary_together(w.astype(dtype), a, b, squares)
    return arrays, {"scale": float(scale), "shards": shards, "out_dtype": jnp.dtype(out_dtype or wide)}

"""The contract of `ssd`: checks and preparation. No algorithm."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import (
    accumulator,
    check_array,
    check_float,
    check_groups,
    check_integer,
    check_shape,
    segment_counts,
    vary_together,
)
from portable.ops._ssd.scaled import flat


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t g n"],
    C: Float[Array, "b t g n"],
    *,
    D: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    initial_state: Float[Array, "b h p n"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk_size: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b t h p"], Float[Array, "b h p n"]]:
    """Runs the state-space recurrence of Mamba-2 over a sequence, in chunks.

    For each batch row and head, with B and C of the head's group:

        S[t] = exp(dt[t] * A) * S[t-1] + dt[t] * outer(x[t], B[t])
        y[t] = S[t] @ C[t] + D * x[t]

    Sums, decays and states are float32 (float64 if an argument is float64) whatever the dtype of x; matrix products
    take operands in the dtype of x. A position with dt = 0 and x = 0 leaves the state untouched, so padding is exact.
    Differentiable in every floating argument, in reverse mode; `implementation="reference"` also in forward mode.

    Args:
      x: [b, t, h, p] inputs. Any t >= 0.
      dt: [b, t, h] step sizes after softplus, >= 0.
      A: [h] decay rates, <= 0.
      B: [b, t, g, n] input projections; h % g == 0. Groups are never broadcast to heads.
      C: [b, t, g, n] output projections.
      D: [h] or [h, p] skip weights, or None.
      initial_state: [b, h, p, n] state before the first position (it belongs to that position's segment), or None
        for zeros.
      segment_ids: [b, t] integers; where they change, the state starts from zero (packed documents).
      chunk_size: positions in a chunk; None takes the form's own default. The result does not depend on it.
      implementation: "reference", "xla" (the platform's form), "xla_scan", "xla_chunks", "xla_lanes" or a kernel's
        name.

    Returns:
      y [b, t, h, p] in the dtype of x, and the state after the last position [b, h, p, n] in float32.

    Raises:
      ValueError: shapes do not fit, chunk_size < 1, or (concrete arrays only) A > 0 or dt < 0.
      TypeError: an argument has an integer dtype, or segment_ids a floating one.
      portable.Unavailable: the named implementation cannot take these arguments.

    Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), equations 1 and 16 and section 6.

    >>> import jax, jax.numpy as jnp, portable
    >>> x, dt = jnp.ones([1, 6, 4, 8]), jnp.full([1, 6, 4], 0.1)
    >>> B = C = jnp.ones([1, 6, 2, 16])
    >>> y, state = portable.ops.ssd(x, dt, -jnp.ones([4]), B, C)
    >>> y.shape, state.shape
    ((1, 6, 4, 8), (1, 4, 8, 16))
    """
    arrays, options = prepare(
        x, dt, A, B, C, D=D, initial_state=initial_state, segment_ids=segment_ids, chunk_size=chunk_size
    )
    y, state = selection.call("ssd", implementation, arrays, options)
    b, _, h, p = x.shape
    return add_skip(y.astype(x.dtype).reshape(x.shape), x, D), state.reshape(b, h, p, B.shape[-1])


def prepare(x, dt, A, B, C, *, D=None, initial_state=None, segment_ids=None, chunk_size=None):
    """Checks the arguments; returns the core's arrays, as in `scaled`, and its options."""
    sizes: dict[str, int] = {}
    check_shape("ssd", "x", x, "b t h p", sizes)
    check_shape("ssd", "dt", dt, "b t h", sizes)
    check_shape("ssd", "A", A, "h", sizes)
    check_shape("ssd", "B", B, "b t g n", sizes)
    check_shape("ssd", "C", C, "b t g n", sizes)
    check_groups("ssd", sizes["h"], sizes["g"])
    check_shape("ssd", "initial_state", initial_state, "b h p n", sizes)
    check_shape("ssd", "segment_ids", segment_ids, "b t", sizes)
    check_skip("ssd", D, sizes)
    check_float("ssd", x=x, dt=dt, A=A, B=B, C=C, D=D, initial_state=initial_state)
    check_integer("ssd", segment_ids=segment_ids)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"ssd: chunk_size must be an integer of at least 1; got {chunk_size}. None takes the default.")
    check_values(
        lambda a: ~(a > 0), "ssd: A must not be positive (a decay rate, -exp(A_log)); got a positive entry.", A
    )
    check_values(lambda d: ~(d < 0), "ssd: dt must be >= 0 (apply softplus first); got a negative entry.", dt)
    wide = accumulator(x, dt, A, B, C, initial_state)
    if wide == jnp.float64:  # one argument in float64 takes all there
        x, B, C = (z.astype(wide) for z in (x, B, C))
        initial_state = None if initial_state is None else initial_state.astype(wide)
    dt = dt.astype(wide)
    arrays = (dt * A.astype(wide), dt, flat(x), B, C, initial_state, segment_counts(segment_ids))
    return vary_together(*arrays), {"chunk_size": chunk_size}


def check_skip(op: str, D, sizes) -> None:
    """Raises ValueError unless D is None, [h] or [h, p]."""
    if D is None:
        return
    check_array(op, D=D)
    if D.ndim not in (1, 2):
        raise ValueError(f"{op}: D must be [h] or [h, p]; got shape {list(D.shape)}.")
    check_shape(op, "D", D, "h" if D.ndim == 1 else "h p", sizes)


def add_skip(y, x, D):
    """Returns y + D * x, summed in float32, in the dtype of x."""
    if D is None:
        return y
    wide, (*leading, h, p) = accumulator(x), x.shape
    # With a head's channels in an axis of their own, a TPU would lay x and y out anew.
    weights = jnp.broadcast_to((D[:, None] if D.ndim == 1 else D).astype(wide), (h, p)).reshape(h * p)
    y, x = (z.reshape(*leading, h * p) for z in (y, x))
    return (y.astype(wide) + weights * x.astype(wide)).astype(x.dtype).reshape(*leading, h, p)

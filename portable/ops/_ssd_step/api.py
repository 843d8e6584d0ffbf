"""The contract of `ssd_step`: checks and preparation. No algorithm."""

from jaxtyping import Array, Float

from portable import selection
from portable.checks import check_values
from portable.ops._arguments import accumulator, check_float, check_groups, check_shape, vary_together
from portable.ops._ssd.api import add_skip, check_skip


def ssd_step(
    x: Float[Array, "b h p"],
    dt: Float[Array, "b h"],
    A: Float[Array, " h"],
    B: Float[Array, "b g n"],
    C: Float[Array, "b g n"],
    state: Float[Array, "b h p n"],
    *,
    D: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """Advances the state of `ssd` by one position; `ssd` over t positions equals t calls of this.

    It is elementwise work and one reduction, memory bound on every platform, so it has one form, which JAX
    differentiates in every mode.

    Args:
      x: [b, h, p]. dt: [b, h], after softplus, >= 0. A: [h], <= 0. B, C: [b, g, n] with h % g == 0.
      state: [b, h, p, n] before this position.
      D: [h] or [h, p] skip weights, or None.
      implementation: "reference" or "xla".

    Returns:
      y [b, h, p] in the dtype of x, and the state after this position in the dtype of `state` (computed in float32).

    Raises:
      ValueError, TypeError: as `ssd`.

    Source: Dao and Gu 2024 (arXiv 2405.21060), equation 1.
    """
    arrays, options = prepare(x, dt, A, B, C, state, D=D)
    y, new = selection.call("ssd_step", implementation, arrays, options)
    return add_skip(y.astype(x.dtype), x, D), new.astype(state.dtype)


def prepare(x, dt, A, B, C, state, *, D=None):
    """Checks the arguments; returns the core's (log decay, k, v, q, state) in float32 and no options."""
    sizes: dict[str, int] = {}
    check_shape("ssd_step", "x", x, "b h p", sizes)
    check_shape("ssd_step", "dt", dt, "b h", sizes)
    check_shape("ssd_step", "A", A, "h", sizes)
    check_shape("ssd_step", "B", B, "b g n", sizes)
    check_shape("ssd_step", "C", C, "b g n", sizes)
    check_groups("ssd_step", sizes["h"], sizes["g"])
    check_shape("ssd_step", "state", state, "b h p n", sizes)
    check_skip("ssd_step", D, sizes)
    check_float("ssd_step", x=x, dt=dt, A=A, B=B, C=C, state=state, D=D)
    check_values(lambda a: ~(a > 0), "ssd_step: A must not be positive; got a positive entry.", A)
    check_values(lambda d: ~(d < 0), "ssd_step: dt must be >= 0 (apply softplus first); got a negative entry.", dt)

    wide = accumulator(x, dt)
    dt = dt.astype(wide)
    arrays = (dt * A.astype(wide), B, x.astype(wide) * dt[..., None], C, state)
    return vary_together(*(array.astype(wide) for array in arrays)), {}

"""One token of the recurrence of `ssd`, for decoding."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from portable.checks import check_values
from portable.ops._arguments import accumulator, check_float, check_groups, check_shape
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
) -> tuple[Float[Array, "b h p"], Float[Array, "b h p n"]]:
    """Advances the state of `ssd` by one position; `ssd` over t positions equals t calls of this.

    It is elementwise work and one reduction, memory bound on every platform, so it has one form.

    Args:
      x: [b, h, p]. dt: [b, h], after softplus, >= 0. A: [h], <= 0. B, C: [b, g, n] with h % g == 0.
      state: [b, h, p, n] before this position.
      D: [h] or [h, p] skip weights, or None.

    Returns:
      y [b, h, p] in the dtype of x, and the state after this position in the dtype of `state` (computed in float32).

    Raises:
      ValueError, TypeError: as `ssd`.

    Source: Dao and Gu 2024 (arXiv 2405.21060), equation 1.
    """
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
    b, h, p = x.shape
    g, n = B.shape[1:]
    dt = dt.astype(wide)
    decay = jnp.exp(dt * A.astype(wide))[..., None]
    old, v = state.astype(wide), x.astype(wide) * dt[..., None]
    k, q = B.astype(wide), C.astype(wide)
    # (decay * old + outer(v, k)) @ q from the old state: read once here and once below, instead of formed twice.
    read = jnp.einsum("bgrpn,bgn->bgrp", old.reshape(b, g, h // g, p, n), q).reshape(b, h, p)
    match = jnp.repeat((k * q).sum(-1), h // g, axis=1)[..., None]
    y = (read * decay + v * match).astype(x.dtype)
    # Nothing exceeds infinity, so this changes no number. But the update now waits for the read, which lets XLA write
    # the new state over the old; otherwise a decode loop copies every layer's state at every token.
    old = jnp.where(read[..., None] > jnp.inf, 0, old)
    new = old * decay[..., None] + v[..., None] * jnp.repeat(k, h // g, axis=1)[:, :, None]
    return add_skip(y, x, D), new.astype(state.dtype)

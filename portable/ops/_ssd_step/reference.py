"""The definition: S = exp(a) S + outer(v, k), y = S q; exact in the dtype of its arguments."""

import jax.numpy as jnp

from portable.selection import Impl


def fwd(a, k, v, q, state):
    """a [b, h]; k, q [b, g, n]; v [b, h, p]; state [b, h, p, n] -> (y [b, h, p], state)."""
    k, q = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1) for x in (k, q))  # to each head its group's
    state = jnp.exp(a)[..., None, None] * state + v[..., :, None] * k[..., None, :]
    return (state * q[..., None, :]).sum(-1), state


IMPL = Impl(fwd=fwd)

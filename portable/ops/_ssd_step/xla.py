"""The form of a decode loop: the state is read, then written over."""

import jax.numpy as jnp

from portable.selection import Impl


def fwd(a, k, v, q, state):
    """See `reference.fwd`."""
    b, h, p, n = state.shape
    g = k.shape[1]
    decay = jnp.exp(a)[..., None]
    # (decay * state + outer(v, k)) @ q from the old state: read once here and once below, instead of formed twice.
    read = jnp.einsum("bgrpn,bgn->bgrp", state.reshape(b, g, h // g, p, n), q).reshape(b, h, p)
    y = read * decay + v * jnp.repeat((k * q).sum(-1), h // g, axis=1)[..., None]
    # Nothing exceeds infinity, so this changes no number. But the update now waits for the read, which lets XLA write
    # the new state over the old; otherwise a decode loop copies every layer's state at every token.
    state = jnp.where(read[..., None] > jnp.inf, 0, state)
    return y, state * decay[..., None] + v[..., None] * jnp.repeat(k, h // g, axis=1)[:, :, None]


IMPL = Impl(fwd=fwd)

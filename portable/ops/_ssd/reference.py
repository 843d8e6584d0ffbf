"""The definition, one step after another; exact in the dtype of its arguments."""

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator, vary_together
from portable.ops._ssd.scaled import scaled
from portable.selection import Impl


def fwd(a, k, v, q, state, boundaries, *, chunk_size):
    """S_t = exp(a_t) S_{t-1} + v_t k_t^T (S_{t-1} = 0 where a segment starts);  y_t = S_t q_t."""
    del chunk_size
    dtype = accumulator(a, v)
    b, t, h, p = v.shape
    k, q = (jnp.repeat(x.astype(dtype), h // x.shape[2], axis=2) for x in (k, q))
    if state is None:
        state = vary_together(v, jnp.zeros((b, h, p, k.shape[-1]), dtype))[1]
    counts = jnp.zeros((b, t), jnp.int32) if boundaries is None else boundaries
    starts = jnp.pad(counts[:, 1:] != counts[:, :-1], ((0, 0), (1, 0)))[:, :t]

    def step(s, now):
        a, k, v, q, start = now
        s = jnp.where(start[:, None, None, None], 0, s) * jnp.exp(a)[..., None, None]
        s = s + v[..., :, None] * k[..., None, :]
        return s, jnp.einsum("bhpn,bhn->bhp", s, q)

    times = (a.astype(dtype), k, v.astype(dtype), q, starts)
    state, y = jax.lax.scan(step, state.astype(dtype), jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), times))
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state


IMPL = scaled(Impl(fwd=fwd))

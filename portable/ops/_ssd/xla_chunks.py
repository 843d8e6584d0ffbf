"""All chunks at once in batched GEMMs; a scan passes only their states: the form of GPUs."""

import jax
import jax.numpy as jnp

from portable.ops._ssd import chunk
from portable.ops._ssd.scaled import scaled
from portable.selection import Impl

# The side of an MXU, and enough rows for tensor cores.
DEFAULT_CHUNK = 128


def _size(t: int, chunk_size: int | None) -> int:
    return max(1, min(t, chunk_size or DEFAULT_CHUNK))


def _pass(start, whole, added, *, reverse=False):
    """Returns the final state and the states before each chunk: s_{c+1} = whole_c s_c + added_c, over axis 1.

    Eight steps are unrolled into one body of the loop, which compilers can fuse.
    """

    def body(s, now):
        whole, added = now
        return s * whole[..., None, None] + added, s

    if added.shape[1] == 1:
        final, before = body(start, (whole[:, 0], added[:, 0]))
        return final, before[:, None]
    leading = (jnp.moveaxis(whole, 1, 0), jnp.moveaxis(added, 1, 0))
    final, before = jax.lax.scan(body, start, leading, reverse=reverse, unroll=min(8, added.shape[1]))
    return final, jnp.moveaxis(before, 0, 1)


def fwd(a, k, v, q, state, boundaries, *, chunk_size):
    """See `reference.fwd` for the recurrence and `chunk` for the shapes."""
    t = v.shape[1]
    c = chunk.split(_size(t, chunk_size), a, k, v, q, boundaries)
    d = chunk.decay(c)
    final, before = _pass(chunk.grouped(state, v, k), d.whole, chunk.update(c, d))
    return chunk.join_heads(chunk.output(c, d, before).astype(v.dtype), t), chunk.flat(final)


def bwd(residuals, cotangents, *, chunk_size):
    """Recomputes the states, passes their cotangents backwards, then takes all chunks' gradients at once."""
    a, k, v, q, state, boundaries = residuals
    dy, dfinal = cotangents
    t = v.shape[1]
    size = _size(t, chunk_size)
    c = chunk.split(size, a, k, v, q, boundaries)
    dy = chunk.split(size, a, k, dy.astype(v.dtype), q, None).v
    d = chunk.decay(c)
    _, before = _pass(chunk.grouped(state, v, k), d.whole, chunk.update(c, d))
    ds, after = _pass(chunk.grouped(dfinal, v, k), d.whole, chunk.state_gradient(c, d, dy), reverse=True)
    da, dk, dv, dq = chunk.gradients(c, d, before, dy, after)
    return chunk.cotangents(residuals, da, dk, dv, dq, ds)


IMPL = scaled(Impl(fwd=fwd, bwd=bwd))

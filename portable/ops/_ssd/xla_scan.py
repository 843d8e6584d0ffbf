"""One scan over the chunks: scores of one chunk at a time stay in a CPU's cache."""

import jax
import jax.numpy as jnp

from portable.ops._ssd import chunk
from portable.ops._ssd.scaled import scaled
from portable.selection import Impl

# One chunk's scores and decays then fit a core's second-level cache.
DEFAULT_CHUNK = 64


def _scan(body, carry, chunks, *, reverse=False):
    """Scans [b, c, ...] arrays over c; a single chunk needs no loop."""
    if jax.tree.leaves(chunks)[0].shape[1] == 1:
        carry, out = body(carry, jax.tree.map(lambda x: x[:, 0], chunks))
        return carry, jax.tree.map(lambda x: x[:, None], out)
    leading = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), chunks)
    carry, out = jax.lax.scan(body, carry, leading, reverse=reverse)
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), out)


def _size(t: int, chunk_size: int | None) -> int:
    return max(1, min(t, chunk_size or DEFAULT_CHUNK))


def _differences(x: jax.Array) -> jax.Array:
    """As `chunk.differences`, as a product; at full precision it is one addition an element, and as exact.

    XLA:CPU does not vectorise the difference of two broadcasts of a slice, which is what the loop gives.
    """
    one = jnp.ones_like(x)
    rows, columns = jnp.stack([x, one], -1), jnp.stack([one, -x], -1)
    return jnp.einsum("...qi,...si->...qs", rows, columns, precision=jax.lax.Precision.HIGHEST)


def fwd(a, k, v, q, state, boundaries, *, chunk_size):
    """See `reference.fwd` for the recurrence and `chunk` for the shapes."""
    t = v.shape[1]
    chunks = chunk.split(_size(t, chunk_size), a, k, v, q, boundaries)

    def body(s, c):
        d = chunk.decay(c, _differences)
        y = chunk.output(c, d, s)
        return s * d.whole[..., None, None] + chunk.update(c, d), y.astype(v.dtype)

    final, y = _scan(body, chunk.grouped(state, v, k), chunks)
    return chunk.join_heads(y, t), chunk.flat(final)


def bwd(residuals, cotangents, *, chunk_size):
    """Walks the chunks forwards for their states, then backwards for the gradients; nothing of size t x t."""
    a, k, v, q, state, boundaries = residuals
    dy, dfinal = cotangents
    t = v.shape[1]
    size = _size(t, chunk_size)
    chunks = chunk.split(size, a, k, v, q, boundaries)
    dys = chunk.split(size, a, k, dy.astype(v.dtype), q, None).v

    def forward(s, c):
        d = chunk.decay(c, _differences)
        return s * d.whole[..., None, None] + chunk.update(c, d), s

    _, starts = _scan(forward, chunk.grouped(state, v, k), chunks)

    def backward(ds, now):
        c, s, dy = now
        d = chunk.decay(c, _differences)
        grads = chunk.gradients(c, d, s, dy, ds)
        return ds * d.whole[..., None, None] + chunk.state_gradient(c, d, dy), grads

    ds, (da, dk, dv, dq) = _scan(backward, chunk.grouped(dfinal, v, k), (chunks, starts, dys), reverse=True)
    return chunk.cotangents(residuals, da, dk, dv, dq, ds)


IMPL = scaled(Impl(fwd=fwd, bwd=bwd))

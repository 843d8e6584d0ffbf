"""`xla_chunks` for TPUs, with heads side by side in the lanes of their vector units.

A TPU's arrays lie in tiles of 8 by 128 lanes. A head has fewer channels than that, so an array whose last axis is one
head's channels would fill its tiles in part, and the compiler turns time into the last axis instead: x, v and y are
then transposed in memory on the way in and out. Here x and y keep all heads' channels in one axis, [b, t, h * p]:

- a product with one head's decays takes the heads that share 128 lanes together: their decays side by side on the
  contracted axis, their channels on a block diagonal. The matrix unit is as busy as with one head alone, as it is no
  less wide than a tile;
- what scales a head, [.., h], is spread over its channels by a product with zeros and ones, which the matrix unit does
  for less than the vector unit takes to repeat lanes;
- states are [n, h * p], and their products with k and q are plain ones over all heads, taken chunk by chunk in the
  walk that passes the states on: stacked for one product over all chunks, they cost more than that product.

Step sizes enter as logs, added to those of the decays; where they are tiny that costs digits, about |log dt| times the
rounding of float32. Barriers stand where the compiler would otherwise compute a long chain again in each of its uses.
What each choice is worth is the estimate of the TPU's compiler (`portable bench ssd --impl xla_lanes,xla_chunks
--estimate tpu-v6e`).
"""

import math

import jax
import jax.numpy as jnp

from portable.ops._ssd import chunk, xla_chunks
from portable.ops._ssd.scaled import backward
from portable.selection import Impl

DEFAULT_CHUNK = 128
# For the backward, which is that of `xla_chunks`.
_BACKWARD_CHUNK = 256
_LANES, _SUBLANES = 128, 8
# So many chunks are walked without a loop.
_UNROLLED = 16


def _spread(z, p: int, dtype):
    """Repeats each of z [b, h, q] over p channels, as [b, q, h * p] in float32 (float64 in float64).

    Rounded to `dtype` where that has 16 bits, as the operands of the products are; else exact. A NaN spreads to all
    heads of its position.
    """
    ones = jnp.repeat(jnp.eye(z.shape[1], dtype=dtype), p, axis=1)
    exact = jax.lax.Precision.HIGHEST if ones.dtype.itemsize > 2 else None
    wide = jnp.promote_types(jnp.float32, dtype)
    return jnp.einsum("bhq,he->bqe", z.astype(dtype), ones, precision=exact, preferred_element_type=wide)


def _walk(step, state, chunks):
    """Returns the last state and what `step` made of each chunk, one after the other in axis 1.

    Args:
      step: (state, a chunk of each array) -> (state, [b, q, e]).
      state: before the first chunk.
      chunks: arrays [b, c, ..].
    """
    count = chunks[0].shape[1]
    if count > _UNROLLED:
        state, y = jax.lax.scan(step, state, tuple(jnp.moveaxis(z, 1, 0) for z in chunks))
        return state, jnp.moveaxis(y, 0, 1).reshape(y.shape[1], -1, y.shape[-1])
    made = []
    for i in range(count):
        state, y = step(state, tuple(z[:, i] for z in chunks))
        state = jax.lax.optimization_barrier(state)  # or a chain of steps is computed again in each of its uses
        made.append(y)
    return state, jnp.concatenate(made, axis=1)


def fwd(a, dt, x, k, q, state, boundaries, *, chunk_size):
    """See `scaled` for the contract and `chunk` for the shapes; e is r * p, a group's channels."""
    if not x.size:  # tiles of nothing
        return xla_chunks.IMPL.fwd(a, dt, x, k, q, state, boundaries, chunk_size=chunk_size)
    (b, t, h), (g, n) = dt.shape, k.shape[2:]
    r, p = h // g, x.shape[-1] // h
    dtype, wide = x.dtype, jnp.promote_types(jnp.float32, x.dtype)
    size = max(1, min(t, chunk_size or DEFAULT_CHUNK))
    c = chunk.split(size, a, k, x.reshape(b, t, h, p), q, boundaries)  # its v is not used here
    chunks = c.large.shape[1]
    length = chunks * size
    start = chunk.grouped(state, x.reshape(b, t, h, p), k).transpose(0, 1, 4, 2, 3).reshape(b, g, n, r * p)
    x = jax.lax.optimization_barrier(jnp.pad(x, ((0, 0), (0, length - t), (0, 0))))
    logs = jnp.log(jnp.pad(dt.astype(wide), ((0, 0), (0, length - t), (0, 0))))  # a step of zero adds nothing
    logs = logs.reshape(b, chunks, size, g, r).transpose(0, 1, 3, 4, 2)
    d = chunk.decay(c, weight=logs)

    # Heads share a tile of lanes while their number divides the group's.
    share = next(i for i in range(max(1, _LANES // p), 0, -1) if r % i == 0)
    tiles, lanes = r // share, share * p
    scores = chunk.dot("bcgqn,bcgsn->bcgqs", c.q, c.k, dtype)
    weights = (scores[:, :, :, None] * d.within).astype(dtype).reshape(b, chunks, g, tiles, share, size, size)
    rows = math.gcd(size, _SUBLANES)  # whole tiles are moved where a chunk holds whole tiles
    tiled = x.reshape(b, length // rows, rows, g * tiles, lanes).transpose(0, 3, 1, 2, 4)
    # As a fusion of its own, for the barrier, moving the tiles costs less than as a bare copy.
    tiled = jax.lax.optimization_barrier(tiled).reshape(b, g, tiles, chunks, 1, size, lanes)
    diagonal = (jnp.arange(lanes) // p == jnp.arange(share)[:, None]).astype(dtype)
    own = chunk.dot("bcgwjqs,bgwcjsl->bgwcql", weights, tiled * diagonal[:, None], dtype)
    own = own.reshape(b, g * tiles, length // rows, rows, lanes).transpose(0, 2, 3, 1, 4).reshape(b, length, h * p)

    def step(state, now):
        x, k, q, out, into, whole = now
        through = chunk.dot("bgqn,bgne->bqge", q, state.astype(dtype), dtype).reshape(b, size, h * p)
        v = (x * _spread(out, p, dtype)).astype(dtype).reshape(b, size, g, r * p)
        added = chunk.dot("bsgn,bsge->bgne", k, v, dtype)
        return state * whole[..., None, :] + added, through * _spread(into, p, dtype)

    out, into = (z.reshape(b, chunks, h, size) for z in (d.out, d.into))
    by_chunk = (x.reshape(b, chunks, size, h * p), jnp.moveaxis(c.k, 2, 3), c.q, out, into, jnp.repeat(d.whole, p, -1))
    final, through = _walk(step, start, by_chunk)
    y = (own + through).astype(dtype)[:, :t]
    return y, final.reshape(b, g, n, r, p).transpose(0, 1, 3, 4, 2).reshape(b, h, p, n)


def bwd(residuals, cotangents, *, chunk_size):
    """See `xla_chunks.bwd`."""
    return backward(xla_chunks.bwd, residuals, cotangents, chunk_size=chunk_size or _BACKWARD_CHUNK)


IMPL = Impl(fwd=fwd, bwd=bwd)

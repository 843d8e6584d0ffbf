"""`xla_chunks` for TPUs, with heads side by side in the lanes of their vector units.

A TPU's arrays lie in tiles of 8 by 128 lanes. A head has fewer channels than that, so an array whose last axis is one
head's channels would fill its tiles in part, and the compiler turns time into the last axis instead: x, v and y are
then transposed in memory on the way in and out. Here x and y keep all heads' channels in one axis, [b, t, h * p]:

- a product with one head's decays takes the heads that share 128 lanes together: their decays side by side on the
  contracted axis, their channels on a block diagonal. The matrix unit is as busy as with one head alone, as it is no
  less wide than a tile;
- what scales a head, [.., h], is spread over its channels by a product with zeros and ones, which the matrix unit does
  for less than the vector unit takes to repeat lanes;
- states are [n, h * p], and their products with k and q are plain ones over all heads.

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
# So many chunks' states are passed without a loop, and so many by one kernel.
_UNROLLED, _FUSED = 16, 4


def _spread(z, p: int, dtype):
    """Repeats each of z [b, c, h, q] over p channels, as [b, c * q, h * p] in float32 (float64 in float64).

    Rounded to `dtype` where that has 16 bits, as the operands of the products are; else exact. A NaN spreads to all
    heads of its position.
    """
    ones = jnp.repeat(jnp.eye(z.shape[2], dtype=dtype), p, axis=1)
    exact = jax.lax.Precision.HIGHEST if ones.dtype.itemsize > 2 else None
    wide = jnp.promote_types(jnp.float32, dtype)
    y = jnp.einsum("bchq,he->bcqe", z.astype(dtype), ones, precision=exact, preferred_element_type=wide)
    return y.reshape(z.shape[0], -1, z.shape[2] * p)


def _pass(state, whole, added, dtype):
    """Returns the state at the end, and those before each chunk in `dtype`: s_{c+1} = whole_c s_c + added_c.

    state [b, g, n, e]; whole [b, c, g, e]; added [b, c, g, n, e].
    """
    chunks = added.shape[1]
    if chunks > _UNROLLED:

        def body(s, now):
            whole, added = now
            return s * whole[..., None, :] + added, s.astype(dtype)

        leading = (jnp.moveaxis(whole, 1, 0), jnp.moveaxis(added, 1, 0))
        state, before = jax.lax.scan(body, state, leading, unroll=2 * _FUSED)
        return state, jnp.moveaxis(before, 0, 1)
    before = []
    for i in range(chunks):
        before.append(state.astype(dtype))
        state = state * whole[:, i, :, None] + added[:, i]
        if i % _FUSED == _FUSED - 1:
            state = jax.lax.optimization_barrier(state)
    return state, jnp.stack(before, 1)


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

    def heads(z):  # [b, c, g, r, q] -> [b, c, h, q]
        return z.reshape(b, chunks, h, size)

    # Heads share a tile of lanes while their number divides the group's.
    share = next(i for i in range(max(1, _LANES // p), 0, -1) if r % i == 0)
    tiles, lanes = r // share, share * p
    scores = chunk.dot("bcgqn,bcgsn->bcgqs", c.q, c.k, dtype)
    weights = (scores[:, :, :, None] * d.within).astype(dtype).reshape(b, chunks, g, tiles, share, size, size)
    rows = math.gcd(size, _SUBLANES)  # whole tiles are moved where a chunk holds whole tiles
    tiled = x.reshape(b, length // rows, rows, g * tiles, lanes).transpose(0, 3, 1, 2, 4)
    tiled = tiled.reshape(b, g, tiles, chunks, 1, size, lanes)
    diagonal = (jnp.arange(lanes) // p == jnp.arange(share)[:, None]).astype(dtype)
    own = chunk.dot("bcgwjqs,bgwcjsl->bgwcql", weights, tiled * diagonal[:, None], dtype)
    own = own.reshape(b, g * tiles, length // rows, rows, lanes).transpose(0, 2, 3, 1, 4).reshape(b, length, h * p)

    v = (x * _spread(heads(d.out), p, dtype)).astype(dtype)
    v = jnp.moveaxis(v.reshape(b, chunks, size, g, r * p), 3, 2)
    added = chunk.dot("bcgsn,bcgse->bcgne", c.k, v, dtype)
    final, before = _pass(start, jnp.repeat(d.whole, p, -1), added, dtype)
    through = chunk.dot("bcgqn,bcgne->bcqge", c.q, before, dtype).reshape(b, length, h * p)
    through = jax.lax.optimization_barrier(through * _spread(heads(d.into), p, dtype))
    y = (own + through).astype(dtype)[:, :t]
    return y, final.reshape(b, g, n, r, p).transpose(0, 1, 3, 4, 2).reshape(b, h, p, n)


def bwd(residuals, cotangents, *, chunk_size):
    """See `xla_chunks.bwd`."""
    return backward(xla_chunks.bwd, residuals, cotangents, chunk_size=chunk_size or _BACKWARD_CHUNK)


IMPL = Impl(fwd=fwd, bwd=bwd)

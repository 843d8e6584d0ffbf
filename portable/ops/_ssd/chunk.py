"""The mathematics of one chunk, over any leading axes; both XLA forms are built from these functions.

Shapes, with "..." for batch (and chunk) axes, r = heads of a group, s and q = positions in the chunk:
large, small [..., g, r, q], whose sum is the log decay from the chunk's start; k, q [..., g, q, n];
v [..., g, r, q, p]; states [..., g, r, p, n] in float32.
Source: Dao and Gu 2024, "Transformers are SSMs", section 6 (block decomposition of the semiseparable matrix).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._arguments import vary_together


class Chunk(NamedTuple):
    """A chunk's operands, head-major; `counts` [..., q] numbers the segments inside the chunk, or is None."""

    large: jax.Array
    small: jax.Array
    k: jax.Array
    v: jax.Array
    q: jax.Array
    counts: jax.Array | None


class Decay(NamedTuple):
    """Products of decays inside a chunk, zero across segments.

    within [..., g, r, q, s]: from s to q. into [..., g, r, q]: from the chunk's start to q. out [..., g, r, s]: from s
    to the chunk's end. whole [..., g, r]: from start to end.
    """

    within: jax.Array
    into: jax.Array
    out: jax.Array
    whole: jax.Array


def sums(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the cumulative sums (large, small) of log decays a over the last axis, a chunk.

    A difference of two cumulative sums loses the digits that both share, and sums of logs reach hundreds. So each log
    is cut into a multiple of `grid`, whose sums over the chunk are exact, and a rest too small to lose digits. Logs
    are first clamped to where their exponential is zero, which bounds the sums and changes no product.
    """
    size = a.shape[-1]
    limits = jnp.finfo(a.dtype)
    floor = math.log(float(limits.smallest_subnormal))
    grid = 2.0 ** (math.ceil(math.log2(-floor * size)) - limits.nmant - 1)
    a = jnp.maximum(a, floor)
    coarse = jnp.round(a / grid) * grid
    return jnp.cumsum(coarse, -1), jnp.cumsum(a - coarse, -1)


def differences(x: jax.Array) -> jax.Array:
    """Returns x[q] - x[s] for all pairs, [..., q] -> [..., q, s]."""
    return x[..., :, None] - x[..., None, :]


def decay(c: Chunk, differences=differences, weight: jax.Array | None = None) -> Decay:
    """Returns every product of decays in a chunk; `differences` forms those of the sums of logs.

    With `weight` [..., g, r, s], the log of a factor for each position, `within` and `out` are products with it.
    """
    large, small, counts = c.large, c.small, c.counts
    # Where products take 16-bit operands, the digits that one sum loses are far below theirs.
    exact = c.v.dtype.itemsize > 2
    logs = jnp.minimum(differences(large) + differences(small) if exact else differences(large + small), 0)
    mask = jnp.tril(jnp.ones((large.shape[-1],) * 2, bool))
    into, out = large + small, jnp.minimum((large[..., -1:] - large) + (small[..., -1:] - small), 0)
    whole = into[..., -1]
    if weight is not None:
        logs, out = logs + weight[..., None, :], out + weight
    if counts is not None:
        seen = counts[..., None, None, :]  # axes for g, r
        mask = mask & (seen[..., :, None] == seen[..., None, :])
        into = jnp.where(seen == 0, into, -jnp.inf)
        out = jnp.where(seen == seen[..., -1:], out, -jnp.inf)
        whole = jnp.where(seen[..., -1] == 0, whole, -jnp.inf)
    return Decay(jnp.exp(jnp.where(mask, logs, -jnp.inf)), jnp.exp(into), jnp.exp(out), jnp.exp(whole))


def dot(spec: str, x: jax.Array, y: jax.Array, dtype) -> jax.Array:
    """Einsum of operands in `dtype`, accumulated in float32 (float64 in float64)."""
    wide = jnp.promote_types(jnp.float32, dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=wide)


def update(c: Chunk, d: Decay) -> jax.Array:
    """Returns what the chunk adds to the state at its end, [..., g, r, p, n]."""
    return dot("...grsp,...gsn->...grpn", c.v * d.out[..., None], c.k, c.v.dtype)


def output(c: Chunk, d: Decay, state: jax.Array) -> jax.Array:
    """Returns the chunk's y [..., g, r, q, p] from its own tokens and the state at its start."""
    scores = dot("...gqn,...gsn->...gqs", c.q, c.k, c.v.dtype)
    own = dot("...grqs,...grsp->...grqp", scores[..., None, :, :] * d.within, c.v, c.v.dtype)
    return own + dot("...gqn,...grpn->...grqp", c.q, state, c.v.dtype) * d.into[..., None]


def state_gradient(c: Chunk, d: Decay, dy: jax.Array) -> jax.Array:
    """Returns the part of the cotangent of the state at the chunk's start that comes through y."""
    return dot("...grqp,...gqn->...grpn", dy * d.into[..., None], c.q, c.v.dtype)


def gradients(c: Chunk, d: Decay, state: jax.Array, dy: jax.Array, dstate: jax.Array):
    """Returns the cotangents (da, dk, dv, dq) of a chunk, given those of y and of the state at the chunk's end.

    The cotangent of a log decay sums over every pair of positions that it lies between. It is formed as such, with a
    triangular product, and not as a difference of row and column sums, which would cancel when decays are strong.
    """
    scores = dot("...gqn,...gsn->...gqs", c.q, c.k, c.v.dtype)
    weights = scores[..., None, :, :] * d.within
    dscores = dot("...grqp,...grsp->...grqs", dy, c.v, c.v.dtype) * d.within
    summed = dscores.sum(-3)
    # Products with a state take all heads of a group in one GEMM: the output of a head only ever meets that head.
    dy_in, v_out = dy * d.into[..., None], c.v * d.out[..., None]
    dq = dot("...gqs,...gsn->...gqn", summed, c.k, c.v.dtype) + dot("...grqp,...grpn->...gqn", dy_in, state, c.v.dtype)
    dk = dot("...gqs,...gqn->...gsn", summed, c.q, c.v.dtype) + dot("...grsp,...grpn->...gsn", v_out, dstate, c.v.dtype)
    into_state = dot("...gsn,...grpn->...grsp", c.k, dstate, c.v.dtype)
    dv = dot("...grqs,...grqp->...grsp", weights, dy, c.v.dtype) + into_state * d.out[..., None]

    # da[m] = sum over s < m <= q of weights[q, s] * dweights[q, s], then the pairs with the chunk's start and end.
    upto = jnp.tri(c.large.shape[-1], dtype=d.within.dtype)  # [q, m]: m <= q
    pairs = jnp.einsum("...grqs,qm->...grms", scores[..., None, :, :] * dscores, upto)
    da = jnp.einsum("...grms,sm->...grm", pairs, 1 - upto, precision=jax.lax.Precision.HIGHEST)
    from_state = dot("...gqn,...grpn->...grqp", c.q, state, c.v.dtype)
    through, leaving = (from_state * dy_in).sum(-1), (into_state * v_out).sum(-1)
    da = da + jnp.einsum("...q,qm->...m", through, upto) + jnp.einsum("...s,sm->...m", leaving, 1 - upto)
    da = da + (d.whole * (state * dstate).sum((-1, -2)))[..., None]
    return da, dk, dv, dq


def split(size: int, a, k, v, q, boundaries) -> Chunk:
    """Cuts [b, t, ...] arrays into chunks, head-major: leading axes [b, c]; the last chunk is padded.

    A padded position has decay 1 and adds nothing, so the final state is that of the last real position.
    """
    b, t, h, p = v.shape
    g = k.shape[2]
    chunks = max(1, math.ceil(t / size))

    def cut(x, *, mode="constant"):
        pad = [(0, 0), (0, chunks * size - t)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, pad, mode=mode) if t < chunks * size else x
        return x.reshape(b, chunks, size, *x.shape[2:])

    counts = None
    if boundaries is not None:
        counts = cut(boundaries, mode="edge" if t else "constant")
        # Relative to the position before the chunk, so that 0 means "the state at the start reaches here".
        before = jnp.concatenate([jnp.zeros_like(counts[:, :1, -1:]), counts[:, :-1, -1:]], axis=1)
        counts = counts - before
    a = cut(a.reshape(b, t, g, h // g)).transpose(0, 1, 3, 4, 2)
    v = cut(v.reshape(b, t, g, h // g, p)).transpose(0, 1, 3, 4, 2, 5)
    k, q = (cut(x).transpose(0, 1, 3, 2, 4) for x in (k, q))
    return Chunk(*sums(a), k, v, q, counts)


def join_heads(x: jax.Array, t: int) -> jax.Array:
    """[b, c, g, r, q, ...] -> [b, t, h, ...], the inverse of `split` for a and v."""
    x = jnp.moveaxis(x, 4, 2)
    b, c, q, g, r, *rest = x.shape
    return x.reshape(b, c * q, g * r, *rest)[:, :t]


def join_groups(x: jax.Array, t: int) -> jax.Array:
    """[b, c, g, q, n] -> [b, t, g, n], the inverse of `split` for k and q."""
    x = jnp.moveaxis(x, 3, 2)
    b, c, q, *rest = x.shape
    return x.reshape(b, c * q, *rest)[:, :t]


def grouped(state, v: jax.Array, k: jax.Array) -> jax.Array:
    """Returns the state at the start as [b, g, r, p, n] in the accumulator's dtype, zeros where there is none."""
    b, _, h, p = v.shape
    g, n = k.shape[2:]
    dtype = jnp.promote_types(jnp.float32, v.dtype)
    if state is None:
        return vary_together(v, jnp.zeros((b, g, h // g, p, n), dtype))[1]
    return state.astype(dtype).reshape(b, g, h // g, p, n)


def flat(state: jax.Array) -> jax.Array:
    """[b, g, r, p, n] -> [b, h, p, n]."""
    b, g, r, *rest = state.shape
    return state.reshape(b, g * r, *rest)


def cotangents(residuals, da, dk, dv, dq, dstate):
    """Returns the gradients of the chunks as those of the op's arguments, in their shapes and dtypes."""
    a, k, v, q, state, _ = residuals
    t = v.shape[1]
    return (
        join_heads(da, t).astype(a.dtype),
        join_groups(dk, t).astype(k.dtype),
        join_heads(dv, t).astype(v.dtype),
        join_groups(dq, t).astype(q.dtype),
        None if state is None else flat(dstate).astype(state.dtype),
        None,
    )

"""`ssd` by Triton kernels: a walk passes the states from chunk to chunk, all chunks' results are then taken at once.

Backward, a second walk passes the states' cotangents the other way. States are kept at the chunks' starts only, in the
dtype of v, so memory is linear in t; scores never leave a program.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from portable.checks import Unavailable
from portable.ops._ssd import chunk
from portable.ops._ssd.scaled import scaled
from portable.pallas_kernels.gpu import _launch
from portable.pallas_kernels.gpu._launch import Config
from portable.selection import Impl

DEFAULT_CHUNK = 64
# Heads of a group whose gradients one program sums. Fewer fill a GPU with short sequences, and cost memory: a float32
# [b, t, g, n] for each part.
GROUP_HEADS = 8
# By the bytes of an operand. Float32 products do not run on tensor cores and hold their operands in registers.
CONFIGS = {
    2: {
        "walk": Config(block_p=64, block_n=32, warps=4, stages=3),
        "outputs": Config(block_p=64, block_n=64, warps=4, stages=2),
        "head_gradients": Config(block_p=32, block_n=64, warps=8, stages=2),
        "group_gradients": Config(block_p=32, block_n=64, warps=8, stages=2),
    },
    4: {
        "walk": Config(block_p=32, block_n=32, warps=4, stages=1),
        "outputs": Config(block_p=32, block_n=32, warps=4, stages=1),
        "head_gradients": Config(block_p=16, block_n=16, warps=8, stages=1),
        "group_gradients": Config(block_p=32, block_n=32, warps=8, stages=1),
    },
}


def fwd(a, k, v, q, state, boundaries, *, chunk_size):
    """S_t = exp(a_t) S_{t-1} + v_t k_t^T (S_{t-1} = 0 where a segment starts);  y_t = S_t q_t.

    Args:
      a: [b, t, h] float32. k, q: [b, t, g, n]. v: [b, t, h, p]. state: [b, h, p, n] or None. boundaries: [b, t]
        int32, the segments that began until a position, or None.
      chunk_size: positions in a chunk; None takes 64.

    Returns:
      y [b, t, h, p] in the dtype of v, and the state after the last position in float32.
    """
    return _launch.batchable(functools.partial(_fwd, chunk_size))(a, k, v, q, state, boundaries)


def bwd(residuals, cotangents, *, chunk_size):
    """Returns the cotangents of the arguments of `fwd`, in their dtypes; None for those that have none."""
    return _launch.batchable(functools.partial(_bwd, chunk_size))(residuals, cotangents)


def _fwd(chunk_size, a, k, v, q, state, boundaries):
    run = _Call(a, k, v, boundaries, chunk_size)
    states, final = run.walk(k, v, state)
    b, _, h, p = v.shape
    (y,) = run("outputs", (k, v, q, states), (v,), lambda c: (b * run.chunks * h, p // c.block_p))
    return y, final


def _bwd(chunk_size, residuals, cotangents):
    a, k, v, q, state, boundaries = residuals
    dy, dfinal = cotangents
    dy = dy.astype(v.dtype)
    run = _Call(a, k, v, boundaries, chunk_size)
    states, _ = run.walk(k, v, state)
    dstates, dstate = run.walk(q, dy, dfinal, reverse=True)
    given = (k, v, q, dy, states, dstates)
    b, _, h, _ = v.shape
    g, n = k.shape[2:]
    da = ShapeDtypeStruct(a.shape, jnp.float32)
    da, dv = run("head_gradients", given, (da, v), lambda c: (b * run.chunks * h,))

    heads = min(GROUP_HEADS, h // g)
    parts = math.ceil(h // g / heads)
    partial = [ShapeDtypeStruct((parts, *x.shape), jnp.float32 if parts > 1 else x.dtype) for x in (k, q)]
    grid = lambda c: (b * run.chunks * g, parts, n // c.block_n)  # noqa: E731
    dk, dq = run("group_gradients", given, partial, grid, HEADS=heads)
    dk, dq = dk.sum(0).astype(k.dtype), dq.sum(0).astype(q.dtype)
    return da.astype(a.dtype), dk, dv, dq, None if state is None else dstate.astype(state.dtype), None


class _Call:
    """What all kernels of a call are given: decays, and sizes as constants."""

    def __init__(self, a, k, v, boundaries, chunk_size):
        _, t, h, p = v.shape
        g, n = k.shape[2:]
        # A short sequence takes the smallest chunk that holds it.
        size = min(chunk_size or DEFAULT_CHUNK, max(16, 1 << (t - 1).bit_length()))
        self.chunks = math.ceil(t / size)
        self.v, self.n = v, n
        large, small = chunk.sums(_cut(a, size).transpose(0, 3, 1, 2))
        self.decays = (large, small, large if boundaries is None else _since(_cut(boundaries, size, mode="edge")))
        self.constants = {"T": t, "H": h, "G": g, "P": p, "N": n, "C": self.chunks, "SIZE": size}
        self.constants["SEGMENTS"] = boundaries is not None

    def __call__(self, name, arrays, results, grid, **constants):
        from portable.pallas_kernels.gpu import _ssd_kernels

        config = CONFIGS[self.v.dtype.itemsize][name]
        config = config._replace(block_p=min(config.block_p, self.v.shape[3]), block_n=min(config.block_n, self.n))
        constants |= self.constants | {"BLOCK_P": config.block_p, "BLOCK_N": config.block_n}
        results = [ShapeDtypeStruct(x.shape, x.dtype) for x in results]
        kernel = getattr(_ssd_kernels, name)
        return _launch.call(kernel, (*self.decays, *arrays), results, grid(config), config=config, **constants)

    def walk(self, keys, values, start, *, reverse=False):
        """Returns the states at every chunk's start [b, h, chunks, p, n] (its end if reverse), and the last one."""
        b, _, h, p = values.shape
        shape = (b, h, p, self.n)
        start = jnp.zeros(shape, jnp.float32) if start is None else start.astype(jnp.float32)
        results = ShapeDtypeStruct((b, h, self.chunks, p, self.n), values.dtype), start
        grid = lambda c: (b * h, p // c.block_p, self.n // c.block_n)  # noqa: E731
        return self("walk", (keys, values, start), results, grid, REVERSE=reverse)


def _cut(x, size, *, mode="constant"):
    """Returns [b, chunks, size, ...] of [b, t, ...]; the last chunk is padded."""
    b, t, *rest = x.shape
    if t % size:
        x = jnp.pad(x, [(0, 0), (0, -t % size)] + [(0, 0)] * len(rest), mode=mode)
    return x.reshape(b, -1, size, *rest)


def _since(counts):
    """Returns boundaries [b, chunks, size] since the position before each chunk: 0 is what its start state reaches."""
    before = jnp.pad(counts[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
    return (counts - before).astype(jnp.int32)


def refuses(a, k, v, q, state, boundaries, *, chunk_size) -> str | None:
    """Says in a sentence why the kernels cannot take arguments of these shapes and dtypes; None when they can."""
    b, t, h, p = v.shape
    n = k.shape[3]
    if 0 in (b, t, h):
        return f"it needs at least one row, position and head; got v of shape {list(v.shape)}."
    for letter, size in {"p": p, "n": n}.items():
        if size not in (16, 32, 64, 128, 256):
            return f"it needs {letter} to be a power of two from 16 to 256; got {letter}={size}."
    if chunk_size not in (None, 16, 32, 64):
        return f"it needs a chunk_size of 16, 32 or 64 (the result is the same); got {chunk_size}."
    if a.dtype != jnp.float32:
        return f"it needs log decays in float32; got {a.dtype}."
    for letter, x in {"k": k, "v": v, "q": q, "state": state}.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            return f"it needs float32, bfloat16 or float16; got {letter} in {x.dtype}."
    return None


TAKES = scaled(Impl(fwd=fwd, bwd=bwd, why_not=refuses))


def why_not(*arrays, **options) -> str | None:
    """Returns `refuses`, or which package is not installed."""
    return TAKES.why_not(*arrays, **options) or _launch.missing("triton", "jax_triton")


def interpret(part, *args, **options):
    """Runs `fwd` or `bwd` ("fwd", "bwd") by Triton's interpreter on the CPU; see `_launch.interpret`.

    Raises:
      Unavailable: the kernels cannot take the arguments, or triton or torch is not installed.
    """
    if reason := TAKES.why_not(*(args if part == "fwd" else args[0]), **options):
        raise Unavailable(f"ssd: 'triton' cannot take this call: {reason}")
    return _launch.interpret(__name__, part, args, options)


IMPL = dataclasses.replace(TAKES, why_not=why_not, interpret=interpret)

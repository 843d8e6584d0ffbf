"""The chunked recurrence of `ssd` on a TPU: a chunk's scores stay in VMEM, the state is carried through the grid.

The grid is (batch row, group, chunk, block of the group's heads), the last two in order. Arrays keep their layout in
memory: x is read as [b, t, h*p] in blocks of whole lanes, so several heads share a block of 128 lanes, and the state is
held transposed, [n, h*p]. Products with a state then take all heads of a block at once. The maths, and the names, are
those of `portable.ops._ssd.chunk`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from portable.ops._ssd import chunk
from portable.ops._ssd.scaled import scaled
from portable.selection import Impl

LANES = 128
DEFAULT_CHUNK = 128  # the side of an MXU, and of the smallest block that can be transposed
WIDEST = 512  # lanes in a block of heads
ALL = slice(None)
EXACT = jax.lax.Precision.HIGHEST


class Sizes(NamedTuple):
    """Sizes of a call: those of the op; `size` positions a chunk, `heads` a block; `lanes` that share a loop step."""

    b: int
    t: int
    g: int
    n: int
    p: int
    size: int
    heads: int
    blocks: int  # of a group's heads
    lanes: int

    @property
    def chunks(self) -> int:
        return math.ceil(self.t / self.size)

    @property
    def width(self) -> int:
        return self.heads * self.p

    @property
    def grid(self) -> tuple[int, ...]:
        return (self.b, self.g, self.chunks, self.blocks)


def _heads(r: int, p: int) -> int | None:
    """Returns how many of a group's r heads make a block: the most whose lanes are whole tiles."""
    whole = [i for i in range(1, min(r, LANES) + 1) if r % i == 0 and i * p % LANES == 0]
    return max((i for i in whole if i == 1 or i * p <= WIDEST), default=None)


def _sizes(k, v, chunk_size: int | None) -> Sizes:
    b, t, h, p = v.shape
    g, n = k.shape[2:]
    heads = _heads(h // g, p) or h
    return Sizes(b, t, g, n, p, chunk_size or DEFAULT_CHUNK, heads, h // g // heads, max(p, min(LANES, heads * p)))


def why_not(a, k, v, q, state, boundaries, *, chunk_size) -> str | None:
    """Says in a sentence why the kernel cannot take a call."""
    h, p = v.shape[2:]
    g, n = k.shape[2:]
    if v.dtype not in (jnp.float32, jnp.bfloat16):
        return f"x must be float32 or bfloat16; got {v.dtype}."
    if len({x.dtype for x in (k, v, q)}) > 1:
        return f"x, B and C must have one dtype; got {v.dtype}, {k.dtype} and {q.dtype}."
    if a.dtype != jnp.float32 or (state is not None and state.dtype != jnp.float32):
        return "dt and the state must be float32."
    if not (v.size and k.size):
        return f"it needs at least one element; got x {list(v.shape)}, B {list(k.shape)}."
    if chunk_size is not None and chunk_size % LANES:
        return f"chunk_size must be a multiple of {LANES}; got {chunk_size}."
    if LANES % p and p % LANES:
        return f"the head size p must divide {LANES} or be a multiple of it; got {p}."
    if g > 1 and n % LANES:
        return f"with several groups the state size n must be a multiple of {LANES}; got {n}."
    if _heads(h // g, p) is None and (g > 1 or h * p > LANES):
        return f"a group's heads must fill whole blocks of {LANES} lanes; got {h // g} heads of {p}."
    return None


class Decays(NamedTuple):
    """Sums of log decays of a block's heads: rows [heads, size], columns [size, 128], and segment numbers or None."""

    large: jax.Array
    small: jax.Array
    large_columns: jax.Array
    small_columns: jax.Array
    mask: jax.Array
    seen: jax.Array | None  # [size, 1], segments begun inside the chunk
    seen_last: jax.Array | None  # [1, 1]

    def within(self, i: int) -> jax.Array:
        """Returns products of decays from s to q, [q, s]."""
        at = slice(i, i + 1)
        logs = (self.large_columns[:, at] - self.large[at]) + (self.small_columns[:, at] - self.small[at])
        return jnp.exp(jnp.where(self.mask, jnp.minimum(logs, 0), -jnp.inf))

    def into(self, i: int) -> jax.Array:
        """Returns products from the chunk's start to q, [q, 1]."""
        sums = self.large_columns[:, i : i + 1] + self.small_columns[:, i : i + 1]
        return jnp.exp(sums if self.seen is None else jnp.where(self.seen == 0, sums, -jnp.inf))

    def out(self, i: int) -> jax.Array:
        """Returns products from s to the chunk's end, [s, 1]."""
        at = slice(i, i + 1)
        large = self.large[at, -1:] - self.large_columns[:, at]
        sums = jnp.minimum(large + (self.small[at, -1:] - self.small_columns[:, at]), 0)
        return jnp.exp(sums if self.seen is None else jnp.where(self.seen == self.seen_last, sums, -jnp.inf))

    def whole(self, i: int) -> jax.Array:
        """Returns the product over the chunk, [1, 1]."""
        sums = self.large[i : i + 1, -1:] + self.small[i : i + 1, -1:]
        return jnp.exp(sums if self.seen is None else jnp.where(self.seen_last == 0, sums, -jnp.inf))


def _columns(rows: jax.Array) -> jax.Array:
    """[heads, size] -> [size, 128]; whole tiles are transposed."""
    return jnp.concatenate([rows, jnp.zeros((LANES - rows.shape[0], rows.shape[1]), rows.dtype)]).T


def _decays(large, small, counts) -> Decays:
    size = large.shape[-1]
    mask = _iota(size, size, 0) >= _iota(size, size, 1)
    seen = seen_last = None
    if counts is not None:
        seen, seen_last = _columns(counts)[:, :1], counts[:, -1:]
        mask = mask & (seen == counts)
    return Decays(large, small, _columns(large), _columns(small), mask, seen, seen_last)


def _iota(rows: int, columns: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (rows, columns), axis)


def _dot(x, y, dims: tuple[int, int] = (1, 0), precision=None) -> jax.Array:
    """Contracts x's axis dims[0] with y's dims[1], summed in float32."""
    contract = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(x, y, contract, precision=precision, preferred_element_type=jnp.float32)


def _spread(s: Sizes, first: int, value) -> jax.Array:
    """Returns `value(i)` of each head of a loop step, over that head's lanes."""
    out, lane = value(first), _iota(1, s.lanes, 1)
    for i in range(1, s.lanes // s.p):
        out = jnp.where(lane >= i * s.p, value(first + i), out)
    return out


def _steps(s: Sizes):
    """Yields (lanes, heads) of each loop step over a block: its slice of lanes, the heads that share it."""
    each = s.lanes // s.p
    for w in range(s.width // s.lanes):
        yield slice(w * s.lanes, (w + 1) * s.lanes), range(w * each, (w + 1) * each)


def _own(s: Sizes, i: int, x: jax.Array) -> jax.Array:
    """Returns x [..., lanes] with the lanes of the other heads of its loop step zeroed."""
    if s.lanes == s.p:
        return x
    lane, first = _iota(1, s.lanes, 1), i * s.p % s.lanes
    return jnp.where((lane >= first) & (lane < first + s.p), x, jnp.zeros_like(x))


def _loader(s: Sizes, c):
    """Returns a function that reads a block [1, size, ...] of a sequence, rows past its end zeroed."""
    if s.t % s.size == 0:
        return lambda ref, lanes: ref[0, :, lanes]

    def load(ref, lanes: slice):
        x = ref[0, :, lanes]
        return jnp.where(_iota(x.shape[0], x.shape[1], 0) < s.t - c * s.size, x, jnp.zeros_like(x))

    return load


def _walk(s: Sizes, outputs: bool, *refs):
    """One step of the walk forwards: writes y, or (for the backward) the state before the chunk."""
    large, small, counts, k, q, v, start, *written, state, scores = refs
    c, j = pl.program_id(2), pl.program_id(3)
    load = _loader(s, c)
    keys, dtype = load(k, ALL), v.dtype

    @pl.when(c == 0)
    def _():
        state[j] = jnp.zeros_like(state[j]) if start is None else start[0]

    d = _decays(large[0, 0], small[0, 0], None if counts is None else counts[0])
    if outputs:
        queries = load(q, ALL)

        @pl.when(j == 0)
        def _():
            scores[...] = _dot(queries, keys, (1, 1))

        within = {i: (scores[...] * d.within(i)).astype(dtype) for i in range(s.heads)}
    for lanes, heads in _steps(s):
        before, x = state[j, :, lanes], load(v, lanes)
        if outputs:
            out = _dot(queries, before.astype(dtype)) * _spread(s, heads[0], d.into)
            out += sum(_own(s, i, _dot(within[i], x)) for i in heads)
            written[0][0, :, lanes] = out.astype(dtype)
        else:
            written[0][0, 0, :, lanes] = before
        leaving = (x * _spread(s, heads[0], d.out)).astype(dtype)
        state[j, :, lanes] = before * _spread(s, heads[0], d.whole) + _dot(keys, leaving, (0, 0))

    if outputs:

        @pl.when(c == s.chunks - 1)
        def _():
            written[1][0] = state[j]


def _walk_back(s: Sizes, large, small, counts, k, q, v, dy, starts, dfinal, dk, dv, dq, da, dstart, dstate, scores,
               summed, keys_sum, queries_sum):  # fmt: skip
    """One step of the walk backwards: all gradients of a chunk; see `chunk.gradients`."""
    c, j = s.chunks - 1 - pl.program_id(2), pl.program_id(3)
    load = _loader(s, c)
    keys, queries, dtype = load(k, ALL), load(q, ALL), v.dtype

    @pl.when(c == s.chunks - 1)
    def _():
        dstate[j] = dfinal[0]

    @pl.when(j == 0)
    def _():
        scores[...] = _dot(queries, keys, (1, 1))
        for ref in (summed, keys_sum, queries_sum):
            ref[...] = jnp.zeros_like(ref)

    d = _decays(large[0, 0], small[0, 0], None if counts is None else counts[0])
    lane = _iota(1, LANES, 1)
    upto = (_iota(s.size, s.size, 0) <= _iota(s.size, s.size, 1)).astype(jnp.float32)  # [m, q]: m <= q
    da_pairs, through, leaving_sums = (jnp.zeros((s.size, LANES), jnp.float32) for _ in range(3))
    for lanes, heads in _steps(s):
        before, after = starts[0, 0, :, lanes], dstate[j, :, lanes]
        x, dout = load(v, lanes), load(dy, lanes)
        into, out = _spread(s, heads[0], d.into), _spread(s, heads[0], d.out)
        entering, leaving = dout * into, x * out
        from_state, into_state = _dot(queries, before.astype(dtype)), _dot(keys, after.astype(dtype))
        dx = into_state * out
        for i in heads:
            within = d.within(i)
            dscores = _dot(_own(s, i, dout), x, (1, 1)) * within
            summed[...] += dscores
            dx += _own(s, i, _dot((scores[...] * within).astype(dtype), dout, (0, 0)))
            reaching = _dot(upto, scores[...] * dscores, precision=EXACT)  # [m, s]: pairs with q >= m
            pairs = jnp.where(_iota(s.size, s.size, 1) < _iota(s.size, s.size, 0), reaching, 0)
            held = jnp.sum(_own(s, i, before * after), (0, 1), keepdims=True) * d.whole(i)
            read = jnp.sum(_own(s, i, from_state * entering), 1, keepdims=True)
            left = jnp.sum(_own(s, i, into_state * leaving), 1, keepdims=True)
            da_pairs = jnp.where(lane == i, jnp.sum(pairs, 1, keepdims=True) + held, da_pairs)
            through, leaving_sums = jnp.where(lane == i, read, through), jnp.where(lane == i, left, leaving_sums)
        dv[0, :, lanes] = dx.astype(dtype)
        entering, leaving = entering.astype(dtype), leaving.astype(dtype)
        queries_sum[...] += _dot(entering, before.astype(dtype), (1, 1))
        keys_sum[...] += _dot(leaving, after.astype(dtype), (1, 1))
        dstate[j, :, lanes] = after * _spread(s, heads[0], d.whole) + _dot(queries, entering, (0, 0))
    columns = da_pairs + _dot(upto, through, precision=EXACT)
    columns += _dot(1 - upto, leaving_sums, precision=EXACT)
    da[0, 0] = columns.T[: s.heads]

    @pl.when(j == s.blocks - 1)
    def _():
        shared = summed[...].astype(dtype)
        dq[0] = (queries_sum[...] + _dot(shared, keys)).astype(dtype)
        dk[0] = (keys_sum[...] + _dot(shared, queries, (0, 0))).astype(dtype)

    @pl.when(c == 0)
    def _():
        dstart[0] = dstate[j]


class Operands(NamedTuple):
    """The op's arguments as the kernels read them, and how they are cut into blocks."""

    arrays: list
    specs: list


def _operands(s: Sizes, a, k, v, q, boundaries, at) -> Operands:
    """Lays out sums of log decays [b, blocks, heads, T] and the sequences [b, t, features]; `at` gives the chunk."""
    tail = ((0, 0), (0, s.chunks * s.size - s.t))
    a = jnp.pad(a, (*tail, (0, 0))).reshape(s.b, s.chunks, s.size, s.g * s.blocks, s.heads)
    sums = [x.reshape(s.b, s.g * s.blocks, s.heads, -1) for x in chunk.sums(a.transpose(0, 3, 4, 1, 2))]
    by_head = pl.BlockSpec((1, 1, s.heads, s.size), lambda b, g, c, j: (b, g * s.blocks + j, 0, at(c)))
    arrays, specs = [*sums, None], [by_head, by_head, None]
    if boundaries is not None:
        counts = jnp.pad(boundaries, tail, mode="edge").reshape(s.b, s.chunks, s.size)
        before = jnp.pad(counts[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        arrays[2] = (counts - before).astype(jnp.float32).reshape(s.b, 1, -1)
        specs[2] = pl.BlockSpec((1, 1, s.size), lambda b, g, c, j: (b, 0, at(c)))
    flat = [x.reshape(s.b, s.t, -1) for x in (k, q, v)]
    return Operands(arrays + flat, [*specs, _by_group(s, at), _by_group(s, at), _by_block(s, at)])


def _by_group(s: Sizes, at):
    return pl.BlockSpec((1, s.size, s.n), lambda b, g, c, j: (b, at(c), g))


def _by_block(s: Sizes, at):
    return pl.BlockSpec((1, s.size, s.width), lambda b, g, c, j: (b, at(c), g * s.blocks + j))


def _of_state(s: Sizes, step: int):
    """A state [b, n, h*p] that is read or written in grid step `step` of the chunks alone, and waits otherwise."""
    return pl.BlockSpec((1, s.n, s.width), lambda b, g, c, j: (b, 0, g * s.blocks + jnp.where(c == step, j, 0)))


def _transposed(state, s: Sizes):
    """[b, h, p, n] -> [b, n, h*p]."""
    return None if state is None else state.reshape(s.b, -1, s.n).transpose(0, 2, 1)


def _call(s: Sizes, body, operands: Operands, outputs: list, scratch: list, name: str):
    """Runs a kernel body over the grid; absent operands (None) reach it as None."""
    present = [x is not None for x in operands.arrays]

    def kernel(*refs):
        given = iter(refs)
        body(*[next(given) if there else None for there in present], *given)

    return pl.pallas_call(
        kernel,
        grid=s.grid,
        in_specs=[spec for spec in operands.specs if spec is not None],
        out_specs=[spec for _, spec in outputs],
        out_shape=[shape for shape, _ in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            allow_input_fusion=[True] * sum(present),
        ),
        name=name,
    )(*[x for x in operands.arrays if x is not None])


def _forwards(s: Sizes, a, k, v, q, state, boundaries, outputs: bool):
    """Returns [y, final state] in the kernels' layout, or [states before the chunks]."""
    operands = _operands(s, a, k, v, q, boundaries, lambda c: c)
    operands.arrays.append(_transposed(state, s))
    operands.specs.append(None if state is None else _of_state(s, 0))
    width = s.g * s.blocks * s.width
    if outputs:
        out = [
            (jax.ShapeDtypeStruct((s.b, s.t, width), v.dtype), _by_block(s, lambda c: c)),
            (jax.ShapeDtypeStruct((s.b, s.n, width), jnp.float32), _of_state(s, s.chunks - 1)),
        ]
    else:
        blocks = pl.BlockSpec((1, 1, s.n, s.width), lambda b, g, c, j: (b, c, 0, g * s.blocks + j))
        out = [(jax.ShapeDtypeStruct((s.b, s.chunks, s.n, width), jnp.float32), blocks)]

    scratch = [(s.blocks, s.n, s.width), (s.size, s.size)]
    return _call(s, functools.partial(_walk, s, outputs), operands, out, scratch, "ssd" if outputs else "ssd_states")


def fwd(a, k, v, q, state, boundaries, *, chunk_size):
    """See `portable.ops._ssd.reference.fwd`."""
    s = _sizes(k, v, chunk_size)
    y, final = _forwards(s, a, k, v, q, state, boundaries, True)
    return y.reshape(v.shape), _untransposed(final, v, s)


def _untransposed(state, v, s: Sizes):
    return state.transpose(0, 2, 1).reshape(s.b, v.shape[2], s.p, s.n)


def bwd(residuals, cotangents, *, chunk_size):
    """Walks forwards for the state before each chunk, then backwards for the gradients."""
    a, k, v, q, state, boundaries = residuals
    dy, dfinal = cotangents
    s = _sizes(k, v, chunk_size)
    (starts,) = _forwards(s, a, k, v, q, state, boundaries, False)

    def at(c):
        return s.chunks - 1 - c

    operands = _operands(s, a, k, v, q, boundaries, at)
    operands.arrays.extend([dy.astype(v.dtype).reshape(s.b, s.t, -1), starts, _transposed(dfinal, s)])
    states = pl.BlockSpec((1, 1, s.n, s.width), lambda b, g, c, j: (b, at(c), 0, g * s.blocks + j))
    operands.specs.extend([_by_block(s, at), states, _of_state(s, 0)])
    sums, flat = operands.arrays[0], operands.arrays[3:6]
    out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (flat[0], flat[2], flat[1], sums, operands.arrays[-1])]
    by_head = operands.specs[0]
    specs = [_by_group(s, at), _by_block(s, at), _by_group(s, at), by_head, _of_state(s, s.chunks - 1)]
    square, narrow = (s.size, s.size), (s.size, s.n)
    scratch = [(s.blocks, s.n, s.width), square, square, narrow, narrow]
    body = functools.partial(_walk_back, s)
    outputs = list(zip(out, specs, strict=True))
    dk, dv, dq, da, dstart = _call(s, body, operands, outputs, scratch, "ssd_gradients")
    da = da.reshape(s.b, -1, da.shape[-1])[..., : s.t].transpose(0, 2, 1)
    dstate = None if state is None else _untransposed(dstart, v, s)
    return da, dk.reshape(k.shape), dv.reshape(v.shape), dq.reshape(q.shape), dstate, None


def interpret(part: str, *args, **options) -> tuple:
    """Runs `fwd` or `bwd` in Pallas' interpreter of a TPU; memory that nothing wrote is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return jax.jit(functools.partial({"fwd": fwd, "bwd": bwd}[part], **options))(*args)


IMPL = scaled(Impl(fwd=fwd, bwd=bwd, why_not=why_not, interpret=interpret))

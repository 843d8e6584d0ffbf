"""The Triton kernels of `ssd`. Imported inside the call only: triton need not be installed.

Every kernel takes arrays as the op has them: k, q [b, t, g, n]; v, y [b, t, h, p]; and beside them, padded to whole
chunks, large, small [b, h, C * SIZE] (float32), whose sum is the log decay from the chunk's start, and seen
[b, C * SIZE] (int32), the boundaries since the position before the chunk. States at the chunks' starts, or cotangents
at their ends, are [b, h, C, p, n]. Constants: T positions, H heads, G groups, P and N as p and n, SIZE positions of a
chunk, BLOCK_P and BLOCK_N columns at a time, SEGMENTS whether `seen` counts.
Products take operands in the dtype of v and add in float32; masks come before the exponentials.
Source: Dao and Gu 2024, "Transformers are SSMs" (arXiv 2405.21060), section 6.
"""

# pyright: reportOperatorIssue=false
# The types of Triton's language are its compiler's, not Python's.

import triton
import triton.language as tl


@triton.jit
def _dot(x, y, acc):
    # ieee: float32 operands are not rounded to the tensor cores' TF32. It says nothing about 16-bit operands.
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _tile(row, chunk, head, columns, T: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Returns where a chunk of one head lies in an array [b, T, HEADS, WIDTH], and which of it exists."""
    i = tl.arange(0, SIZE)
    start = ((row * T + chunk * SIZE) * HEADS + head) * WIDTH
    return start + (i[:, None] * (HEADS * WIDTH) + columns[None, :]), (chunk * SIZE + i < T)[:, None]


@triton.jit
def _load(x, row, chunk, head, columns, T: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """Returns [SIZE, columns] of one head, zero after the last position."""
    at, real = _tile(row, chunk, head, columns, T, HEADS, WIDTH, SIZE)
    return tl.load(x + at, mask=real, other=0.0)


@triton.jit
def _down(logs):
    # Rounding may leave the log of a decay above 0. A comparison, unlike a minimum, keeps NaN.
    return tl.where(logs > 0, 0.0, logs)


@triton.jit
def _edges(large, small, seen, row, head, chunk, H: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
           SEGMENTS: tl.constexpr):  # fmt: skip
    """Returns the decays from the chunk's start to each position, from each to its end [SIZE], and over all of it."""
    start = ((row * H + head) * C + chunk) * SIZE
    i = tl.arange(0, SIZE)
    big, rest = tl.load(large + start + i), tl.load(small + start + i)
    big_end, rest_end = tl.load(large + start + SIZE - 1), tl.load(small + start + SIZE - 1)
    into, whole = big + rest, big_end + rest_end
    out = _down((big_end - big) + (rest_end - rest))
    if SEGMENTS:
        counts = tl.load(seen + (row * C + chunk) * SIZE + i)
        last = tl.load(seen + (row * C + chunk) * SIZE + SIZE - 1)
        into = tl.where(counts == 0, into, float("-inf"))
        out = tl.where(counts == last, out, float("-inf"))
        whole = tl.where(last == 0, whole, float("-inf"))
    return tl.exp(into), tl.exp(out), tl.exp(whole)


@triton.jit
def _within(large, small, seen, row, head, chunk, H: tl.constexpr, C: tl.constexpr, SIZE: tl.constexpr,
            SEGMENTS: tl.constexpr):  # fmt: skip
    """Returns the decays [q, s] from s to q inside the chunk, zero for s > q and across segments."""
    start = ((row * H + head) * C + chunk) * SIZE
    i = tl.arange(0, SIZE)
    big, rest = tl.load(large + start + i), tl.load(small + start + i)
    logs = _down((big[:, None] - big[None, :]) + (rest[:, None] - rest[None, :]))
    mask = i[:, None] >= i[None, :]
    if SEGMENTS:
        counts = tl.load(seen + (row * C + chunk) * SIZE + i)
        mask = mask & (counts[:, None] == counts[None, :])
    return tl.exp(tl.where(mask, logs, float("-inf")))


@triton.jit
def walk(large, small, seen, keys, values, start, states, final,
         T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
         SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr,
         REVERSE: tl.constexpr):  # fmt: skip
    """Passes the state through the chunks: stores it before each chunk is added, and at the end.

    With keys = k and values = v the states at the chunks' starts; REVERSE, with q and the cotangent of y, the
    cotangents at the chunks' ends. A program for each (b, h), block of p and block of n.
    """
    line = tl.program_id(0).to(tl.int64)
    row, head = line // H, line % H
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = p[:, None] * N + n[None, :]
    dtype = values.dtype.element_ty
    s = tl.load(start + line * (P * N) + tile)
    for step in range(C):
        chunk = C - 1 - step if REVERSE else step
        tl.store(states + (line * C + chunk) * (P * N) + tile, s.to(states.dtype.element_ty))
        into, out, whole = _edges(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
        reach = into if REVERSE else out
        k = _load(keys, row, chunk, head // (H // G), n, T, G, N, SIZE).to(dtype)
        v = _load(values, row, chunk, head, p, T, H, P, SIZE).to(tl.float32) * reach[:, None]
        s = _dot(tl.trans(v.to(dtype)), k, s * whole)
    tl.store(final + line * (P * N) + tile, s)


@triton.jit
def outputs(large, small, seen, keys, values, queries, states, y,
            T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
            SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, SEGMENTS: tl.constexpr):  # fmt: skip
    """Writes y from a chunk's own tokens and the state at its start. A program for each (b, chunk, h), block of p.

    Heads follow each other, so that a group's k and q are read while they are in the cache.
    """
    line = tl.program_id(0).to(tl.int64)
    row, chunk, head = line // H // C, line // H % C, line % H
    group = head // (H // G)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    dtype = values.dtype.element_ty
    state = states + ((row * H + head) * C + chunk) * (P * N)
    scores = tl.zeros([SIZE, SIZE], tl.float32)
    acc = tl.zeros([SIZE, BLOCK_P], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        q = _load(queries, row, chunk, group, n, T, G, N, SIZE).to(dtype)
        k = _load(keys, row, chunk, group, n, T, G, N, SIZE).to(dtype)
        s = tl.load(state + p[:, None] * N + n[None, :])
        scores = _dot(q, tl.trans(k), scores)
        acc = _dot(q, tl.trans(s), acc)
    into, _, _ = _edges(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
    within = _within(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
    v = _load(values, row, chunk, head, p, T, H, P, SIZE)
    acc = _dot((scores * within).to(dtype), v, acc * into[:, None])
    at, real = _tile(row, chunk, head, p, T, H, P, SIZE)
    tl.store(y + at, acc.to(dtype), mask=real)


@triton.jit
def head_gradients(large, small, seen, keys, values, queries, dys, states, dstates, da, dv,
                   T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                   C: tl.constexpr, SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                   SEGMENTS: tl.constexpr):  # fmt: skip
    """Writes da [b, t, h] (float32) and dv of a chunk. A program for each (b, chunk, h)."""
    line = tl.program_id(0).to(tl.int64)
    row, chunk, head = line // H // C, line // H % C, line % H
    group = head // (H // G)
    i = tl.arange(0, SIZE)
    dtype = values.dtype.element_ty
    state = ((row * H + head) * C + chunk) * (P * N)
    weights = tl.zeros([SIZE, SIZE], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        q = _load(queries, row, chunk, group, n, T, G, N, SIZE).to(dtype)
        k = _load(keys, row, chunk, group, n, T, G, N, SIZE).to(dtype)
        weights = _dot(q, tl.trans(k), weights)
    weights *= _within(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
    into, out, whole = _edges(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)

    dweights = tl.zeros([SIZE, SIZE], tl.float32)
    # Cotangents of the logs of `into`, `out` and `whole`.
    through, leaving = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    passing = 0.0
    for first_p in range(0, P, BLOCK_P):
        p = first_p + tl.arange(0, BLOCK_P)
        from_state = tl.zeros([SIZE, BLOCK_P], tl.float32)
        into_state = tl.zeros([SIZE, BLOCK_P], tl.float32)
        for first in range(0, N, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            q = _load(queries, row, chunk, group, n, T, G, N, SIZE).to(dtype)
            k = _load(keys, row, chunk, group, n, T, G, N, SIZE).to(dtype)
            s = tl.load(states + state + p[:, None] * N + n[None, :])
            ds = tl.load(dstates + state + p[:, None] * N + n[None, :])
            from_state = _dot(q, tl.trans(s), from_state)
            into_state = _dot(k, tl.trans(ds), into_state)
            passing += tl.sum(s.to(tl.float32) * ds.to(tl.float32))
        v = _load(values, row, chunk, head, p, T, H, P, SIZE)
        dy = _load(dys, row, chunk, head, p, T, H, P, SIZE)
        dweights = _dot(dy, tl.trans(v), dweights)
        through += tl.sum(from_state * dy.to(tl.float32), 1) * into
        into_state *= out[:, None]
        leaving += tl.sum(into_state * v.to(tl.float32), 1)
        acc = _dot(tl.trans(weights.to(dtype)), dy, into_state)
        at, real = _tile(row, chunk, head, p, T, H, P, SIZE)
        tl.store(dv + at, acc.to(dtype), mask=real)

    # da[m] sums over the pairs s < m <= q, the chunk's start and end among them. Formed as such and not as a
    # difference of row and column sums, which would cancel where decays are strong.
    pairs = tl.cumsum(weights * dweights, 0, reverse=True)  # [m, s]: over q >= m
    later = i[None, :] >= i[:, None]  # [m, q]: q >= m
    sums = tl.sum(tl.where(later, through[None, :], pairs + leaving[None, :]), 1) + whole * passing
    here = chunk * SIZE + i
    tl.store(da + (row * T + here) * H + head, sums, mask=here < T)


@triton.jit
def group_gradients(large, small, seen, keys, values, queries, dys, states, dstates, dk, dq,
                    T: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
                    C: tl.constexpr, SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
                    SEGMENTS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Writes dk and dq, summed over HEADS heads of a group at a time, [parts, b, t, g, n].

    A program for each (b, chunk, g), part of the group's heads and block of n.
    """
    line = tl.program_id(0).to(tl.int64)
    row, chunk, group = line // G // C, line // G % C, line % G
    part = tl.program_id(1)
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype = values.dtype.element_ty
    summed = tl.zeros([SIZE, SIZE], tl.float32)
    k_acc = tl.zeros([SIZE, BLOCK_N], tl.float32)
    q_acc = tl.zeros([SIZE, BLOCK_N], tl.float32)
    for member in range(part * HEADS, tl.minimum(part * HEADS + HEADS, H // G)):
        head = group * (H // G) + member
        state = ((row * H + head) * C + chunk) * (P * N)
        into, out, _ = _edges(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
        dweights = tl.zeros([SIZE, SIZE], tl.float32)
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            v = _load(values, row, chunk, head, p, T, H, P, SIZE)
            dy = _load(dys, row, chunk, head, p, T, H, P, SIZE)
            dweights = _dot(dy, tl.trans(v), dweights)
        summed += dweights * _within(large, small, seen, row, head, chunk, H, C, SIZE, SEGMENTS)
        for first in range(0, P, BLOCK_P):
            p = first + tl.arange(0, BLOCK_P)
            dy = _load(dys, row, chunk, head, p, T, H, P, SIZE)
            s = tl.load(states + state + p[:, None] * N + n[None, :])
            q_acc = _dot((dy.to(tl.float32) * into[:, None]).to(dtype), s, q_acc)
            v = _load(values, row, chunk, head, p, T, H, P, SIZE)
            ds = tl.load(dstates + state + p[:, None] * N + n[None, :])
            k_acc = _dot((v.to(tl.float32) * out[:, None]).to(dtype), ds, k_acc)
    k = _load(keys, row, chunk, group, n, T, G, N, SIZE).to(dtype)
    q = _load(queries, row, chunk, group, n, T, G, N, SIZE).to(dtype)
    q_acc = _dot(summed.to(dtype), k, q_acc)
    k_acc = _dot(tl.trans(summed.to(dtype)), q, k_acc)
    rows = tl.num_programs(0).to(tl.int64) // (G * C)
    at, real = _tile(part * rows + row, chunk, group, n, T, G, N, SIZE)
    tl.store(dq + at, q_acc.to(dq.dtype.element_ty), mask=real)
    tl.store(dk + at, k_acc.to(dk.dtype.element_ty), mask=real)

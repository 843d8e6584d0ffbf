"""The Triton kernels of attention over selected blocks. Imported inside the call only: triton need not be installed.

Arrays are [N, tokens, heads, width], tokens in blocks of R queries or C keys. A program takes one block of one head and
one row of the batch, and walks along its list (`block_lists.Ranges`): those blocks first whose pairs are compared, then
those that see all of each other. What a query sees is an interval of places on each of A axes, [IN, T, 2 * A, R]; a key
has a place on each, [PN, S, A, C]; both int32. Numbers of queries are [N, tokens, H] float32: the highest score and
the sum of exponentials less it, or its inverse; mean, as the gradients' docstrings have it. Constants: LN, LH rows and
heads of the lists, I their length; H, G heads of queries and of keys; T, S blocks; K, V widths, D, E these as powers of
two. Products take operands in the dtype of q and add in float32.
"""

# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# The types of Triton's language are its compiler's, not Python's.

import triton
import triton.language as tl

# Below all scores, and finite, so that differences of it are no NaN. A row whose highest score it is sees nothing.
NEVER = tl.constexpr(-(2.0**126))


@triton.jit
def _dot(x, y, acc):
    # ieee: float32 operands are not rounded to the tensor cores' TF32. It says nothing about 16-bit operands.
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _at(row, block, head, COUNT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
        PADDED: tl.constexpr):  # fmt: skip
    """Returns where a block of a head lies in an array [N, COUNT * SIZE, HEADS, WIDTH], and which of it exists."""
    i, j = tl.arange(0, SIZE), tl.arange(0, PADDED)
    start = ((row * COUNT + block) * SIZE * HEADS + head) * WIDTH
    return start + i[:, None] * (HEADS * WIDTH) + j[None, :], (j < WIDTH)[None, :] & (i >= 0)[:, None]


@triton.jit
def _load(x, row, block, head, COUNT: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr,
          PADDED: tl.constexpr):  # fmt: skip
    """Returns a block [SIZE, PADDED], zero beyond WIDTH."""
    at, real = _at(row, block, head, COUNT, HEADS, WIDTH, SIZE, PADDED)
    return tl.load(x + at, mask=real, other=0.0)


@triton.jit
def _number(x, row, block, head, COUNT: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Returns one number for each row of a block, of [N, COUNT * SIZE, HEADS]."""
    return tl.load(x + ((row * COUNT + block) * SIZE + tl.arange(0, SIZE)) * HEADS + head)


@triton.jit
def _sees(intervals, places, row, queries, keys, IN: tl.constexpr, PN: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
          A: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # fmt: skip
    """Returns which keys of a block the queries of a block see, [R, C]."""
    i, j = tl.arange(0, R), tl.arange(0, C)
    first = intervals + ((row % IN) * T + queries) * (2 * A * R) + i
    place = places + ((row % PN) * S + keys) * (A * C) + j
    seen = (i >= 0)[:, None] & (j >= 0)[None, :]
    for a in tl.static_range(A):
        at = tl.load(place + a * C)[None, :]
        seen = seen & (at >= tl.load(first + a * R)[:, None]) & (at < tl.load(first + (A + a) * R)[:, None])
    return seen


@triton.jit
def _list(start, middle, stop, row, head, block, COUNT: tl.constexpr, H: tl.constexpr, LN: tl.constexpr,
          LH: tl.constexpr, I: tl.constexpr):  # fmt: skip
    """Returns where a block's list begins, where its full blocks begin, where it ends; and where the lists lie."""
    which = (row % LN) * LH + head * LH // H
    at = which * COUNT + block
    return tl.load(start + at), tl.load(middle + at), tl.load(stop + at), which * I


@triton.jit
def _scored(q, intervals, places, keys, values, row, block, key, group, highest, total, acc, scale,
            MASKED: tl.constexpr,
            IN: tl.constexpr, PN: tl.constexpr, G: tl.constexpr, T: tl.constexpr, S: tl.constexpr, A: tl.constexpr,
            R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr,
            E: tl.constexpr):  # fmt: skip
    """Adds a block of keys to an online softmax."""
    k = _load(keys, row, key, group, S, G, K, C, D)
    scores = _dot(q, tl.trans(k), tl.zeros([R, C], tl.float32)) * scale
    if MASKED:
        scores = tl.where(_sees(intervals, places, row, block, key, IN, PN, T, S, A, R, C), scores, NEVER)
    new = tl.maximum(highest, tl.max(scores, 1))
    fade, weights = tl.exp(highest - new), tl.exp(scores - new[:, None])
    v = _load(values, row, key, group, S, G, V, C, E)
    acc = _dot(weights.to(v.dtype), v, acc * fade[:, None])
    return new, total * fade + tl.sum(weights, 1), acc


@triton.jit
def attend(start, middle, stop, other, intervals, places, queries, keys, values, out, highs, sums,
           SCALE: tl.constexpr, LN: tl.constexpr, LH: tl.constexpr, I: tl.constexpr, IN: tl.constexpr, PN: tl.constexpr,
           H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, S: tl.constexpr, A: tl.constexpr, R: tl.constexpr,
           C: tl.constexpr, K: tl.constexpr, V: tl.constexpr, D: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Writes out [N, tokens, H, V], the highest scores and the sums. A program for each (N, H, T)."""
    line = tl.program_id(0).to(tl.int64)
    row, head, block = line // T // H, line // T % H, line % T
    group = head // (H // G)
    first, whole, end, lists = _list(start, middle, stop, row, head, block, T, H, LN, LH, I)
    q = _load(queries, row, block, head, T, H, K, R, D)
    highest = tl.full([R], NEVER, tl.float32)
    total, acc = tl.zeros([R], tl.float32), tl.zeros([R, E], tl.float32)
    for i in range(first, whole):
        key = tl.load(other + lists + i)
        highest, total, acc = _scored(q, intervals, places, keys, values, row, block, key, group, highest, total, acc,
                                      SCALE, True, IN, PN, G, T, S, A, R, C, K, V, D, E)  # fmt: skip
    for i in range(whole, end):
        key = tl.load(other + lists + i)
        highest, total, acc = _scored(q, intervals, places, keys, values, row, block, key, group, highest, total, acc,
                                      SCALE, False, IN, PN, G, T, S, A, R, C, K, V, D, E)  # fmt: skip
    sees = (highest != NEVER) | (total != total)  # a maximum loses NaN, the sum keeps it
    acc = tl.where(sees[:, None], acc / tl.where(sees, total, 1.0)[:, None], 0.0)
    at, real = _at(row, block, head, T, H, V, R, E)
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real)
    at = ((row * T + block) * R + tl.arange(0, R)) * H + head
    tl.store(highs + at, tl.where(sees, highest, float("-inf")))
    tl.store(sums + at, tl.where(sees, total, 0.0))


@triton.jit
def query_gradients(start, middle, stop, other, intervals, places, queries, keys, values, douts, highs, inverse, mean,
                    dq, SCALE: tl.constexpr, LN: tl.constexpr, LH: tl.constexpr, I: tl.constexpr, IN: tl.constexpr,
                    PN: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                    A: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                    D: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Writes dq [N, tokens, H, K]. A program for each (N, H, T)."""
    line = tl.program_id(0).to(tl.int64)
    row, head, block = line // T // H, line // T % H, line % T
    group = head // (H // G)
    first, whole, end, lists = _list(start, middle, stop, row, head, block, T, H, LN, LH, I)
    q = _load(queries, row, block, head, T, H, K, R, D)
    dout = _load(douts, row, block, head, T, H, V, R, E)
    highest, share = _number(highs, row, block, head, T, H, R), _number(inverse, row, block, head, T, H, R)
    means = _number(mean, row, block, head, T, H, R)
    acc = tl.zeros([R, D], tl.float32)
    for i in range(first, end):
        key = tl.load(other + lists + i)
        k = _load(keys, row, key, group, S, G, K, C, D)
        v = _load(values, row, key, group, S, G, V, C, E)
        scores = _dot(q, tl.trans(k), tl.zeros([R, C], tl.float32)) * SCALE
        if i < whole:
            seen = _sees(intervals, places, row, block, key, IN, PN, T, S, A, R, C)
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp(scores - highest[:, None]) * share[:, None]
        dscores = weights * (_dot(dout, tl.trans(v), tl.zeros([R, C], tl.float32)) - means[:, None])
        acc = _dot(dscores.to(k.dtype), k, acc)
    at, real = _at(row, block, head, T, H, K, R, D)
    tl.store(dq + at, (acc * SCALE).to(dq.dtype.element_ty), mask=real)


@triton.jit
def key_gradients(start, middle, stop, other, intervals, places, queries, keys, values, douts, highs, inverse, mean,
                  dk, dv, SCALE: tl.constexpr, LN: tl.constexpr, LH: tl.constexpr, I: tl.constexpr, IN: tl.constexpr,
                  PN: tl.constexpr, H: tl.constexpr, G: tl.constexpr, T: tl.constexpr, S: tl.constexpr,
                  A: tl.constexpr, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                  D: tl.constexpr, E: tl.constexpr):  # fmt: skip
    """Writes dk [N, tokens, H, K] and dv [N, tokens, H, V], those of each query head. A program for each (N, H, S)."""
    line = tl.program_id(0).to(tl.int64)
    row, head, block = line // S // H, line // S % H, line % S
    group = head // (H // G)
    first, whole, end, lists = _list(start, middle, stop, row, head, block, S, H, LN, LH, I)
    k = _load(keys, row, block, group, S, G, K, C, D)
    v = _load(values, row, block, group, S, G, V, C, E)
    k_acc, v_acc = tl.zeros([C, D], tl.float32), tl.zeros([C, E], tl.float32)
    for i in range(first, end):
        query = tl.load(other + lists + i)
        q = _load(queries, row, query, head, T, H, K, R, D)
        dout = _load(douts, row, query, head, T, H, V, R, E)
        highest, share = _number(highs, row, query, head, T, H, R), _number(inverse, row, query, head, T, H, R)
        means = _number(mean, row, query, head, T, H, R)
        # [R, C] as in the forward, so that they are the same to the last bit.
        scores = _dot(q, tl.trans(k), tl.zeros([R, C], tl.float32)) * SCALE
        if i < whole:
            seen = _sees(intervals, places, row, query, block, IN, PN, T, S, A, R, C)
            scores = tl.where(seen, scores, float("-inf"))
        weights = tl.exp(scores - highest[:, None]) * share[:, None]
        v_acc = _dot(tl.trans(weights.to(dout.dtype)), dout, v_acc)
        dscores = weights * (_dot(dout, tl.trans(v), tl.zeros([R, C], tl.float32)) - means[:, None])
        k_acc = _dot(tl.trans(dscores.to(q.dtype)), q, k_acc)
    at, real = _at(row, block, head, S, H, K, C, D)
    tl.store(dk + at, (k_acc * SCALE).to(dk.dtype.element_ty), mask=real)
    at, real = _at(row, block, head, S, H, V, C, E)
    tl.store(dv + at, v_acc.to(dv.dtype.element_ty), mask=real)

"""The Triton kernels of `grouped_matmul` and `moe_ffn`. Imported inside the call only: triton need not be installed.

Rows, [M, D] or named by `token`, are in the order of their groups. Blocks (`group`, `row`, `end`, `count`; see
`portable.ops._grouped_matmul.blocks`) are read on the device; those of group E are of rows that no group has, and get
zeros. Matrices are [E, D, F], biases [E, F]. Constants: BLOCKS as many as there can be, ROWS of a block, COLUMNS of F
and INNER of D at a time.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# The types of Triton's language are its compiler's, not Python's.

import triton
import triton.language as tl


@triton.jit
def _where(BLOCKS: tl.constexpr, TILES: tl.constexpr):
    """Returns this program's block and tile of columns: 8 blocks share a tile's matrix while it is in the cache."""
    program = tl.program_id(0)
    first = program // (8 * TILES) * 8
    height = tl.minimum(BLOCKS - first, 8)
    within = program % (8 * TILES)
    return first + within % height, within // height


@triton.jit
def _matrix(w, d, f, D: tl.constexpr, F: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
            TRANSPOSED: tl.constexpr):  # fmt: skip
    """Returns the part [INNER, COLUMNS] of a matrix [D, F], which lies as [F, D] where TRANSPOSED."""
    if TRANSPOSED:
        at = w + d[:, None] + f[None, :] * D
    else:
        at = w + d[:, None] * F + f[None, :]
    if D % INNER == 0 and F % COLUMNS == 0:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < D)[:, None] & (f < F)[None, :], other=0.0)


@triton.jit
def _products(x, token, e, rows, f, gate, up, b_gate, b_up, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, GATE: tl.constexpr,
              B_GATE: tl.constexpr, B_UP: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Returns rows @ gate and rows @ up, biases added, in float32; zeros where e is E, and without GATE for gate."""
    source = tl.load(token + rows) if GATHER else rows
    lines = x + source.to(tl.int64)[:, None] * D
    own = tl.minimum(e, E - 1).to(tl.int64)
    of_gate = tl.zeros([ROWS, COLUMNS], tl.float32)
    of_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, tl.where(e < E, D, 0), INNER):
        d = first + tl.arange(0, INNER)
        if D % INNER == 0:
            part = tl.load(lines + d[None, :])
        else:
            part = tl.load(lines + d[None, :], mask=(d < D)[None, :], other=0.0)
        # ieee: float32 operands are not rounded to the tensor cores' TF32. It says nothing about 16-bit operands.
        w = _matrix(up + own * (D * F), d, f, D, F, INNER, COLUMNS, TRANSPOSED)
        of_up = tl.dot(part, w, of_up, input_precision="ieee")
        if GATE:
            w = _matrix(gate + own * (D * F), d, f, D, F, INNER, COLUMNS, TRANSPOSED)
            of_gate = tl.dot(part, w, of_gate, input_precision="ieee")
    there = f < tl.where(e < E, F, 0)
    if B_GATE:
        of_gate += tl.load(b_gate + own * F + f, mask=there, other=0.0).to(tl.float32)[None, :]
    if B_UP:
        of_up += tl.load(b_up + own * F + f, mask=there, other=0.0).to(tl.float32)[None, :]
    return of_gate, of_up


@triton.jit
def _act(x, NAME: tl.constexpr):
    """An activation of `portable.ops._moe_ffn.activations`. Comparisons, unlike a minimum, keep NaN."""
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z)
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        positive = tl.where(x < 0, 0.0, x)
        return positive * positive if NAME == "relu2" else positive


@triton.jit
def _activate(gate, up, GATE: tl.constexpr, NAME: tl.constexpr):
    if NAME == "swiglu_oai":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        return (up + 1.0) * gate * tl.sigmoid(1.702 * gate)
    elif GATE:
        return _act(gate, NAME) * up
    else:
        return _act(up, NAME)


@triton.jit
def _store(y, values, first, end, f, F: tl.constexpr, ROWS: tl.constexpr):
    """Writes the rows from `first` to before `end`."""
    i = tl.arange(0, ROWS)
    at = y + first.to(tl.int64) * F + (i[:, None] * F + f[None, :])
    tl.store(at, values.to(y.dtype.element_ty), mask=(i < end - first)[:, None] & (f < F)[None, :])


@triton.jit
def product(x, group, row, end, count, w, bias, y, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
            BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
            INNER: tl.constexpr, BIAS: tl.constexpr, TRANSPOSED: tl.constexpr):  # fmt: skip
    """Writes y [M, F], each row times its group's matrix. A program for each block and tile of columns."""
    block, tile = _where(BLOCKS, TILES)
    if block >= tl.load(count):
        return
    last = tl.load(end + block)
    first = tl.load(row + block)
    rows = tl.minimum(first + tl.arange(0, ROWS), last - 1)
    f = tile * COLUMNS + tl.arange(0, COLUMNS)
    _, made = _products(
        x, x, tl.load(group + block), rows, f, w, w, bias, bias, E, D, F, ROWS, COLUMNS, INNER,
        False, False, BIAS, False, TRANSPOSED,
    )  # fmt: skip
    _store(y, made, first, last, f, F, ROWS)


@triton.jit
def hidden(x, token, group, row, end, count, gate, up, b_gate, b_up, y, E: tl.constexpr, D: tl.constexpr,
           F: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
           INNER: tl.constexpr, GATE: tl.constexpr, B_GATE: tl.constexpr, B_UP: tl.constexpr,
           NAME: tl.constexpr):  # fmt: skip
    """Writes the activations of experts [M, F]; rows are those of x [T, D] that `token` names."""
    block, tile = _where(BLOCKS, TILES)
    if block >= tl.load(count):
        return
    last = tl.load(end + block)
    first = tl.load(row + block)
    rows = tl.minimum(first + tl.arange(0, ROWS), last - 1)
    f = tile * COLUMNS + tl.arange(0, COLUMNS)
    of_gate, of_up = _products(
        x, token, tl.load(group + block), rows, f, gate, up, b_gate, b_up, E, D, F, ROWS,
        COLUMNS, INNER, GATE, B_GATE, B_UP, True, False,
    )  # fmt: skip
    _store(y, _activate(of_gate, of_up, GATE, NAME), first, last, f, F, ROWS)


@triton.jit
def hidden_kept(x, token, group, row, end, count, gate, up, b_gate, b_up, y, kept_gate, kept_up, E: tl.constexpr,
                D: tl.constexpr, F: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr,
                COLUMNS: tl.constexpr, INNER: tl.constexpr, GATE: tl.constexpr, B_GATE: tl.constexpr,
                B_UP: tl.constexpr, NAME: tl.constexpr):  # fmt: skip
    """As `hidden`, and writes the products. Without GATE, what is written as that with gate means nothing."""
    block, tile = _where(BLOCKS, TILES)
    if block >= tl.load(count):
        return
    last = tl.load(end + block)
    first = tl.load(row + block)
    rows = tl.minimum(first + tl.arange(0, ROWS), last - 1)
    f = tile * COLUMNS + tl.arange(0, COLUMNS)
    of_gate, of_up = _products(
        x, token, tl.load(group + block), rows, f, gate, up, b_gate, b_up, E, D, F, ROWS,
        COLUMNS, INNER, GATE, B_GATE, B_UP, True, False,
    )  # fmt: skip
    _store(y, _activate(of_gate, of_up, GATE, NAME), first, last, f, F, ROWS)
    _store(kept_up, of_up, first, last, f, F, ROWS)
    if GATE:
        _store(kept_gate, of_gate, first, last, f, F, ROWS)


@triton.jit
def outer(x, dy, start, end, dw, D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          INNER: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr):  # fmt: skip
    """Writes dw [E, D, F], each group's x.T @ dy; `start` and `end` [E] are its rows.

    A program for each group, part of INNER rows of dw and tile of columns.
    """
    program = tl.program_id(0)
    e = program // (TILES * PARTS)
    d = program // TILES % PARTS * INNER + tl.arange(0, INNER)
    f = program % TILES * COLUMNS + tl.arange(0, COLUMNS)
    last = tl.load(end + e)
    acc = tl.zeros([INNER, COLUMNS], tl.float32)
    for first in range(tl.load(start + e), last, ROWS):
        rows = first + tl.arange(0, ROWS)
        own = (rows < last)[:, None]
        rows = rows.to(tl.int64)[:, None]
        a = tl.load(x + rows * D + d[None, :], mask=own & (d < D)[None, :], other=0.0)
        b = tl.load(dy + rows * F + f[None, :], mask=own & (f < F)[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
    at = dw + e.to(tl.int64) * (D * F) + d[:, None] * F + f[None, :]
    tl.store(at, acc.to(dw.dtype.element_ty), mask=(d < D)[:, None] & (f < F)[None, :])

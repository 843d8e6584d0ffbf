"""What the Triton kernels of `grouped_matmul` and `moe_ffn` share: how they are cut, what they refuse, their calls."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import ShapeDtypeStruct

from portable.ops._grouped_matmul import blocks as layout
from portable.pallas_kernels.gpu import _launch


class Tiling(NamedTuple):
    """How a program is cut: columns of a tile, rows of a matrix at a time, warps, stages of its loop's loads."""

    columns: int
    inner: int
    warps: int
    stages: int


LARGEST = {2: 128, 4: 64}  # rows of a block, by the bytes of an operand
# By the bytes of an operand, the number of products and whether blocks have few rows (32 at most). Float32 products do
# not run on tensor cores and hold their operands in registers.
TILINGS = {
    (2, 1, False): Tiling(128, 64, warps=8, stages=3),
    (2, 2, False): Tiling(64, 64, warps=8, stages=3),
    (2, 1, True): Tiling(128, 64, warps=4, stages=3),
    (2, 2, True): Tiling(64, 64, warps=4, stages=3),
    (4, 1, False): Tiling(64, 16, warps=8, stages=2),
    (4, 2, False): Tiling(32, 16, warps=8, stages=2),
    (4, 1, True): Tiling(32, 16, warps=4, stages=2),
    (4, 2, True): Tiling(32, 16, warps=4, stages=2),
}
# Of gradients of matrices, by the bytes of an operand: rows of x at a time, and the tile of the matrix.
OUTER_ROWS = {2: 64, 4: 16}
OUTER = {2: Tiling(128, 128, warps=8, stages=3), 4: Tiling(64, 64, warps=8, stages=2)}


def refuses(dtype, rows: int, *shapes: tuple[int, ...]) -> str | None:
    """Says in a sentence why the kernels cannot take products of rows with matrices of these shapes."""
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"it needs float32, bfloat16 or float16; got {dtype}."
    if 0 in (rows, *shapes[0]):
        return f"it needs at least one row, group and column; got {rows} rows and matrices {list(shapes[0])}."
    return None


class Call:
    """The blocks of a call, and how its kernels are run on them."""

    def __init__(self, group_sizes, rows: int, dtype):
        groups = group_sizes.size
        # As many as a group has on average, but as few as a product of Triton's has at least.
        size = min(LARGEST[dtype.itemsize], max(16, 1 << (-(-rows // groups) - 1).bit_length()))
        self.rows, self.groups, self.dtype = rows, groups, dtype
        self.blocks = layout.make(group_sizes, rows, size, rest=True)

    def product(self, x, w, bias=None, *, transposed: bool = False):
        """Returns x [m, d] times its groups' matrices [e, d, f] ([e, f, d] where `transposed`); 0 for other rows."""
        w = w.astype(self.dtype)
        given = (w, x if bias is None else bias)
        width = w.shape[1 if transposed else 2]
        constants = {"BIAS": bias is not None, "TRANSPOSED": transposed}
        (y,) = self._run("product", 1, (x,), given, x.shape[1], width, 1, constants)
        return y

    def hidden(self, x, token, gate, up, b_gate, b_up, activation: str, *, keep: bool):
        """Returns the activations [m, f] of rows x[token], and with `keep` the products with gate and up (or None)."""
        gate, up = None if gate is None else gate.astype(self.dtype), up.astype(self.dtype)
        given = (up if gate is None else gate, up, x if b_gate is None else b_gate, x if b_up is None else b_up)
        constants = {"NAME": activation, "GATE": gate is not None, "B_GATE": b_gate is not None}
        constants["B_UP"] = b_up is not None
        name, products = "hidden_kept" if keep else "hidden", 1 if gate is None else 2
        inner, width = up.shape[1:]
        y, *kept = self._run(name, products, (x, token), given, inner, width, 3 if keep else 1, constants)
        return y, (kept[0] if kept and gate is not None else None, kept[1] if kept else None)

    def _run(self, name, products, rows, weights, inner, width, results, constants):
        from portable.pallas_kernels.gpu import _grouped_kernels

        b = self.blocks
        tiling = TILINGS[self.dtype.itemsize, products, b.size <= 32]
        tiles = -(-width // tiling.columns)
        constants |= {"E": self.groups, "D": inner, "F": width, "BLOCKS": b.group.size, "TILES": tiles}
        constants |= {"ROWS": b.size, "COLUMNS": tiling.columns, "INNER": tiling.inner}
        given = (*rows, b.group, b.row, b.end, b.count, *weights)
        made = [ShapeDtypeStruct((self.rows, width), self.dtype)] * results
        config = _launch.Config(0, 0, tiling.warps, tiling.stages)
        grid = (b.group.size * tiles,)
        return _launch.call(getattr(_grouped_kernels, name), given, made, grid, config=config, **constants)


def outer(x, dy, group_sizes, dtype):
    """Returns each group's x.T @ dy [e, d, f] for x [m, d] and dy [m, f]."""
    from portable.pallas_kernels.gpu import _grouped_kernels

    inner, width, size = x.shape[1], dy.shape[1], x.dtype.itemsize
    tiling = OUTER[size]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    tiles, parts = -(-width // tiling.columns), -(-inner // tiling.inner)
    constants = {"D": inner, "F": width, "TILES": tiles, "PARTS": parts, "ROWS": OUTER_ROWS[size]}
    constants |= {"COLUMNS": tiling.columns, "INNER": tiling.inner}
    given = x, dy, ends - group_sizes.astype(jnp.int32), ends
    made = ShapeDtypeStruct((group_sizes.size, inner, width), dtype)
    config = _launch.Config(0, 0, tiling.warps, tiling.stages)
    grid = (group_sizes.size * tiles * parts,)
    return _launch.call(_grouped_kernels.outer, given, (made,), grid, config=config, **constants)[0]

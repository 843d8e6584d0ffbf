"""Products of rows with their groups' matrices on a TPU: one, or two and the activation of experts, in a kernel.

The grid is (tiles of columns, blocks of rows), the blocks in order. A block's group is read on the device before its
step begins; consecutive blocks of one group find its matrices in VMEM, so that each is read once for every call. The
steps behind the last block name its operands again, which moves nothing, and compute nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from portable.ops._grouped_matmul.blocks import Blocks
from portable.ops._moe_ffn.activations import activate

LANES = 128
LARGEST = 256  # rows of a block: the side of the newest MXU
OPERANDS = 32 * 2**20  # bytes of VMEM for operands and results, of which there are two each
VMEM = 48 * 2**20  # with what a step computes


def block_rows(rows: int, groups: int, inner: int, dtype) -> int:
    """Returns the rows of a block: half of what a group has on average, so that little is padding; `inner` at most."""
    size = jnp.dtype(dtype).itemsize
    half = rows // max(groups, 1) // 2
    wanted = min(LARGEST, 1 << half.bit_length() - 1 if half else 0, OPERANDS // (4 * size * max(inner, 1)))
    least = 32 // size  # a tile of VMEM
    return max(least, wanted // least * least)


def _columns(rows: int, inner: int, width: int, products: int, dtype) -> int | None:
    """Returns the columns of a tile: of those that fit, the ones that pad and read again least."""
    size = jnp.dtype(dtype).itemsize
    room = OPERANDS // (2 * size) - rows * inner
    fit = room // (products * inner + (products + 1) * rows)  # results may be all that a step computes
    whole = [c for c in range(LANES, width, LANES) if c <= fit] + [width] * (width <= fit)
    return min(whole, key=lambda c: -(-width // c) * c * (1 + 64 / c), default=None)


def refuses(rows: int, groups: int, inner: int, width: int, dtype, *, of_rows: int, products: int = 1) -> str | None:
    """Says in a sentence why the kernel cannot take products of [inner, width] matrices in blocks of `of_rows`."""
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"it needs float32 or bfloat16; got {dtype}."
    if 0 in (rows, groups, inner, width):
        return f"it needs at least one row, group and column; got {rows}, {groups} and matrices [{inner}, {width}]."
    if _columns(of_rows, inner, width, products, dtype) is None:
        return f"{LANES} columns of a matrix must fit into a TPU's VMEM with a block of rows; got {inner} rows."
    return None


def _activate(name: str | None, gate, up):
    if name is None:
        return up
    if name == "gelu":  # Mosaic has no erfc
        half = 0.5 * (1 + jax.lax.erf((up if gate is None else gate) * 0.5**0.5))
        return up * half if gate is None else gate * half * up
    return activate(name, gate, up)


def _body(names: Sequence[str], activation: str | None, group, count, *refs):
    del group
    block = pl.program_id(1)

    @pl.when(block < count[0])
    def _():
        given = dict(zip(names, refs, strict=False))
        rows = given["x"][...]

        def product(name):
            if f"w_{name}" not in given:
                return None
            y = jnp.dot(rows, given[f"w_{name}"][...], preferred_element_type=jnp.float32)
            bias = given.get(f"b_{name}")
            return y if bias is None else y + bias[...].astype(jnp.float32)

        gate, up = product("gate"), product("up")
        made: dict[str, Any] = {"y": _activate(activation, gate, up), "gate": gate, "up": up}
        for name in ("y", "gate", "up"):
            if name in given:
                given[name][...] = made[name].astype(given[name].dtype)


def products(x, blocks: Blocks, gate, up, *, activation: str | None = None, keep=False) -> tuple:
    """Returns y [n * size, width], and with `keep` the products with gate (if there is one) and up.

    Args:
      x: [n * size, inner], rows in their places.
      blocks: without any of rows of no group.
      gate, up: pairs of matrices [e, inner, width] and biases [e, width] or None; gate may be None.
      activation: of experts; None gives x @ up.
      keep: whether the products are results too.

    What no block has is not written.
    """
    inner, width = x.shape[1], up[0].shape[2]
    pairs = {name: pair for name, pair in (("gate", gate), ("up", up)) if pair is not None}
    outputs = ["y", *(pairs if keep else ())]
    columns = _columns(blocks.size, inner, width, len(pairs), x.dtype)
    assert columns is not None

    def real(i, count):
        return jnp.minimum(i, jnp.maximum(count[0] - 1, 0))

    of_rows = pl.BlockSpec((blocks.size, inner), lambda j, i, group, count: (real(i, count), 0))
    names, arrays, specs = ["x"], [x], [of_rows]
    for name, (w, bias) in pairs.items():
        names.append(f"w_{name}")
        arrays.append(w.astype(x.dtype))
        specs.append(pl.BlockSpec((None, inner, columns), lambda j, i, group, count: (group[i], 0, j)))
        if bias is not None:
            names.append(f"b_{name}")
            arrays.append(bias[:, None])
            specs.append(pl.BlockSpec((None, 1, columns), lambda j, i, group, count: (group[i], 0, j)))
    made = pl.BlockSpec((blocks.size, columns), lambda j, i, group, count: (real(i, count), j))
    rows, size = x.shape[0], x.dtype.itemsize
    return tuple(
        pl.pallas_call(
            functools.partial(_body, [*names, *outputs], activation),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(pl.cdiv(width, columns), blocks.group.size),
                in_specs=specs,
                out_specs=[made] * len(outputs),
            ),
            out_shape=[jax.ShapeDtypeStruct((rows, width), x.dtype)] * len(outputs),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM),
            cost_estimate=pl.CostEstimate(
                flops=2 * len(pairs) * rows * inner * width,
                transcendentals=0 if activation is None else rows * width,
                bytes_accessed=size * (rows * (inner + width) + len(pairs) * up[0].size),
            ),
            name="grouped_hidden" if activation else "grouped_product",
        )(blocks.group, blocks.count, *arrays)
    )


def interpreted(parts: dict, part: str, *args, **options) -> tuple:
    """Runs one of an implementation's parts in Pallas' interpreter of a TPU; memory that nothing wrote is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        # One program: op by op, what surrounds a kernel would be compiled in as many.
        return jax.jit(functools.partial(parts[part], **options))(*args)

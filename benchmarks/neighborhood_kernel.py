"""What the TPU kernel of `neighborhood_attention` computes and moves, from the lists that it walks along.

The compiler of a TPU gives no time for a kernel, and nothing was run: these are counts, and the bounds that follow from
them. Products count at the peak of bfloat16, bytes at the memory's bandwidth (`portable.parity.targets`); what the
vector units take for the softmax is in neither, so that the true share of the peak is smaller.

    python benchmarks/neighborhood_kernel.py
"""

import argparse
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import portable
from portable.ops._neighborhood_attention import layout, tables
from portable.pallas_kernels.block_lists import FULL, MASKED, Steps
from portable.pallas_kernels.tpu import neighborhood_attention as kernel
from portable.parity import targets

LANES, ITEM = 128, 2
RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "neighborhood_kernel.json"
SPACE, WINDOW = (256, 256), 80
CASES = [(stride, heads, width) for stride in (1, 16) for heads, width in ((1, 64), (24, 128))]
TARGETS = ("tpu-v5e", "tpu-v6e", "tpu-7x")


def fetched(steps: Steps) -> int:
    """Returns how many blocks a pipeline fetches that keeps what a slot of a step already holds."""
    numbers = np.asarray(steps.other)[0, 0]
    numbers = np.where(numbers < 0, ~numbers, numbers)
    return int(numbers.shape[1] + (np.diff(numbers, axis=0) != 0).sum())


def account(stride: int, heads: int, width: int) -> dict[str, Any]:
    """Counts the forward of a case, in bfloat16."""
    pattern = {"window": (WINDOW,) * 2, "stride": (stride,) * 2, "dilation": (1, 1), "is_causal": (False, False)}
    q = jax.ShapeDtypeStruct((1, *SPACE, heads, width), jnp.bfloat16)
    sides = kernel._cut(tables.axes(SPACE, **pattern), q, q, q)
    steps, _ = kernel.lists(sides, layout.pairs(sides), 1)
    rows, columns = layout.rows(sides)
    fan, kind = steps.other.shape[-1], np.asarray(steps.kind)[0, 0]
    computed = int(((kind & (MASKED | FULL)) != 0).sum()) * fan * rows * columns
    needed = portable.ops.neighborhood_plan(SPACE, WINDOW, stride, platform="tpu").pairs
    lanes = -(-width // LANES) * LANES  # as arrays lie in the device's memory
    tiles = math.prod(s.count for s in sides)
    moved = heads * lanes * ITEM * (2 * fetched(steps) * columns + 2 * tiles * rows)
    blocks = 2 * ITEM * lanes * (2 * rows + 2 * fan * columns)  # each twice: one is fetched while one is used
    vmem = blocks + 4 * rows * (lanes + 3 * LANES) + 2 * 4 * fan * rows * columns
    found = {
        "stride": stride, "heads": heads, "width": width, "queries": [s.queries for s in sides],
        "keys": [s.tile for s in sides], "fan": fan, "steps": len(kind), "full": float(((kind & FULL) != 0).mean()),
        "computed_over_needed": computed / needed, "flops": 4 * width * heads * computed, "bytes": moved,
        "intensity": 4 * width * heads * computed / moved, "vmem_bytes": vmem,
    }  # fmt: skip
    for name in TARGETS:
        target = targets.find(name)
        products, memory = found["flops"] / target.peak("bfloat16"), moved / (target.bandwidth or math.inf)
        useful = 4 * width * heads * needed / target.peak("bfloat16")
        found[name] = {
            "products_ms": 1e3 * products,
            "memory_ms": 1e3 * memory,
            "share": useful / max(products, memory),
        }
    return found


def main() -> None:
    """Prints a line for each case and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="where results are written")
    args = parser.parse_args()
    found = [account(*case) for case in CASES]
    for one in found:
        shares = ", ".join(f"{name} {one[name]['share']:.0%}" for name in TARGETS)
        print(
            f"stride {one['stride']}, {one['heads']} heads of {one['width']}: tiles of {one['queries']} queries and "
            f"{one['keys']} keys, {one['fan']} a step, {one['full']:.0%} of the steps unmasked; computed "
            f"{one['computed_over_needed']:.2f} x needed; {one['bytes'] / 1e6:.0f} MB, {one['intensity']:.0f} "
            f"FLOP/byte; {one['vmem_bytes'] / 2**20:.1f} MiB of VMEM; share of the peak at most: {shares}"
        )
    args.json.write_text(json.dumps({"space": SPACE, "window": WINDOW, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

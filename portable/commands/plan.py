"""`portable plan`: what neighborhood attention will cost, and a picture of what a query sees."""

import argparse
import dataclasses
import json
import re

import numpy as np

from portable.checks import PortableError
from portable.commands._report import show
from portable.reports import Report

EXAMPLES = """examples:
  portable plan 56x56 --window 7 --heads 4 --dim 32
  portable plan 256x256 --window 80 --stride 16 --target tpu-v6e --dtype bfloat16
  portable plan 16x32x32 --window 11 --causal 1,0,0 --json
  portable plan 32 --window 5 --dilation 2 --query 20
"""
# The picture is at most so many characters wide; a character then stands for several positions.
WIDEST = 40


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("space", help="positions on each of 1 to 3 axes, such as 56x56")
    parser.add_argument(
        "--window", required=True, help="positions in a window, a number or one an axis, such as 7 or 3,5"
    )
    parser.add_argument("--stride", default="1", help="queries that share a window; 1 unless given")
    parser.add_argument("--dilation", default="1", help="distance of a window's positions; 1 unless given")
    parser.add_argument("--causal", default="0", help="1 for an axis on which nobody sees later positions, such as 1,0")
    parser.add_argument("--pad-small", action="store_true", help="allow axes shorter than window * dilation")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="rows of the batch; 1 unless given")
    parser.add_argument("--heads", type=int, default=1, metavar="N", help="heads of the queries; 1 unless given")
    parser.add_argument("--key-heads", type=int, metavar="N", help="heads of keys and values; as many unless given")
    parser.add_argument("--dim", type=int, default=64, metavar="N", help="width of a head; 64 unless given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="float32 unless given")
    parser.add_argument("--tile", help="queries of a tile, one number an axis, instead of those that the form takes")
    parser.add_argument("--target", default="cpu", help="a device, such as cpu, tpu-v6e or cuda-sm90; cpu unless given")
    parser.add_argument("--query", help="the position that the picture is of, such as 3,40; the middle unless given")
    parser.add_argument("--json", action="store_true", help="print JSON, without the picture")


def run(args: argparse.Namespace) -> int:
    """Prints the plan and the picture."""
    from portable.ops import neighborhood_plan
    from portable.parity import targets

    target = targets.find(args.target)
    space = _numbers("space", args.space)
    window, stride, dilation, causal = (
        _each(name, getattr(args, name), len(space)) for name in ("window", "stride", "dilation", "causal")
    )
    plan = neighborhood_plan(
        space,
        window,
        stride,
        dilation,
        tuple(map(bool, causal)),
        pad_small=args.pad_small,
        batch=args.batch,
        heads=args.heads,
        key_heads=args.key_heads,
        dim=args.dim,
        itemsize=4 if args.dtype == "float32" else 2,
        tile=None if args.tile is None else _each("tile", args.tile, len(space)),
        platform=(targets.accelerator() or "cpu") if target.family == "device" else target.family,
    )
    if args.json:
        print(json.dumps(dataclasses.asdict(plan) | {"speedup": plan.speedup, "best_speedup": plan.best_speedup}))
        return 0
    rows = [
        ("tiles", f"{_by(plan.tiles)} of {_by(plan.tile)} queries, {_by(plan.width)} keys each"),
        ("masks", "some pairs of a tile are masked" if plan.masked else "none: every query sees all keys of its tile"),
        ("steps", f"{plan.steps}, of {_size(plan.step_bytes)} each"),
        ("products", f"{plan.flops / 1e9:.4g} GFLOP forward, {plan.backward_flops / 1e9:.4g} GFLOP backward"),
        ("memory", f"{_size(plan.moved_bytes)} read and written once; copies of keys hold {_size(plan.copied_bytes)}"),
        ("speedup", f"at most {plan.speedup:.2f} over dense attention; {plan.best_speedup:.2f} if nothing were masked"),
    ]
    if target.bandwidth is not None:
        times = plan.flops / target.peak(args.dtype), plan.moved_bytes / target.bandwidth
        rows.append(("at peak", f"{1e3 * max(times):.3g} ms on a {target.device}"))
    show([Report(f"neighborhood attention on {_by(space)}, {args.target}", tuple(rows))], as_json=False)
    query = _each("query", args.query or ",".join(str(n // 2) for n in space), len(space))
    if any(not 0 <= i < n for i, n in zip(query, space, strict=True)):
        raise PortableError(f"plan: --query must lie in the space, {_by(space)}; got {_by(query)}.")
    print(picture(plan, query))
    return 0


def picture(plan, query: tuple[int, ...]) -> str:
    """Returns what a query sees, as text: the plane of the last two axes that it lies in."""
    from portable.ops._neighborhood_attention import tables

    lines = []
    for i, n in enumerate(plan.space):
        axis = tables.Axis(n, plan.window[i], plan.stride[i], plan.dilation[i], plan.is_causal[i])
        group, p = query[i] % axis.dilation, query[i] // axis.dilation
        first, end = (x[group % len(x), p] for x in tables.bounds(axis))
        start = tables.tiling(axis, plan.tile[i]).starts[p // plan.tile[i]]
        u = np.arange(n) // axis.dilation
        same = np.arange(n) % axis.dilation == group
        lines.append((same & (u >= first) & (u < end), same & (u >= start) & (u < start + plan.width[i])))
    lines = [(np.ones(1, bool),) * 2, *lines][-2:]
    seen, visited = (np.multiply.outer(lines[0][j], lines[1][j]) for j in range(2))
    marks = seen.astype(int) + visited
    at = (0, *query)[-2:]
    marks[at] = 3
    each = -(-max(marks.shape) // WIDEST)
    pad = [(0, -n % each) if n > 1 else (0, 0) for n in marks.shape]
    rows, columns = (1 if n == 1 else each for n in marks.shape)
    marks = np.pad(marks, pad)
    marks = marks.reshape(marks.shape[0] // rows, rows, -1, columns).max((1, 3))
    text = "\n".join(" ".join("·+#@"[x] for x in row) for row in marks)
    scale = f"; a character stands for {each} positions" if each > 1 else ""
    plane = f", in the plane {query[0]} of the first axis" if len(plan.space) == 3 else ""
    return f"@ position {_by(query)}   # seen   + in its tile, masked{plane}{scale}\n{text}"


def _numbers(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+([x,]\d+)*", text):
        raise PortableError(f"plan: {name} must be numbers such as 7 or 3,5; got {text!r}.")
    return tuple(map(int, re.split("[x,]", text)))


def _each(name: str, text: str, rank: int) -> tuple[int, ...]:
    found = _numbers(name, text)
    if len(found) not in (1, rank):
        raise PortableError(f"plan: --{name} must be a number or {rank} of them, one for each axis; got {text!r}.")
    return found if len(found) == rank else found * rank


def _by(sizes) -> str:
    return " x ".join(map(str, sizes))


def _size(n: float) -> str:
    return f"{n / 2**20:.3g} MiB" if n < 2**30 else f"{n / 2**30:.3g} GiB"

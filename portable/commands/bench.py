"""`portable bench`: what ops and models cost on this machine."""

import argparse
import dataclasses
import json
import sys

from portable import reports, selection
from portable.checks import PortableError
from portable.commands._report import show

EXAMPLES = """examples:
  portable bench                            # every op at published sizes, every XLA form
  portable bench ssd --case mamba2-130m --implementation xla_scan --implementation xla_chunks
  portable bench mamba2                     # prefill, decode and training of mamba2-130m, random weights
  portable bench mamba2 --quick             # a few seconds: two layers, short inputs
  portable bench mamba2 --size 370m --dtype bfloat16 --batch 8
  portable bench mamba2 --model FOLDER --json
  portable bench dinat --size tiny --batch 8 # forward and training of images of 224 x 224 pixels
  portable bench sparse                     # trains a small model, then answers questions with sparse attention
  portable bench sparse --method MoBA --method DSA --prompt 2048 --plot moba.png
  portable bench ssd --impl xla_lanes,xla_chunks --estimate tpu-v6e   # by the compiler of a device that is not here
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "what", nargs="*", help="ops of portable.ops, models of portable.models, or sparse; without it, all ops"
    )
    parser.add_argument("--quick", action="store_true", help="small inputs and few samples: does it run, and roughly")
    parser.add_argument("--samples", type=int, metavar="N", help="runs of each program at least; 5 unless given")
    parser.add_argument("--case", action="append", default=[], help="of an op: example arguments by name (repeatable)")
    parser.add_argument(
        "--implementation",
        "--impl",
        action="extend",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME",
        help="of an op: time only this (repeatable, or several with commas)",
    )
    parser.add_argument(
        "--estimate", metavar="TARGET", help="do not run: what the compiler of this device expects, such as tpu-v6e"
    )
    parser.add_argument("--size", help="of a model: a published size; the smallest unless given")
    parser.add_argument("--model", metavar="FOLDER", help="of a model: weights from a folder or the hub")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of a model: float32 on CPU, else bfloat16")
    parser.add_argument(
        "--batch", type=int, metavar="N", help="of a model: sequences or images at once; 1 unless given"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="of a language model: tokens to read; 512 unless given")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a language model: tokens to write; 64 unless given")
    parser.add_argument("--pixels", type=int, metavar="N", help="of a model of images: their side; 224 unless given")
    parser.add_argument("--method", action="append", default=[], help="of sparse: only this method (repeatable)")
    parser.add_argument("--steps", type=int, metavar="N", help="of sparse: training steps of the small model")
    parser.add_argument("--plot", metavar="FILE", help="of sparse: the picture; sparse_attention.png unless given")
    parser.add_argument("--json", action="store_true", help="print JSON, every sample included")


def run(args: argparse.Namespace) -> int:
    """Times what was asked for and prints a table each."""
    from portable import models

    known = models.MODELS
    for name in ("samples", "batch", "prompt", "tokens", "pixels", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise PortableError(f"bench: --{name} must be at least 1; got {getattr(args, name)}.")
    if "sparse" in args.what:
        return _sparse(args)
    if given := [name for name in ("method", "steps", "plot") if getattr(args, name)]:
        raise PortableError(f"bench: --{given[0]} belongs to sparse; name it: portable bench sparse.")
    what = args.what or list(selection.ops())
    if unknown := [name for name in what if name not in known and name not in selection.ops()]:
        raise PortableError(
            f"bench: there is no op or model called {unknown[0]!r}; ops: {', '.join(selection.ops())}; "
            f"models: {', '.join(known)}; or sparse."
        )
    _check_applies(args, [name for name in what if name in known], [name for name in what if name not in known])
    if args.estimate:
        tables = [_estimate(name, args, name in known) for name in what]
    else:
        tables = [_model(name, args) if name in known else _op(name, args) for name in what]
    if args.json:
        machine = {row[0]: row[1] for row in reports.info().rows}
        print(json.dumps({"machine": machine, "results": {title: rows for title, rows, _ in tables}}, indent=2))
    else:
        for title, rows, columns in tables:
            show([_report(title, rows, columns)], as_json=False)
    return 0


def _sparse(args: argparse.Namespace) -> int:
    """Trains the model of the study, asks it with every method, prints a table and draws it."""
    from portable.commands._benchmark import sparse, timing
    from portable.training import progress, recall

    others = ("size", "model", "dtype", "batch", "tokens", "pixels", "case", "implementation", "estimate")
    if len(args.what) > 1:
        raise PortableError(f"bench: sparse is measured alone; got {', '.join(args.what)}.")
    if given := [name for name in others if getattr(args, name)]:
        raise PortableError(f"bench: --{given[0]} does not belong to sparse, which trains its own small model.")
    if unknown := [name for name in args.method if name not in sparse.METHODS]:
        raise PortableError(f"bench: there is no method called {unknown[0]!r}; methods: {', '.join(sparse.METHODS)}.")
    sizes = recall.QUICK if args.quick else recall.Sizes()
    sizes = dataclasses.replace(sizes, length=args.prompt or sizes.length, steps=args.steps or sizes.steps)
    if sizes.length < 6 * sparse.BLOCK:
        raise PortableError(f"bench: --prompt of sparse must be at least {6 * sparse.BLOCK}; got {sizes.length}.")
    shown = progress.Lines(sys.stderr) if args.json else progress.reporter()
    model, losses = recall.train(recall.small_model(sizes), sizes, shown)
    rows = list(sparse.records(model, sizes, args.method or list(sparse.METHODS), args.samples or 3, shown.note))
    title = f"answers from {sizes.length} tokens, a model of {sizes.layers} layers, on {timing.platform()}"
    picture = args.plot or "sparse_attention.png"
    sparse.draw(rows, picture, f"Sparse attention: {title}")
    if args.json:
        machine = {row[0]: row[1] for row in reports.info().rows}
        trained = {"steps": sizes.steps, "loss": losses[-1]}
        print(
            json.dumps({"machine": machine, "trained": trained, "picture": picture, "results": {title: rows}}, indent=2)
        )
    else:
        show([_report(title, rows, sparse.COLUMNS)], as_json=False)
        print(
            f"\nDrawn in {picture}. Needles and records: the share of {sizes.texts} texts' questions that is answered."
        )
    return 0


def _check_applies(args: argparse.Namespace, named: list[str], ops: list[str]) -> None:
    from portable import models

    reading = [name for name in named if name in models.decoders()]
    for option, kind, example, some in (
        *((name, "a model", "mamba2", named) for name in ("size", "model", "dtype", "batch")),
        *((name, "a language model", "mamba2", reading) for name in ("prompt", "tokens")),
        ("pixels", "a model of images", "dinat", [name for name in named if name not in reading]),
    ):
        if getattr(args, option) is not None and not some:
            raise PortableError(f"bench: --{option} belongs to {kind}; name one: portable bench {example}.")
    of_ops = [name for name in ("case", "implementation") if getattr(args, name)]
    if of_ops and len(ops) != 1:
        raise PortableError(f"bench: --{of_ops[0]} belongs to one op; name it: portable bench ssd --{of_ops[0]} NAME.")


def _estimate(name: str, args: argparse.Namespace, is_model: bool) -> tuple[str, list[dict], dict[str, str]]:
    from portable.commands._benchmark import estimates, ops

    if is_model:
        rows = estimates.of_model(name, args.estimate)
    else:
        found = list(ops.cases(name, args.case, quick=args.quick))
        rows = estimates.of_op(name, found, ops.names(name, args.implementation), args.estimate)
    return f"{name} on {args.estimate}, estimated", rows, estimates.COLUMNS


def _op(name: str, args: argparse.Namespace) -> tuple[str, list[dict], dict[str, str]]:
    from portable.commands._benchmark import ops, timing

    samples = args.samples or (2 if args.quick else 5)
    implementations = ops.names(name, args.implementation)
    rows = [
        record
        for case, make in ops.cases(name, args.case, quick=args.quick).items()
        for record in ops.records(name, case, make, implementations, samples)
    ]
    columns = {
        "case": "case",
        "implementation": "implementation",
        "forward_ms": "forward ms",
        "forward_backward_ms": "with gradients ms",
        "temporary_mib": "temporary MiB",
        "compile_s": "compile s",
        "note": "",
    }
    for row in rows:
        row["note"] = row.get("why_not") or ("chosen here" if row["automatic"] else "")
    return f"{name} on {timing.platform()}", rows, columns


def _model(name: str, args: argparse.Namespace) -> tuple[str, list[dict], dict[str, str]]:
    from portable.commands._benchmark import models, timing

    dtype = args.dtype or ("float32" if timing.platform() == "cpu" else "bfloat16")
    label, model = models.build(name, args.size, args.model, dtype, quick=args.quick)
    samples, batch = args.samples or (2 if args.quick else 5), args.batch or 1
    if hasattr(model, "prefill"):
        unit = "token"
        prompt, tokens = args.prompt or (64 if args.quick else 512), args.tokens or (8 if args.quick else 64)
        rows = list(models.records(model, batch=batch, prompt=prompt, tokens=tokens, samples=samples))
    else:
        unit, pixels = "image", args.pixels or (64 if args.quick else 224)
        label += f", {pixels} x {pixels} pixels"
        rows = list(models.image_records(model, batch=batch, pixels=pixels, samples=samples))
    columns = {
        "task": "task",
        f"{unit}s": f"{unit}s",
        "ms": "ms",
        f"ms_per_{unit}": f"ms {'a' if unit == 'token' else 'an'} {unit}",
        f"{unit}s_per_s": f"{unit}s/s",
        "temporary_mib": "temporary MiB",
        "compile_s": "compile s",
    }
    return f"{label}, {dtype}, batch {batch}, on {timing.platform()}", rows, columns


def _report(title: str, rows: list[dict], columns: dict[str, str]) -> reports.Report:
    cells = (tuple(_text(row.get(key)) for key in columns) for row in rows)
    return reports.Report(title, (tuple(columns.values()), *cells))


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

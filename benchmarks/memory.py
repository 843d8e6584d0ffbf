"""What every program needs on devices that this machine lacks, according to the devices' own compilers.

Nothing runs: each op and model is compiled ahead of time for TPUs and CUDA devices in child processes, and
the compiler's account of its memory is recorded. A program that does not fit is a result.

    pip install -e '.[aot]'
    python benchmarks/memory.py                                  # everything, about an hour on two cores
    python benchmarks/memory.py --targets tpu-v5e --only train   # programs whose name contains "train"
    python benchmarks/memory.py --show                           # the table of the committed results
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from portable import parity
from portable.parity import plan

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "aot.json"
# What a results file keeps of the compiled program's instructions.
OPCODES = ("dot", "convolution", "fusion", "while", "sort", "scatter", "gather", "custom-call")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "flax")
SMALL = 2**20  # bytes of arguments: below, a case is there to be compiled, and its memory tells nothing
STYLES = {"failed": "bold red", "cannot": "dim", "does not fit": "yellow", "compiled": "green"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(plan.TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="TEXT", help="programs whose name contains TEXT")
    parser.add_argument("--processes", type=int, default=1, help="compilers at a time (default 1)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, help="the results file")
    parser.add_argument("--show", action="store_true", help="compile nothing, show the results file")
    args = parser.parse_args(argv)
    if unknown := set(args.targets.split(",")) - set(parity.TARGETS):
        parser.error(f"unknown target {', '.join(sorted(unknown))}; there are: {', '.join(parity.TARGETS)}")
    if args.show and not args.out.exists():
        parser.error(f"there are no results at {args.out}; run without --show first")
    return args


def record(results: Sequence[parity.Result]) -> dict[str, Any]:
    """Returns what a results file holds: the compilers' versions, and a row for each program and target."""
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        row["opcodes"] = {k: v for k, v in result.opcodes.items() if k in OPCODES}
        for key in ("lower_seconds", "compile_seconds"):
            row[key] = None if row[key] is None else round(row[key], 2)
        rows.append(row | {"fits": result.fits, "spare_bytes": result.spare_bytes, "verdict": result.verdict})
    versions = {p: metadata.version(p) for p in PACKAGES if _installed(p)}
    return {"versions": versions, "results": rows}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of `new`, and those of `old` that `new` did not compile again.

    Results of other compilers are dropped: two accounts by different versions cannot stand side by side.
    """
    again = {(r["job"], r["target"]) for r in new["results"]}
    same = old.get("versions") == new["versions"]
    kept = [r for r in old["results"] if (r["job"], r["target"]) not in again] if same else []
    rows = sorted(kept + new["results"], key=lambda r: (r["job"], r["target"]))
    return new | {"results": rows}


def show(found: dict[str, Any]) -> None:
    """Prints a row for each program and a column for each target; the small cases of an op share a row."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = found["results"]
    columns = [t for t in parity.TARGETS if any(r["target"] == t for r in rows)]
    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        small = (row["argument_bytes"] or 0) < SMALL
        name = f"{row['job'].partition('/')[0]}, small cases" if small else row["job"]
        groups.setdefault(name, {}).setdefault(row["target"], []).append(row)
    table = Table(title="Memory of each program: in all / temporary", header_style="bold")
    table.add_column("program")
    for target in columns:
        memory = parity.TARGETS[target].memory_bytes
        table.add_column(target if memory is None else f"{target}\nhas {size(memory)}", justify="right")
    for name, cells in groups.items():
        shown = [_cell(cells.get(target, [])) for target in columns]
        table.add_row(name, *[Text(text, style) for text, style in shown])
    console = Console()
    console.print(table)
    for row in rows:
        if row["status"] in ("failed", "cannot"):
            console.print(f"{row['target']} {row['job']}: {row['verdict']}", style=STYLES[row["status"]])
    console.print(", ".join(f"{k} {v}" for k, v in found["versions"].items()), style="dim")


def _cell(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    if not rows:
        return "-", "dim"
    worst = min(rows, key=lambda r: list(STYLES).index(r["status"]))
    style = STYLES[worst["status"]]
    if len(rows) > 1:
        return f"{sum(r['status'] == 'compiled' for r in rows)} of {len(rows)} compiled", style
    if worst["needed_bytes"] is None:
        return worst["status"], style
    if worst["status"] == "does not fit":
        return f"{size(worst['needed_bytes'])}: short by {size(-worst['spare_bytes'])}", style
    return f"{size(worst['needed_bytes'])} / {size(worst['temp_bytes'])}", style


def size(n: int) -> str:
    """Returns a number of bytes in the unit that reads best."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.1f} {unit}"
    return f"{n} B"


def _installed(package: str) -> bool:
    return any(True for _ in metadata.distributions(name=package))


def compile_all(args: argparse.Namespace, jobs: Sequence[parity.Job]) -> list[parity.Result]:
    """Compiles the jobs and brings the results file up to date with each result."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    old = json.loads(args.out.read_text()) if args.out.exists() else {}
    results: list[parity.Result] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=len(jobs))

        def on_result(result: parity.Result) -> None:
            results.append(result)
            # Each time, because an hour's work must survive an interruption.
            draft = args.out.with_suffix(".draft")
            draft.write_text(json.dumps(merged(old, record(results)), indent=1) + "\n")
            draft.replace(args.out)
            if result.status == "failed":
                progress.console.print(f"{result.target} {result.job}: {result.verdict}", style="bold red")
            progress.update(task, advance=1, description=f"{result.target} {result.job}")

        args.out.parent.mkdir(parents=True, exist_ok=True)
        parity.run(jobs, processes=args.processes, on_result=on_result)
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, writes the results file and shows it; returns 1 if a program failed to compile."""
    args = arguments(argv)
    if args.show:
        show(json.loads(args.out.read_text()))
        return 0
    names = args.targets.split(",")
    for family in sorted({parity.TARGETS[name].family for name in names}):
        if reason := parity.missing(family):
            raise SystemExit(reason)
    jobs = [j for j in plan.op_jobs(names) + plan.model_jobs(names) if args.only in j.name]
    if not jobs:
        raise SystemExit(f"no program's name contains {args.only!r}; --show lists those compiled so far.")
    results = compile_all(args, jobs)
    show(json.loads(args.out.read_text()))
    return int(any(r.status == "failed" for r in results))


if __name__ == "__main__":
    sys.exit(main())

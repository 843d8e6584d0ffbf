"""`portable parity`: every op and model on every device, compiled for those that are not here."""

import argparse
import json
import os
import pathlib

from portable import files
from portable.checks import PortableError

_FIELDS = {"job", "target", "status", "labels", "fits", "verdict"}
EXAMPLES = """examples:
  portable parity --quick                          # ops and the smallest model, without published sizes
  portable parity --op ssd --target tpu-v6e --target cuda-sm90
  portable parity --model mamba2_130m --target tpu-v5e
  portable parity --html parity.html --json parity.json
  portable parity --json parity.json --fail-on worse   # exit code 1 if a cell that was green is not
  portable parity --json parity.json --show        # compile nothing, show what was found before

`ran` is on this machine, with the error against the definition in float64; other devices' own compilers need
`pip install 'portable-jax[aot]'` and no device. Results are kept, so a second run takes seconds.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("--op", action="append", default=[], metavar="NAME", help="only this op (repeatable)")
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="only this model (repeatable)")
    parser.add_argument("--target", action="append", default=[], metavar="NAME", help="only this device (repeatable)")
    parser.add_argument(
        "--quick", action="store_true", help="leave out published sizes, values alone, most work of models"
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="compilers at a time; 2 unless given")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="results; those found there before are kept")
    parser.add_argument("--html", type=pathlib.Path, metavar="FILE", help="write a page with filters and details")
    parser.add_argument("--markdown", action="store_true", help="print Markdown in place of the tables")
    parser.add_argument("--brief", action="store_true", help="of Markdown: the models, and ops as users get them")
    parser.add_argument("--show", action="store_true", help="compile nothing: show the results in --json")
    parser.add_argument(
        "--fail-on",
        choices=("failed", "worse", "never"),
        default="failed",
        help="what gives exit code 1: a failed cell, or one that was green before and is not; `failed` unless given",
    )
    parser.add_argument("--against", type=pathlib.Path, metavar="FILE", help="what was before; --json unless given")
    parser.add_argument("--cache", type=pathlib.Path, metavar="FOLDER", help="where results are kept between runs")
    parser.add_argument("--no-cache", action="store_true", help="compile everything again, keep nothing")


def run(args: argparse.Namespace) -> int:
    """Fills the matrix, and shows and writes it."""
    from rich.console import Console

    from portable.parity import page, report

    for file in (args.json, args.html):  # before an hour's work, not after it
        if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
            raise PortableError(f"parity: {file} cannot be written; name a file in a folder that exists and is yours.")
    old = _read(args.json) if args.json is not None and args.json.exists() else None
    if args.against is not None and not args.against.exists():
        raise PortableError(f"parity: --against needs results to compare with; there are none at {args.against}.")
    before = old if args.against is None else _read(args.against)
    if args.show:
        if old is None:
            raise PortableError(
                f"parity: --show needs results to show; there are none at {args.json or '--json FILE'}."
            )
        found, new = old, old
    else:
        new = report.record(_compile(args))
        found = report.merged(old, new) if old else new
        if args.json is not None and not (args.fail_on == "worse" and before and report.worse(before, new)):
            _write(args.json, json.dumps(found, indent=1) + "\n")
    if args.html is not None:
        _write(args.html, page.page(found))
    console = Console()
    if args.markdown:
        print(report.markdown(found, brief=args.brief))
    else:
        for table in report.tables(found if args.show else new):
            console.print(table)
        for status, sentence in report.problems(found if args.show else new):
            console.print(f"{status}: {sentence}", style=report.STYLES[status], markup=False, highlight=False)
    if args.fail_on == "worse":
        worse = report.worse(before, new) if before else []
        for sentence in worse:
            console.print(sentence, style="bold red", markup=False, highlight=False)
        if worse and args.json is not None:
            console.print(f"{args.json} is left as it was.", markup=False, highlight=False)
        return int(bool(worse))
    failed = any(r["status"] == "failed" for r in new["results"])
    return int(failed and args.fail_on == "failed")


def _compile(args: argparse.Namespace) -> list:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from portable import selection
    from portable.parity import jobs, plan, store, targets

    known = {"op": selection.ops(), "model": plan.known_models(), "target": tuple(targets.TARGETS)}
    for kind, names in known.items():
        if unknown := [name for name in getattr(args, kind) if name not in names]:
            raise PortableError(f"parity: there is no {kind} called {unknown[0]!r}; there are: {', '.join(names)}.")
    if args.processes < 1:
        raise PortableError(f"parity: --processes must be at least 1; got {args.processes}.")
    work = plan.matrix(args.target, ops=args.op or None, models=args.model or None, quick=args.quick)
    if not work:
        raise PortableError(
            "parity: nothing of what was asked for exists on these targets; leave out --target or --op."
        )
    kept = store.Store(None if args.no_cache else args.cache or store.default_folder())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("parity", total=len(work))

        def on_result(result: jobs.Result) -> None:
            if result.status == "failed":
                progress.console.print(
                    f"{result.target} {result.job}: {result.verdict}", style="bold red", markup=False
                )
            progress.update(task, advance=1, description=f"{result.target} {result.job}")

        return jobs.run(work, processes=args.processes, on_result=on_result, store=kept)


def _read(file: pathlib.Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for name in ("made", "versions"):
            found[name]
        if not all(set(row) >= _FIELDS and row["labels"].get("kind") for row in found["results"]):
            raise ValueError("rows that lack fields")
    except (OSError, ValueError, KeyError, TypeError) as fault:
        raise PortableError(
            f"parity: {file} does not hold results of `portable parity` ({fault}); move it away."
        ) from None
    return found


def _write(file: pathlib.Path, text: str) -> None:
    try:
        files.replace(file, text)
    except OSError as fault:
        raise PortableError(f"parity: {file} cannot be written: {fault.strerror}.") from None

"""`portable explain`: which implementation of an op runs on which platform, and why."""

import argparse
import importlib
from collections.abc import Callable, Sequence

import jax

from portable import reports, selection
from portable.checks import PortableError
from portable.commands._report import show

EXAMPLES = """examples:
  portable explain                          # every op
  portable explain ssd                      # one op, for the arguments of its first case
  portable explain --markdown               # every op in one table
  portable explain ssd --list               # the cases there are
  portable explain ssd --case mamba2-2.7b
  portable explain ssd --implementation xla_scan
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the command."""
    parser.epilog = EXAMPLES
    parser.add_argument("op", nargs="?", help="an op of portable.ops; without it, all of them")
    parser.add_argument("--case", help="example arguments by name; the first of --list unless given")
    parser.add_argument("--list", action="store_true", help="list the example arguments of the op")
    parser.add_argument("--implementation", metavar="NAME", help="ask for this implementation by name")
    parser.add_argument("--markdown", action="store_true", help="every op in one table, a column for a platform")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Prints a report for each op asked for."""
    if args.op is None and (args.case or args.list):
        raise PortableError("--case and --list belong to one op: portable explain ssd --list.")
    names = selection.ops() if args.op is None else (args.op,)
    if args.markdown:
        print(_markdown(names))
        return 0
    if args.list:
        show([reports.Report(name, _rows(name)) for name in names], as_json=args.json)
        return 0
    show([_explain(name, args.case, args.implementation) for name in names], as_json=args.json)
    return 0


def _explain(op: str, case: str | None, implementation: str | None) -> reports.Report:
    cases = _cases(op)
    case = case or next(iter(cases))
    if case not in cases:
        raise PortableError(f"{op}: no case called {case!r}; there are: {', '.join(cases)}.")
    arguments, options = _abstract(cases[case])
    if implementation is not None:
        options = options | {"implementation": implementation}
    report = reports.explain(op, *arguments, **options)
    return reports.Report(f"{report.title} ({case}: {_shapes(arguments)})", report.rows)


def _markdown(names: Sequence[str]) -> str:
    """Returns a table of the forms that platforms get, and of those that run by name only."""
    lines = [("op", *selection.PLATFORMS, "by name"), ("---",) * (len(selection.PLATFORMS) + 2)]
    for name in names:
        rows = _explain(name, None, None).rows
        chosen = {row[0]: row[1] for row in rows}
        others = ", ".join(f"`{row[1]}`" for row in rows if row[0] == "-")
        lines.append((f"`{name}`", *(f"`{chosen[p]}`" for p in selection.PLATFORMS), others))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rows(op: str) -> tuple[tuple[str, ...], ...]:
    return tuple((name, _shapes(_abstract(make)[0])) for name, make in _cases(op).items())


def _cases(op: str) -> dict:
    selection.implementations(op)  # an unknown op is told with the names there are
    module = importlib.import_module(f"portable.ops._{op}.cases")
    return module.CASES | getattr(module, "SIZES", {})


def _abstract(make: Callable) -> tuple[tuple, dict]:
    """Returns a case's arguments as shapes and dtypes: the largest cases are never computed."""
    options = {}

    def arrays():
        arguments, found = make()
        options.update({k: v for k, v in found.items() if not isinstance(v, jax.Array)})
        return arguments, {k: v for k, v in found.items() if isinstance(v, jax.Array)}

    arguments, found = jax.eval_shape(arrays)
    return arguments, options | found


def _shapes(arguments) -> str:
    return " ".join(f"{a.dtype.name}{list(a.shape)}".replace(" ", "") for a in jax.tree.leaves(arguments))

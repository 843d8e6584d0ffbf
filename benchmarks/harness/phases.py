"""A benchmark of phases: programs that take turns in one process, rows of ratios, a results file and its table.

All programs of a comparison are compiled and warmed up in one process, then take turns, one sample each a round, in an
order that rotates. A ratio is one of medians of wall time; beside it stand that of minima and of processor time.
"""

import argparse
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from harness import measure, report

# A waiting OpenMP thread otherwise spins on the core that others need. And large arrays cost a processor more to get
# than to fill where the C library asks Linux for them in small pages.
TUNED = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
OTHERS = ("minima", "processor time")
Times = dict[str, dict[str, Any]]


def with_gradients(fn: Callable) -> Callable:
    """Returns (arguments..., cotangent) -> (value, gradients)."""

    def both(*args: Any) -> Any:
        import jax

        out, pull = jax.vjp(fn, *args[:-1])
        return out, pull(args[-1])

    return both


def compiled(fn: Callable, *args: Any) -> tuple[Callable[[], Any], Any, float]:
    """Returns a run of a compiled program on its arguments, the program, and the seconds that compiling took."""
    import jax

    start = time.perf_counter()
    done = jax.jit(fn).lower(*args).compile()
    return functools.partial(done, *args), done, time.perf_counter() - start


def run(fn: Callable, *args: Any) -> Callable[[], Any]:
    """Returns a run of a program, compiled, on its arguments."""
    return compiled(fn, *args)[0]


def holding(once: Callable[[], Any]) -> Callable[[], Any]:
    """Returns the run with its result held until it runs again, as PyTorch holds gradients.

    What was just given back is had again at once; what other programs ran over meanwhile may have to come from a host.
    """
    held: list[Any] = []

    def again() -> Any:
        held.clear()
        held.append(once())
        return held[0]

    return again


def take_turns(programs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, Times]:
    """Runs each once to warm up, then in turns; returns seconds, wall and processor, of each.

    Where a run takes less than a second each sample follows one that is not timed: the memory of the program before is
    given back while the next one runs, and hundreds of MiB of it take longer than a whole sample of a small program.
    """
    import jax

    def timed(name: str) -> dict[str, float]:
        return measure.timed(lambda: jax.block_until_ready(programs[name]()))

    names, found = list(programs), {name: {"wall": [], "cpu": []} for name in programs}
    quick = {name: timed(name)["wall"] < 1 for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if quick[name]:
                jax.block_until_ready(programs[name]())
            for which, seconds in timed(name).items():
                found[name][which].append(seconds)
        print(f"  round {i + 1} of {rounds}", file=sys.stderr)
    return {name: {which: measure.summary(x) for which, x in both.items()} for name, both in found.items()}


def ratio(what: str, ours: Times, against: str, theirs: Times, relation: str, bar: float | None = None) -> report.Row:
    """Returns the row of a ratio of medians: our time over theirs ("<="), or theirs over ours (">=")."""

    def of(which: str, statistic: str) -> float:
        value = ours[which][statistic] / theirs[which][statistic]
        return value if relation == "<=" else 1 / value

    others = {"minima": of("wall", "min"), "processor time": of("cpu", "median")}
    texts = milliseconds(ours["wall"]["median"]), against, milliseconds(theirs["wall"]["median"])
    return report.Row(what, *texts, of("wall", "median"), relation, bar, others=others)


def milliseconds(seconds: float) -> str:
    """Returns them with three digits or more."""
    ms = 1e3 * seconds
    return f"{ms:.{max(0, 2 - len(str(int(ms))) + 1)}f} ms"


def limit(what: str, value: float, unit: str, bar: float | None = None) -> report.Row:
    """Returns the row of a number that must not exceed the bar."""
    text = f"{value:.1f} {unit}"
    return report.Row(what, text, "", "", value, "<=", bar, text)


def main(
    title: str,
    doc: str | None,
    phases: Mapping[str, Callable[[int], Iterable[Sequence[report.Row]]]],
    results: pathlib.Path,
    *,
    rounds: int,
    by_name: Sequence[str] = (),
) -> int:
    """Runs phases, writes their results as each part is done, and prints the table; returns 1 if a run misses a bar.

    Args:
      title: of the table.
      doc: what --help says.
      phases: by name: a generator of rows, given the number of rounds.
      results: the file that holds what was found.
      rounds: samples of each program.
      by_name: the phases that run only when named.
    """
    default = [name for name in phases if name not in by_name]
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = f"{', '.join(phases)}; without one: {', '.join(default)}"
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=what)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"samples of each program (default {rounds})")
    parser.add_argument("--threads", type=int, default=2, help="processors the programs may use (default 2)")
    parser.add_argument("--json", type=pathlib.Path, default=results, help="results file")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--markdown", action="store_true", help="with --show: in Markdown")
    args = parser.parse_args()
    if unknown := set(args.phases) - set(phases):
        parser.error(f"there is no phase {sorted(unknown)[0]!r}; there are: {', '.join(phases)}")
    if not args.show and any(os.environ.get(name) != value for name, value in TUNED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED})
    found = json.loads(args.json.read_text()) if args.json.exists() else {"phases": {}}
    if not args.show:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        measure.limit_threads(args.threads)
    for phase in [] if args.show else args.phases or default:
        made: dict[str, Any] = {"machine": measure.machine(), "rounds": args.rounds, "threads": args.threads}
        found["phases"][phase] = made | {"rows": []}
        for rows in phases[phase](args.rounds):
            found["phases"][phase]["rows"] += [row.record() for row in rows]
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    rows = [
        report.Row(**{key: value for key, value in row.items() if key != "passed"})
        for phase in phases
        for row in found["phases"].get(phase, {"rows": []})["rows"]
    ]
    if args.markdown:
        print(_where(found["phases"]) + "\n\n" + report.markdown(rows))
    else:
        report.show(title, rows, OTHERS)
    return int(not args.show and any(row.passed is False for row in rows))


def _where(phases: Mapping[str, dict[str, Any]]) -> str:
    """Returns the machine, the versions and the days of what was found."""
    last = max(phases.values(), key=lambda phase: phase["machine"]["date"])["machine"]
    versions = [f"{name} {v}" for name, v in last["versions"].items() if v and name in ("jax", "torch", "transformers")]
    days = sorted({phase["machine"]["date"][:10] for phase in phases.values()})
    return f"{last['processor']}, {last['cores']} cores; {', '.join(versions)}; {' and '.join(days)}:"

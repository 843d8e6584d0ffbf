"""Mamba-2 beside its peers: decode, prefill, training, memory, compile time and accuracy on a processor.

Every peer runs in a process of its own, with the same number of threads, warmed up; they take turns, so that
whatever else the machine does falls on all of them. The bars stand beside the ratios.

    pip install -e . && pip install -r benchmarks/requirements.txt
    python benchmarks/mamba2.py                                      # everything, about half an hour on two cores
    python benchmarks/mamba2.py decode roofline --json trial.json    # two of the phases
    python benchmarks/mamba2.py --rounds 1 --no-sweep --json trial.json
    python benchmarks/mamba2.py --show                               # the table of the committed results

The weights are random, in the shapes of mamba2-130m, float32; transformers writes them into a scratch folder.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from harness import measure, report
from mamba2_peers import phases, verdicts

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "mamba2_cpu.json"
SIDE_BY_SIDE = ("decode", "prefill512", "prefill2048", "train512")
PHASES = {
    **{task: lambda run, task=task: phases.side_by_side(run, task) for task in SIDE_BY_SIDE},
    "roofline": phases.roofline,
    "compile": phases.compiling,
    "accuracy": phases.accuracy,
    "greedy": phases.greedy,
    "context": phases.context,
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)}; all unless given")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each program (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="processors each program may use (default 2)")
    parser.add_argument("--tokens", type=int, default=64, help="tokens decoded in one sample (default 64)")
    parser.add_argument("--peers", default="mamba2_jax,transformers", help="comma-separated (default: both)")
    parser.add_argument("--no-sweep", action="store_true", help="only default chunk sizes of the peers")
    parser.add_argument("--remat", default="none", help="our training step's remat policy (default none)")
    parser.add_argument("--layers", choices=("stacked", "list"), default="stacked", help="our layers in training")
    parser.add_argument("--contexts", type=int, nargs=2, default=(1024, 65536), metavar="N", help="for `context`")
    parser.add_argument("--checkpoint", type=pathlib.Path, help="folder to take or keep the random weights in")
    parser.add_argument("--tiny", action="store_true", help="two small layers: tries the benchmark, measures nothing")
    parser.add_argument("--json", type=pathlib.Path, help=f"results file (default {RESULTS.relative_to(HERE.parent)})")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--renew", action="store_true", help="measure the phases named again, keep the others' results")
    parser.add_argument("--markdown", action="store_true", help="with --show: the table alone, in Markdown")
    args = parser.parse_args(argv)
    if unknown := set(args.phases) - set(PHASES):
        parser.error(f"there is no phase {sorted(unknown)[0]!r}; there are: {', '.join(PHASES)}")
    for package in ("mamba2_jax", "transformers", "torch", "portable"):
        if not args.show and importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed: pip install -e . && pip install -r benchmarks/requirements.txt")
    if args.json is None and (args.tiny or args.phases) and not (args.show or args.renew):
        parser.error("a partial run does not replace the committed results: give --renew, or a file with --json")
    if args.renew and not (args.phases and (args.json or RESULTS).exists()):
        parser.error("--renew needs the names of phases and a results file")
    return args


def main() -> int:
    """Runs the phases, writing the results after each, and prints the table."""
    args = arguments()
    target = args.json or RESULTS
    if args.show:
        found = json.loads(target.read_text())
        return markdown(found) if args.markdown else show(found)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.checkpoint or pathlib.Path(scratch)
        if not (folder / "config.json").exists():
            say("writing random weights with transformers")
            script = [sys.executable, str(HERE / "mamba2_peers" / "checkpoint.py"), str(folder)]
            subprocess.run([*script, *(["--tiny"] if args.tiny else [])], check=True, capture_output=True)
        config = json.loads((folder / "config.json").read_text())
        run = phases.Run(
            checkpoint=folder,
            peers=tuple(args.peers.split(",")) if args.peers else (),
            rounds=args.rounds,
            threads=args.threads,
            tokens=args.tokens,
            sweep=not args.no_sweep,
            train={"remat": args.remat, "stacked": args.layers == "stacked"},
            contexts=tuple(args.contexts),
            piece=min(1024, *args.contexts),
            seeds=(7,) if args.tiny else (7, 8, 9, 10),
            length=40 if args.tiny else 300,
            vocab_size=config["vocab_size"],
            say=say,
        )
        found: dict[str, Any] = {
            "what": "mamba2-130m shapes, random weights, float32, batch 1" if not args.tiny else "tiny, a trial",
            "machine": measure.machine(),
            "settings": {
                "rounds": args.rounds,
                "threads": args.threads,
                "sweep": run.sweep,
                "train": run.train,
            },
            "config": config,
            "phases": {},
        }
        if args.renew:
            before = json.loads(target.read_text())
            if different := [key for key in ("what", "settings", "config") if before[key] != found[key]]:
                raise SystemExit(f"{target} was measured with other {', '.join(different)}: renew it whole.")
            date = found["machine"]["date"]
            found = before | {"renewed": before.get("renewed", {}) | dict.fromkeys(args.phases, date)}
        for name in PHASES:
            if name == "greedy" and "transformers" not in run.peers:
                say("greedy: left out, it needs transformers")
            elif not args.phases or name in args.phases:
                found["phases"][name] = PHASES[name](run)
                found["load_average_at_end"] = list(os.getloadavg())
                found["rows"] = [row.record() for row in verdicts.rows(found["phases"])]
                found["claims"] = verdicts.claims(found["phases"])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(json.dumps(found, indent=1) + "\n")
    return show(found)


def show(found: dict[str, Any]) -> int:
    """Prints a results file; the exit code is 1 if a bar does not hold."""
    machine, settings = found["machine"], found["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    print(f"\n{found['what']}; {settings['rounds']} rounds, {settings['threads']} threads")
    print(f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['date']}")
    print(f"{versions}; our training step: {settings['train']}")
    print("".join(f"renewed: {name}, {date}\n" for name, date in found.get("renewed", {}).items()))
    rows = verdicts.rows(found["phases"])
    report.show("ratios of medians; the columns after them: of minima, of CPU time", rows, verdicts.STATISTICS)
    claims = found["claims"]
    if claims["tokens_per_s_here"]:
        print("\nPublished by others, on other hardware:")
        for one in claims["published"]:
            print(f"  {one['who']} ({one['where']}): {one['claim']}")
        print("Here, batch 1:")
        for name, speed in claims["tokens_per_s_here"].items():
            saved = claims["recompute_over_cached_here"].get(name, {})
            text = "".join(f"; a cached token is {times:.0f}x faster {at}" for at, times in saved.items())
            print(f"  {name}: {speed:.3g} tokens/s{text}")
    return int(any(row.passed is False for row in rows))


def markdown(found: dict[str, Any]) -> int:
    """Prints a results file as a Markdown table under a line that says what was measured."""
    machine = found["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    print(f"{found['what']}; {machine['processor']}, {found['settings']['threads']} threads; {versions};")
    renewed = "".join(f"; `{name}` renewed {date}" for name, date in found.get("renewed", {}).items())
    print(f"{machine['date']}{renewed}:\n")
    print(report.markdown(verdicts.rows(found["phases"])))
    return 0


def say(line: str) -> None:
    """Progress, on the error stream."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Mamba-2 beside a peer on TPUs that are not here: the time their compiler estimates, and the bytes a step moves.

libtpu compiles both programs on a processor and writes what it expects of each; `portable.parity.cost` says what that
cannot see. Both are at the widths of mamba2-2.7b in bfloat16: a prefill of 2048 tokens, from tokens to the last logits,
and (ours) a decode step.

    pip install -e '.[aot]' && pip install --no-deps mamba2-jax==1.1.2
    python benchmarks/mamba2_tpu.py                          # about half an hour on two cores
    python benchmarks/mamba2_tpu.py --layers 2 --json trial.json
    python benchmarks/mamba2_tpu.py --show                   # the table of the committed results
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import pathlib
import sys
from typing import Any

from harness import report

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "mamba2_tpu.json"
TARGETS = ("tpu-v5e", "tpu-v6e")
LENGTH, LAYERS = 2048, 64
AS_SHIPPED, LAST_ONLY = "mamba2-jax", "mamba2-jax, head on one position"
PREFILL_BAR, DECODE_BAR = 0.6, 1.1
# What the authors of "Compiler-First State Space Duality" measured: TFLOP/s of prefill, share of bandwidth in decode.
PUBLISHED = {"tpu-v6e": (140.0, 0.64)}


def measure(targets: list[str], layers: int, only: list[str]) -> dict[str, Any]:
    """Compiles every program (or `only` some) for every target; returns what the results file holds."""
    from portable import parity
    from portable.models.mamba2.config import Mamba2Config

    if reason := parity.missing("tpu"):
        raise SystemExit(reason)
    if importlib.util.find_spec("mamba2_jax") is None:
        raise SystemExit("the peer is not installed: pip install --no-deps mamba2-jax==1.1.2")
    config = dataclasses.replace(Mamba2Config.mamba2_2_7b(), num_hidden_layers=layers).to_dict()
    ours = {"kind": "mamba2", "config": config, "dtype": "bfloat16", "batch": 1, "length": LENGTH}
    model, peer = "portable.parity.programs:model", "mamba2_peers.estimated:mamba2_jax"
    programs = {
        "prefill": (model, ours | {"work": "prefill"}),
        "decode": (model, ours | {"work": "decode"}),
        AS_SHIPPED: (peer, {"layers": layers, "length": LENGTH, "last": False}),
        LAST_ONLY: (peer, {"layers": layers, "length": LENGTH, "last": True}),
    }
    programs = {name: program for name, program in programs.items() if name in (only or programs)}
    jobs = [parity.Job(n, t, build, kwargs, 1800.0) for t in targets for n, (build, kwargs) in programs.items()]

    def told(result: parity.Result) -> None:
        seconds = f", compiled in {result.compile_seconds:.0f} s" if result.compile_seconds else ""
        print(f"{result.target}  {result.job}: {result.verdict}{seconds}", file=sys.stderr, flush=True)

    found = parity.run(jobs, on_result=told)
    if failed := [r for r in found if r.status not in ("compiled", "does not fit") or not r.estimated_seconds]:
        raise SystemExit("\n".join(f"{r.target} {r.job}: {r.verdict}" for r in failed))
    kept = (
        "target",
        "job",
        "status",
        "estimated_seconds",
        "roofline_seconds",
        "flops",
        "moved_bytes",
        "accessed_bytes",
    )
    return {
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "jaxlib", "libtpu", "flax", "mamba2-jax")},
        "layers": layers,
        "length": LENGTH,
        "results": [{name: getattr(r, name) for name in kept} for r in found],
    }


def rows(found: dict[str, Any]) -> list[report.Row]:
    """Returns the table's rows."""
    from portable import parity

    by = {(r["target"], r["job"]): r for r in found["results"]}
    out = []
    for target in dict.fromkeys(r["target"] for r in found["results"]):
        place, ours, step = parity.TARGETS[target], by[target, "prefill"], by[target, "decode"]
        mine = ours["estimated_seconds"]
        for peer, bar in ((AS_SHIPPED, None), (LAST_ONLY, PREFILL_BAR)):
            theirs = by[target, peer]["estimated_seconds"]
            what = f"{target}: prefill {found['length']}, estimated"
            out.append(
                report.Row(what, f"{mine * 1e3:.1f} ms", peer, f"{theirs * 1e3:.1f} ms", mine / theirs, "<=", bar)
            )
        speed, share = PUBLISHED.get(target, (place.peak("bfloat16") / 1e12, None))
        against = "measured, Compiler-First SSD" if target in PUBLISHED else "the device's peak"
        rate = ours["flops"] / mine / 1e12
        out.append(report.Row("  its rate", f"{rate:.0f} TFLOP/s", against, f"{speed:.0f} TFLOP/s", rate / speed))
        moved, needed, took = step["accessed_bytes"], step["moved_bytes"], step["estimated_seconds"]
        sizes = f"{moved / 1e9:.3f} GB", "weights + 2 states", f"{needed / 1e9:.3f} GB"
        out.append(report.Row(f"{target}: decode, moved", *sizes, moved / needed, "<=", DECODE_BAR))
        # The estimate of a step is of its arithmetic: what the memory allows bounds it from the other side.
        full = moved / place.bandwidth
        text = f"at most {full / max(took, full):.0%}" + (f", measured {share:.0%}" if share else "")
        times = f"{took * 1e3:.2f} ms", "at full bandwidth", f"{full * 1e3:.2f} ms"
        out.append(report.Row("  a token, estimated", *times, took / full, value_text=text))
    return out


def main() -> int:
    """Measures, or shows what was measured; returns 1 where a bar does not hold."""
    from portable import files, parity

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help=f"comma-separated (default {','.join(TARGETS)})")
    parser.add_argument("--layers", type=int, default=LAYERS, help=f"of the model (default {LAYERS})")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="results file")
    parser.add_argument("--only", action="append", default=[], choices=("prefill", "decode"), help="renew these alone")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--markdown", action="store_true", help="with --show: the table in Markdown")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := [t for t in targets if not t.startswith("tpu-") or t not in parity.TARGETS]:
        parser.error(f"--targets must be TPUs; got {unknown[0]!r}")
    if not (args.json if args.show else args.json.parent).exists():
        parser.error(f"there is no {args.json if args.show else args.json.parent}")
    if not args.show:
        found = measure(targets, args.layers, args.only)
        if args.only:  # the others' results are kept
            old = json.loads(args.json.read_text())
            if old | {"results": []} != found | {"results": []}:
                parser.error(f"{args.json} was made with other versions or layers; renew it whole")
            rows_by = {(r["target"], r["job"]): r for r in [*old["results"], *found["results"]]}
            found["results"] = list(rows_by.values())
        files.replace(args.json, json.dumps(found, indent=1) + "\n")
    found = json.loads(args.json.read_text())
    table = rows(found)
    if args.markdown:
        print(report.markdown(table))
        return 0
    report.show(f"mamba2-2.7b, bfloat16, {found['layers']} layers, by libtpu {found['versions']['libtpu']}", table)
    return int(any(row.passed is False for row in table))


if __name__ == "__main__":
    raise SystemExit(main())

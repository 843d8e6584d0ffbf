"""`attention` beside `jax.nn.dot_product_attention` on a processor: time, memory over the length, and accuracy.

Value and gradients of one layer's attention, compiled; the programs take turns in one process. Memory is what XLA's
compiler gives a program for temporaries, so lengths that would take long to run cost a compilation only.

    python benchmarks/attention.py                      # results/attention_cpu.json, a few minutes on two cores
    python benchmarks/attention.py --show               # the table of the committed results
    python benchmarks/attention.py --rounds 1 --json trial.json
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import measure, report

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "attention_cpu.json"
OURS, PEER = "portable", "jax.nn"
# (batch, length, heads, groups, width, causal); the first is the one that is judged.
SHAPES = {
    "4k, 4 heads of 64": (1, 4096, 4, 4, 64, False),
    "4k, 4 heads of 64, causal": (1, 4096, 4, 4, 64, True),
    "4k, 8 heads of 128 in 2 groups, causal": (1, 4096, 8, 2, 128, True),
    "1k, 12 heads of 64, batch 4, causal": (4, 1024, 12, 12, 64, True),
    "128, 12 heads of 64, batch 8, causal": (8, 128, 12, 12, 64, True),
}
TIME_BAR, GRADIENT_BAR = 1.3, 5e-6
# Temporaries of value and gradients at these lengths; the peer's only where they fit a machine.
LENGTHS, PEER_LENGTHS = (2048, 4096, 8192, 16384, 32768, 65536), (2048, 4096, 8192)
LINEAR = (8192, 16384, 32768, 65536)  # where blocks are full, and no constant hides the slope
STATISTICS = ("minima", "cpu")


def functions() -> dict[str, Callable]:
    """Returns attention of (q, k, v, is_causal) by name."""
    import jax

    from portable.ops import attention

    return {
        OURS: lambda q, k, v, causal: attention(q, k, v, is_causal=causal),
        PEER: lambda q, k, v, causal: jax.nn.dot_product_attention(q, k, v, is_causal=causal),
    }


def compiled(name: str, b: int, t: int, h: int, g: int, width: int, causal: bool) -> tuple[Any, list]:
    """Returns the compiled value and gradients, and the shapes of their arguments."""
    import jax
    import jax.numpy as jnp

    attend = functions()[name]

    def both(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, causal), q, k, v)
        return out, pull(dout)

    shapes = [jax.ShapeDtypeStruct((b, t, n, width), jnp.float32) for n in (h, g, g, h)]
    return jax.jit(both).lower(*shapes).compile(), shapes


def times(rounds: int) -> dict[str, dict[str, list]]:
    """Returns samples of each shape and program."""
    import jax

    found: dict[str, dict[str, list]] = {}
    for shape, sizes in SHAPES.items():
        programs = {name: compiled(name, *sizes) for name in functions()}
        args = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(programs[OURS][1])]
        runs = {n: lambda p=p, args=args: jax.block_until_ready(p(*args)) for n, (p, _) in programs.items()}
        for run in runs.values():
            run()
        samples: dict[str, list] = {name: [] for name in runs}
        for number in range(rounds):
            for name in list(runs)[:: 1 if number % 2 else -1]:
                samples[name].append(measure.timed(runs[name]))
        found[shape] = samples
        say(f"time: {shape}")
    return found


def memory() -> dict[str, dict[str, int]]:
    """Returns the bytes of temporaries by program and length, at 4 heads of 64."""
    found: dict[str, dict[str, int]] = {}
    for name, lengths in ((OURS, LENGTHS), (PEER, PEER_LENGTHS)):
        found[name] = {}
        for t in lengths:
            done = compiled(name, 1, t, 4, 4, 64, False)[0].memory_analysis()
            found[name][str(t)] = done.temp_size_in_bytes
        say(f"memory: {name}")
    return found


def fit(temp: dict[str, int]) -> dict[str, float]:
    """Returns a line through bytes over lengths: its slope and offset, and the largest deviation as a share."""
    lengths, sizes = np.array(LINEAR, float), np.array([temp[str(t)] for t in LINEAR], float)
    slope, offset = np.polyfit(lengths, sizes, 1)
    power = np.polyfit(np.log(lengths), np.log(sizes), 1)[0]
    off = float(np.abs(slope * lengths + offset - sizes).max() / sizes.max())
    return {"bytes_per_token": float(slope), "offset_bytes": float(offset), "deviation": off, "power": float(power)}


def accuracy() -> dict[str, float]:
    """Returns relative errors of value and gradients against the definition in float64, at 1024 tokens."""
    import jax
    import jax.numpy as jnp

    from portable.ops import attention
    from portable.parity.numbers import relative

    found = {}
    for name in (OURS, PEER):
        program, shapes = compiled(name, 1, 1024, 4, 2, 64, True)
        args = [np.asarray(jax.random.normal(jax.random.key(i), x.shape)) for i, x in enumerate(shapes)]
        got = jax.tree.leaves(program(*args))
        with jax.enable_x64(True):

            def defined(q: Any, k: Any, v: Any) -> Any:
                return attention(q, k, v, is_causal=True, implementation="reference")

            q, k, v, dout = (jnp.asarray(x, jnp.float64) for x in args)
            out, pull = jax.vjp(defined, q, k, v)
            found[name] = max(relative(x, y) for x, y in zip(got, (out, *pull(dout)), strict=True))
    say("accuracy")
    return found


def rows(found: dict[str, Any]) -> list[report.Row]:
    """Returns the verdicts."""
    out = []
    for number, (shape, samples) in enumerate(found["times"].items()):
        wall, cpu = ({n: [x[kind] for x in s] for n, s in samples.items()} for kind in ("wall", "cpu"))
        median = {n: statistics.median(x) for n, x in wall.items()}
        others = {
            "minima": min(wall[OURS]) / min(wall[PEER]),
            "cpu": statistics.median(cpu[OURS]) / statistics.median(cpu[PEER]),
        }
        sides = [f"{1e3 * median[n]:.3g} ms" for n in (OURS, PEER)]
        bar = TIME_BAR if number < 2 else None
        ratio = median[OURS] / median[PEER]
        out.append(
            report.Row(f"value and gradients, {shape}", sides[0], PEER, sides[1], ratio, "<=", bar, None, others)
        )
    line, temp = fit(found["memory"][OURS]), found["memory"]
    for t in PEER_LENGTHS[-1:]:
        ours, theirs = (temp[n][str(t)] for n in (OURS, PEER))
        what = f"temporaries at {t} tokens, 4 heads of 64"
        out.append(
            report.Row(what, f"{ours / 2**20:.0f} MiB", PEER, f"{theirs / 2**20:.0f} MiB", ours / theirs, "<=", None)
        )
    what = f"temporaries from {LINEAR[0]} to {LINEAR[-1]} tokens grow as n to the power"
    ours = f"{line['bytes_per_token']:.0f} B a token"
    deviation = f"a line within {100 * line['deviation']:.1f} %"
    out.append(report.Row(what, ours, "", deviation, line["power"], "<=", 1.05))
    errors = found["accuracy"]
    sides = [f"{errors[n]:.1e}" for n in (OURS, PEER)]
    out.append(
        report.Row(
            "error of value and gradients", *sides[:1], PEER, sides[1], errors[OURS], "<=", GRADIENT_BAR, sides[0]
        )
    )
    return out


def show(found: dict[str, Any]) -> int:
    """Prints a results file; the exit code is 1 if a bar does not hold."""
    machine = found["machine"]
    print(f"\nattention in float32, {found['rounds']} rounds; {machine['processor']}, {found['threads']} threads")
    load = machine["load_average_at_start"][0]
    print(f"jax {machine['versions']['jax']}; {machine['date']}; load average at the start {load:.1f}")
    for name, temp in found["memory"].items():
        print(f"temporaries of {name}: " + ", ".join(f"{t}: {x / 2**20:.0f} MiB" for t, x in temp.items()))
    verdicts = rows(found)
    report.show("ratios of medians; the columns after them: of minima, of CPU time", verdicts, STATISTICS)
    return int(any(row.passed is False for row in verdicts))


def say(line: str) -> None:
    """Progress, on the error stream."""
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """Measures, writes the results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each program (default 9)")
    parser.add_argument("--threads", type=int, default=2, help="processors the programs may use (default 2)")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="results file")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    args = parser.parse_args()
    if not args.show:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        measure.limit_threads(args.threads)
        found: dict[str, Any] = {"machine": measure.machine(), "rounds": args.rounds, "threads": args.threads}
        found |= {"shapes": SHAPES, "memory": memory(), "accuracy": accuracy(), "times": times(args.rounds)}
        found["fit"] = fit(found["memory"][OURS])
        found["load_average_at_end"] = list(os.getloadavg())
        found["rows"] = [row.record() for row in rows(found)]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return show(json.loads(args.json.read_text()))


if __name__ == "__main__":
    sys.exit(main())

"""Neighborhood attention beside its peers: dense masked attention, unfolded windows, NATTEN, and its own plan.

All programs of a phase are compiled and warmed up in one process, then take turns, one sample each a round, in an order
that rotates. A ratio is one of medians of wall time.

    pip install -e . && pip install torch && pip install --no-deps natten==0.21.7
    python benchmarks/neighborhood.py                          # plane, strided and volume, some minutes on two cores
    python benchmarks/neighborhood.py plane --rounds 15        # one phase; its results replace those it had
    pip install -e '.[aot]' && python benchmarks/neighborhood.py tpu   # what a TPU's compiler expects
    python benchmarks/neighborhood.py --show                   # the table of the committed results
"""

import argparse
import functools
import json
import math
import os
import pathlib
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

os.environ.update({"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"})

import jax
import jax.numpy as jnp
import numpy as np
from harness import measure, report

import portable
from portable import parity
from portable.parity import hlo, loops

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "neighborhood.json"
OTHERS = ("minima", "processor time")
na = portable.ops.neighborhood_attention


def _visible(length: int, window: int) -> np.ndarray:
    first = np.clip(np.arange(length) - window // 2, 0, length - window)
    return (np.arange(length) >= first[:, None]) & (np.arange(length) < first[:, None] + window)


def dense(q, k, v, *, window: int):
    """Attention of all to all, masked: what one writes in jnp."""
    b, x, y, h, d = q.shape
    flat = lambda z: z.reshape(b, x * y, h, d)  # noqa: E731
    mask = jnp.asarray(np.kron(_visible(x, window), _visible(y, window)))
    scores = jnp.einsum("bqhk,bshk->bhqs", flat(q), flat(k)) * d**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
    return jnp.einsum("bhqs,bshk->bqhk", weights, flat(v)).reshape(q.shape)


def unfolded(q, k, v, *, window: int):
    """Every query's window gathered, then a matrix-vector product each."""
    index = [np.clip(np.arange(n) - window // 2, 0, n - window)[:, None] + np.arange(window) for n in q.shape[1:3]]
    take = lambda z: jnp.take(jnp.take(z, index[0], axis=1), index[1], axis=3)  # noqa: E731 (b, x, u, y, w, h, k)
    scores = jnp.einsum("bxyhk,bxuywhk->bxyhuw", q, take(k)) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores.reshape(*scores.shape[:4], -1), -1).reshape(scores.shape)
    return jnp.einsum("bxyhuw,bxuywhk->bxyhk", weights, take(v))


def natten_flex(q, k, v, *, window: int) -> Callable:
    """Returns NATTEN's flex path on the same arrays, as it ships for processors."""
    import torch
    from natten.functional import neighborhood_attention_generic

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arrays = [torch.from_numpy(np.array(x)) for x in (q, k, v)]

    def run():
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return neighborhood_attention_generic(*arrays, kernel_size=(window, window), backend="flex-fna")

    return run


def all_pairs(q, k, v):
    """Attention of all to all in memory linear in the length: the library's, else queries in blocks."""
    b, x, y, h, d = q.shape
    flat = [z.reshape(b, x * y, h, d) for z in (q, k, v)]
    if attention := getattr(portable.ops, "attention", None):
        return attention(*flat).reshape(q.shape)

    def block(rows):
        scores = jnp.einsum("bqhk,bshk->bhqs", rows, flat[1]) * d**-0.5
        return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(scores, -1), flat[2])

    rows = flat[0].reshape(b, -1, 256, h, d)
    return jnp.moveaxis(jax.lax.map(block, jnp.moveaxis(rows, 1, 0)), 0, 1).reshape(q.shape)


def with_gradients(fn: Callable) -> Callable:
    """Returns (q, k, v, dout) -> (value, gradients)."""

    def both(q, k, v, dout):
        out, pull = jax.vjp(fn, q, k, v)
        return out, *pull(dout)

    return both


def product_flops(text: str) -> int:
    """Returns the FLOPs of the matrix products in an optimised program, a loop's body as often as it runs."""
    computations, entry = hlo.parse(text)

    def count(name: str) -> int:
        total = 0
        for line in computations[name].values():
            if line.opcode == "while":
                total += loops.trips(computations, name, line) * count(loops.called(line, "body"))
            elif line.opcode in ("call", "fusion"):
                total += count(loops.called(line, "to_apply" if line.opcode == "call" else "calls"))
            elif line.opcode == "dot":
                [(_, _, left)] = hlo.arrays(computations[name][line.operands[0]].type)
                [(_, _, out)] = hlo.arrays(line.type)
                contracted = line.rest.partition("lhs_contracting_dims={")[2].partition("}")[0]
                total += 2 * math.prod(out) * math.prod(left[int(i)] for i in contracted.split(","))
        return total

    return count(entry)


def compiled(fn: Callable, *args: Any) -> tuple[Callable, dict[str, float]]:
    """Returns a program, and what compiling it took: seconds, temporary bytes, FLOPs of products."""
    start = time.perf_counter()
    done = jax.jit(fn).lower(*args).compile()
    return done, {
        "compile_s": time.perf_counter() - start,
        "temp_bytes": hlo.memory(done)["temp"],
        "flops": product_flops(hlo.text(done)),
    }


def take_turns(programs: dict[str, Callable], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs each once to warm up, then in turns; returns seconds, wall and processor, of each.

    Where a run takes less than a second each sample follows one that is not timed: the memory of the program before is
    given back while the next one runs, and hundreds of MiB of dense scores take longer than a whole sample of ours.
    """
    names, found = list(programs), {name: {"wall": [], "cpu": []} for name in programs}
    quick = {
        name: measure.timed(lambda name=name: jax.block_until_ready(programs[name]()))["wall"] < 1 for name in names
    }
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            if quick[name]:
                jax.block_until_ready(programs[name]())
            taken = measure.timed(lambda name=name: jax.block_until_ready(programs[name]()))
            for which, seconds in taken.items():
                found[name][which].append(seconds)
    return {name: {which: measure.summary(x) for which, x in both.items()} for name, both in found.items()}


def speedup(what: str, ours: dict, theirs: dict, against: str, bar: float | None) -> report.Row:
    """Returns the row of a ratio of medians."""
    ratio = lambda which, of: theirs[which][of] / ours[which][of]  # noqa: E731
    return report.Row(
        what,
        f"{1e3 * ours['wall']['median']:.2f} ms",
        against,
        f"{1e3 * theirs['wall']['median']:.1f} ms",
        ratio("wall", "median"),
        ">=",
        bar,
        others={"minima": ratio("wall", "min"), "processor time": ratio("cpu", "median")},
    )


def _arrays(*shape: int, count: int = 3) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i in range(count)]


def plane(rounds: int) -> list[report.Row]:
    """56 x 56, 4 heads of 32, windows of 7 x 7: the first level of a NAT."""
    q, k, v, dout = _arrays(1, 56, 56, 4, 32, count=4)
    forms = {"ours": na, "dense masked": dense, "unfolded": unfolded}
    calls = {name: functools.partial(fn, window=7) for name, fn in forms.items()}
    want = calls["dense masked"](q, k, v)
    rows, memory = [], {}
    for what, args in (("forward", (q, k, v)), ("forward and backward", (q, k, v, dout))):
        made = {n: compiled(with_gradients(f) if len(args) == 4 else f, *args) for n, f in calls.items()}
        programs = {name: functools.partial(done, *args) for name, (done, _) in made.items()}
        if len(args) == 3:
            programs["NATTEN flex"] = natten_flex(q, k, v, window=7)
            for name in ("ours", "unfolded", "NATTEN flex"):
                error = np.abs(np.asarray(programs[name]()) - want).max()
                assert error < 1e-5, (name, error)
        times = take_turns(programs, rounds)
        bars = {"dense masked": 20, "unfolded": 10 if len(args) == 3 else 3, "NATTEN flex": 5}
        rows += [speedup(f"56x56, {what}", times["ours"], times[n], n, bars[n]) for n in programs if n != "ours"]
        memory[what] = {name: info["temp_bytes"] for name, (_, info) in made.items()}
    for what, found in memory.items():
        ours, theirs = found["ours"], found["dense masked"]
        text = f"{ours / 2**20:.1f} MiB", "dense masked", f"{theirs / 2**20:.0f} MiB"
        rows.append(report.Row(f"56x56, {what}, memory", *text, ours / theirs, "<=", 1 / 8, f"1/{theirs / ours:.0f}"))
    return rows


def strided(rounds: int) -> list[report.Row]:
    """256 x 256, windows of 80 x 80, 1 head of 64: the plan's FLOPs and its bound."""
    q, k, v = _arrays(1, 256, 256, 1, 64)
    rows, plans = [], {}
    programs: dict[str, Callable] = {}
    for stride in (16, 1):
        plans[stride] = portable.ops.neighborhood_plan((256, 256), 80, stride, heads=1, dim=64)
        done, info = compiled(functools.partial(na, window=80, stride=stride), q, k, v)
        programs[f"stride {stride}"] = functools.partial(done, q, k, v)
        counted, planned = info["flops"], plans[stride].flops
        text = f"{counted / 1e9:.2f} GFLOP", "the plan", f"{planned / 1e9:.2f} GFLOP"
        off = abs(counted / planned - 1)
        rows.append(report.Row(f"256x256, stride {stride}, products", *text, off, "<=", 0.02, f"{100 * off:.2f} %"))
    done, _ = compiled(all_pairs, q, k, v)
    programs["dense"] = functools.partial(done, q, k, v)
    times = take_turns(programs, max(3, rounds // 3))
    against = "attention of all to all" + ("" if hasattr(portable.ops, "attention") else " (blocks of queries, jnp)")
    for stride, plan in plans.items():
        row = speedup(f"256x256, stride {stride}", times[f"stride {stride}"], times["dense"], against, None)
        rows.append(row)
        share = row.value / plan.speedup
        bound = f"bound of the plan, {plan.speedup:.2f}"
        others = {name: x / plan.speedup for name, x in row.others.items()}
        bar = 0.8 if stride == 16 else None
        rows.append(report.Row("  of the bound", f"{row.value:.2f}", bound, "", share, ">=", bar, others=others))
    return rows


def volume(rounds: int) -> list[report.Row]:
    """Windows of 11 x 11 x 11, 4 heads of 64, forward and backward."""
    del rounds
    rows = []
    for space in ((16, 32, 32), (8, 32, 32)):
        args = _arrays(1, *space, 4, 64, count=4)
        call = functools.partial(na, window=11, pad_small=space[0] < 11)
        done, info = compiled(with_gradients(call), *args)
        taken = statistics.median(measure.timed(lambda: jax.block_until_ready(done(*args)))["wall"] for _ in range(3))  # noqa: B023
        name = "x".join(map(str, space))
        rows.append(_limit(f"{name}, windows of 11, compile", info["compile_s"], 60, "s"))
        rows.append(_limit(f"{name}, windows of 11, memory", info["temp_bytes"] / 2**20, 2048, "MiB"))
        rows.append(_limit(f"{name}, windows of 11, forward and backward", taken, None, "s"))
    return rows


def _limit(what: str, value: float, bar: float | None, unit: str) -> report.Row:
    return report.Row(what, f"{value:.1f} {unit}", "", "", value, "<=", bar, f"{value:.1f}")


def tpu(rounds: int) -> list[report.Row]:
    """256 x 256, windows of 80 x 80, bfloat16: the time that a v6e's compiler expects, beside dense attention."""
    del rounds
    if reason := parity.missing("tpu"):
        raise SystemExit(reason)
    shape = jax.ShapeDtypeStruct((1, 256, 256, 1, 64), jnp.bfloat16)

    def whole(q, k, v):
        flat = [x.reshape(1, 256 * 256, 1, 64) for x in (q, k, v)]
        return jax.nn.dot_product_attention(*flat).reshape(q.shape)

    def estimated(fn: Callable) -> float:
        found = parity.estimate(fn, shape, shape, shape, target="tpu-v6e")
        assert found.estimated_seconds is not None, found.uncounted or found.message
        return found.estimated_seconds

    peers = {"jax.nn.dot_product_attention": estimated(whole), "attention of all to all": estimated(all_pairs)}
    rows = []
    for stride in (1, 16):
        ours = estimated(lambda q, k, v, stride=stride: na(q, k, v, window=80, stride=stride))
        for name, theirs in peers.items():
            text = f"{1e3 * ours:.2f} ms", name, f"{1e3 * theirs:.1f} ms"
            rows.append(report.Row(f"v6e estimate, 256x256, stride {stride}", *text, ours / theirs, "<=", 0.25))
    return rows


PHASES = {"plane": plane, "strided": strided, "volume": volume, "tpu": tpu}


def main() -> int:
    """Runs the phases, writes their results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)}; all but tpu unless given")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each program (default 15)")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="results file")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--markdown", action="store_true", help="with --show: in Markdown")
    args = parser.parse_args()
    if unknown := set(args.phases) - set(PHASES):
        parser.error(f"there is no phase {sorted(unknown)[0]!r}; there are: {', '.join(PHASES)}")
    found = json.loads(args.json.read_text()) if args.json.exists() else {"phases": {}}
    for phase in [] if args.show else args.phases or list(PHASES)[:3]:
        rows = [row.record() for row in PHASES[phase](args.rounds)]
        found["phases"][phase] = {"machine": measure.machine(), "rounds": args.rounds, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    rows = [
        report.Row(**{key: value for key, value in row.items() if key != "passed"})
        for phase in PHASES
        for row in found["phases"].get(phase, {"rows": []})["rows"]
    ]
    if args.markdown:
        print(report.markdown(rows))
    else:
        report.show("Neighborhood attention", rows, OTHERS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

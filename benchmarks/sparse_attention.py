"""`block_sparse_attention` and its selectors on a processor, beside the library's own causal attention; k-means.

8 heads of queries and 2 of keys, width 64, float32. Each query meets 17 blocks of 64 keys where there are as many: at
16k tokens 87 % of the blocks on or below the diagonal are left out. Programs of a phase take turns in one process; a
ratio is one of medians of wall time, of value and gradients together unless it says otherwise.

    pip install -e '.[train]'                           # for scikit-learn
    python benchmarks/sparse_attention.py               # every phase, about twenty minutes on two cores
    python benchmarks/sparse_attention.py kmeans        # one phase; its results replace those it had
    python benchmarks/sparse_attention.py --show        # the table of the committed results
"""

import argparse
import functools
import json
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import measure, report

from portable import ops
from portable.parity import hlo

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sparse_attention.json"
OTHERS = ("minima", "processor time")
HEADS, GROUPS, WIDTH, BLOCK, COUNT = 8, 2, 64, 64, 17
LENGTH, LENGTHS = 16384, (1024, 2048, 4096, 8192, 16384)
SPEED_BAR, KMEANS_BAR, MEMORY_BAR = 3.0, 3.0, 1 / 20
POINTS, CLUSTERS = 100_000, 1024


def arrays(t: int) -> list[jax.Array]:
    """Returns q, k, v and a cotangent of the result."""
    heads = HEADS, GROUPS, GROUPS, HEADS
    return [jax.random.normal(jax.random.key(i), (1, t, n, WIDTH)) for i, n in enumerate(heads)]


def random_lists(t: int, lists: int, block_q: int) -> jax.Array:
    """Returns lists of the own block and others before it, as many as there are up to COUNT."""
    rng = np.random.default_rng(0)
    table = np.full((1, lists, -(-t // block_q), COUNT), -1, np.int32)
    for _, row, i in np.ndindex(table.shape[:3]):
        own = i * block_q // BLOCK
        chosen = [own, *rng.permutation(own)[: COUNT - 1]]
        table[0, row, i, : len(chosen)] = chosen
    return jnp.asarray(table)


def dense(q, k, v):
    """The library's causal attention, which computes nothing above the diagonal."""
    return ops.attention(q, k, v, is_causal=True)


def sparse(q, k, v, chosen, block_q: int, block_k: int = BLOCK):
    """Attention to what is selected."""
    return ops.block_sparse_attention(q, k, v, chosen, block_q=block_q, block_k=block_k, is_causal=True)


def with_gradients(fn: Callable) -> Callable:
    """Returns (q, k, v, dout, rest...) -> (value, gradients of q, k and v)."""

    def both(q, k, v, dout, *rest):
        out, pull = jax.vjp(lambda *x: fn(*x, *rest), q, k, v)
        return out, pull(dout)

    return both


def moba(q, k, v, block_q: int = 1):
    """MoBA, selection included."""
    return sparse(q, k, v, ops.select_moba(q, k, block_k=BLOCK, top_k=COUNT, block_q=block_q), block_q)


def nsa(q, k, v):
    """NSA's selected branch, selection included."""
    return sparse(q, k, v, ops.select_nsa(q, ops.block_means(k, BLOCK), top_k=COUNT), 1)


def infllm(q, k, v):
    """InfLLM-V2, selection included; 8 of its blocks are those of the last 512 tokens."""
    return sparse(q, k, v, ops.select_infllm(q, k, top_k=COUNT, window=512), 1)


def dsa(q, k, v, select=ops.select_dsa):
    """DSA with an indexer of 4 heads of width 32 over 256 tokens, taken out of q and k, selection included."""
    chosen = select(q[:, :, :4, :32], k[:, :, 0, :32], q[:, :, :4, 32], top_k=256)
    return sparse(q, k, v, chosen, 1, 1)


def hisa(q, k, v):
    """The same, where 16 blocks of 128 tokens are looked at."""
    return dsa(q, k, v, functools.partial(ops.select_hisa, blocks=16))


METHODS = {
    "blocks of 64 queries": functools.partial(moba, block_q=BLOCK),
    "MoBA": moba,
    "NSA, selected branch": nsa,
    "InfLLM-V2": infllm,
    "DSA": dsa,
    "HISA": hisa,
}


def compiled(fn: Callable, *args: Any) -> tuple[Callable, dict[str, int]]:
    """Returns a run of a compiled program, and its memory by kind."""
    done = jax.jit(fn).lower(*args).compile()
    return functools.partial(done, *args), hlo.memory(done)


def take_turns(programs: dict[str, Callable], rounds: int) -> dict[str, dict[str, Any]]:
    """Runs each once to warm up, then in turns; returns seconds, wall and processor, of each."""
    names, found = list(programs), {name: {"wall": [], "cpu": []} for name in programs}
    for name in names:
        jax.block_until_ready(programs[name]())
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken = measure.timed(lambda name=name: jax.block_until_ready(programs[name]()))
            for which, seconds in taken.items():
                found[name][which].append(seconds)
        print(f"  round {i + 1} of {rounds}", file=sys.stderr)
    return {name: {which: measure.summary(x) for which, x in both.items()} for name, both in found.items()}


def over(what: str, ours: dict, against: str, theirs: dict, bar: float | None) -> report.Row:
    """Returns the row of how many times faster we are."""
    ratio = lambda which, of: theirs[which][of] / ours[which][of]  # noqa: E731
    others = {"minima": ratio("wall", "min"), "processor time": ratio("cpu", "median")}
    texts = f"{1e3 * ours['wall']['median']:.1f} ms", against, f"{1e3 * theirs['wall']['median']:.1f} ms"
    return report.Row(what, *texts, ratio("wall", "median"), ">=", bar, others=others)


def judged(rounds: int) -> Iterator[list[report.Row]]:
    """16k tokens, selection given and included; memory."""
    given = arrays(LENGTH)
    programs, memory = {}, {}
    lists = {("8 lists", 64): HEADS, ("2 lists", 64): GROUPS, ("8 lists", 1): HEADS, ("2 lists", 1): GROUPS}
    cases: dict[str, tuple] = {"causal attention": (dense,)}
    for (name, block_q), count in lists.items():
        who = "64 queries" if block_q > 1 else "a query"
        chosen = random_lists(LENGTH, count, block_q)
        cases[f"blocks given, {who}, {name}"] = (lambda q, k, v, c, n=block_q: sparse(q, k, v, c, n), chosen)
    cases["selected by MoBA, 64 queries"] = (METHODS["blocks of 64 queries"],)
    cases["selected by MoBA, a query"] = (moba,)
    for name, (fn, *rest) in cases.items():
        programs[name], memory[name] = compiled(with_gradients(fn), *given, *rest)
        print(name, {k: f"{v / 2**20:.0f} MiB" for k, v in memory[name].items()}, file=sys.stderr)
    times = take_turns(programs, rounds)
    peer = "causal attention"
    rows = []
    for name in cases:
        if name != peer:
            rows.append(over(name, times[name], peer, times[peer], SPEED_BAR if "64 queries" in name else None))
            sides = f"{memory[name]['temp'] / 2**20:.0f} MiB", peer, f"{memory[peer]['temp'] / 2**20:.0f} MiB"
            rows.append(report.Row("  temporaries", *sides, memory[name]["temp"] / memory[peer]["temp"], "<=", None))
    yield rows


def crossover(rounds: int) -> Iterator[list[report.Row]]:
    """The forward of each method with its selection, by length; the first length at which it is the faster one."""
    rows: dict[str, list] = {name: [] for name in METHODS}
    for t in LENGTHS:
        given = arrays(t)[:3]
        programs = {name: compiled(fn, *given)[0] for name, fn in {"attention": dense, **METHODS}.items()}
        times = take_turns(programs, rounds)
        for name in METHODS:
            rows[name].append(over(f"  {t} tokens", times[name], "attention", times["attention"], None))
    for name, found in rows.items():
        first = next((t for t, row in zip(LENGTHS, found, strict=True) if row.value >= 1), None)
        text = f"from {first}" if first else "never"
        yield [report.Row(f"{name}, forward: faster", text, "attention", "", first or 0, ">=", None, text), *found]


def kmeans(rounds: int) -> Iterator[list[report.Row]]:
    """10 iterations from the same centroids: streamed, materialised, and scikit-learn's."""
    from sklearn import cluster

    x = jax.random.normal(jax.random.key(0), (POINTS, WIDTH))
    start = x[:CLUSTERS]

    def materialised(x, centroids):
        for _ in range(10):
            apart = ((x**2).sum(1)[:, None] - 2 * x @ centroids.T) + (centroids**2).sum(1)
            of = apart.argmin(1)
            sums = jax.ops.segment_sum(x, of, CLUSTERS)
            counts = jnp.bincount(of, length=CLUSTERS)[:, None]
            centroids = jnp.where(counts > 0, sums / jnp.maximum(counts, 1), centroids)
        return centroids

    host, first = np.asarray(x), np.asarray(start)

    def theirs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = {"max_iter": 10, "tol": 0, "n_init": 1, "algorithm": "lloyd"}
            return cluster.KMeans(CLUSTERS, init=first, **options).fit(host).cluster_centers_

    ours, memory = compiled(lambda x, c: ops.kmeans(x, CLUSTERS, iterations=10, centroids=c).centroids, x, start)
    other, peak = compiled(materialised, x, start)
    got, want = np.asarray(ours()), theirs()
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    times = take_turns({"ours": ours, "materialised": other, "scikit-learn": theirs}, rounds)
    rows = [over("k-means", times["ours"], "materialised", times["materialised"], KMEANS_BAR)]
    rows.append(over("  ", times["ours"], "scikit-learn", times["scikit-learn"], 1.0))
    sides = f"{memory['temp'] / 2**20:.1f} MiB", "materialised", f"{peak['temp'] / 2**20:.0f} MiB"
    rows.append(report.Row("  temporaries", *sides, memory["temp"] / peak["temp"], "<=", MEMORY_BAR))
    yield rows


PHASES = {"judged": judged, "crossover": crossover, "kmeans": kmeans}


def main() -> int:
    """Runs the phases, writes their results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)}; all unless given")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each program (default 5)")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="results file")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--markdown", action="store_true", help="with --show: in Markdown")
    args = parser.parse_args()
    if unknown := set(args.phases) - set(PHASES):
        parser.error(f"there is no phase {sorted(unknown)[0]!r}; there are: {', '.join(PHASES)}")
    found = json.loads(args.json.read_text()) if args.json.exists() else {"phases": {}}
    for phase in [] if args.show else args.phases or list(PHASES):
        found["phases"][phase] = {"machine": measure.machine(), "rounds": args.rounds, "rows": []}
        for rows in PHASES[phase](args.rounds):
            found["phases"][phase]["rows"] += [row.record() for row in rows]
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    rows = [
        report.Row(**{key: value for key, value in row.items() if key != "passed"})
        for phase in PHASES
        for row in found["phases"].get(phase, {"rows": []})["rows"]
    ]
    if args.markdown:
        print(report.markdown(rows))
    else:
        report.show("Sparse attention", rows, OTHERS)
    return int(any(row.passed is False for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

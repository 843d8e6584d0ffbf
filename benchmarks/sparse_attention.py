"""`block_sparse_attention` and its selectors on a processor, beside the library's own causal attention; k-means.

8 heads of queries and 2 of keys, width 64, float32. Each query meets 17 blocks of 64 keys where there are as many: at
16k tokens 87 % of the blocks on or below the diagonal are left out. Times are of value and gradients together unless a
row says otherwise. See `harness.phases` for how it measures.

    pip install -e '.[train]'                           # for scikit-learn
    python benchmarks/sparse_attention.py               # every phase, about half an hour on two cores
    python benchmarks/sparse_attention.py kmeans        # one phase; its results replace those it had
    python benchmarks/sparse_attention.py --show        # the table of the committed results
"""

import functools
import pathlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import phases, report
from harness.phases import compiled, ratio, run, take_turns

from portable import nn, ops
from portable.parity import hlo

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "sparse_attention.json"
HEADS, GROUPS, WIDTH, BLOCK, COUNT = 8, 2, 64, 64, 17
LENGTH, LENGTHS = 16384, (1024, 2048, 4096, 8192, 16384)
SPEED_BAR, KMEANS_BAR, MEMORY_BAR, DECODE_BAR = 3.0, 3.0, 1 / 20, 1 / 4
CACHED = 65536
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
        programs[name], done, seconds = compiled(with_gradients(fn), *given, *rest)
        memory[name] = hlo.memory(done)
        print(f"{name}: compiled in {seconds:.0f} s", file=sys.stderr)
    times = take_turns(programs, rounds)
    peer = "causal attention"
    rows = []
    for name in cases:
        if name != peer:
            bar = SPEED_BAR if "64 queries" in name else None
            rows.append(ratio(name, times[name], peer, times[peer], ">=", bar))
            sides = f"{memory[name]['temp'] / 2**20:.0f} MiB", peer, f"{memory[peer]['temp'] / 2**20:.0f} MiB"
            rows.append(report.Row("  temporaries", *sides, memory[name]["temp"] / memory[peer]["temp"], "<=", None))
    yield rows


def crossover(rounds: int) -> Iterator[list[report.Row]]:
    """The forward of each method with its selection, by length; the first length at which it is the faster one."""
    rows: dict[str, list] = {name: [] for name in METHODS}
    for t in LENGTHS:
        given = arrays(t)[:3]
        programs = {name: run(fn, *given) for name, fn in {"attention": dense, **METHODS}.items()}
        times = take_turns(programs, rounds)
        for name in METHODS:
            rows[name].append(ratio(f"  {t} tokens", times[name], "attention", times["attention"], ">="))
    for name, found in rows.items():
        first = next((t for t, row in zip(LENGTHS, found, strict=True) if row.value >= 1), None)
        text = f"from {first}" if first else f"beyond {LENGTHS[-1]}"
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
            options: Any = {"init": first, "max_iter": 10, "tol": 0, "n_init": 1, "algorithm": "lloyd"}
            return cluster.KMeans(CLUSTERS, **options).fit(host).cluster_centers_

    ours, done, _ = compiled(lambda x, c: ops.kmeans(x, CLUSTERS, iterations=10, centroids=c).centroids, x, start)
    other, held, _ = compiled(materialised, x, start)
    memory, peak = hlo.memory(done), hlo.memory(held)
    # A point between two centroids may go to either, and takes others with it: what all minimise is compared.
    reached = [float(ops.kmeans_assign(x, jnp.asarray(c))[1].sum()) for c in (ours(), other(), theirs())]
    assert max(reached) < 1.001 * min(reached), reached
    times = take_turns({"ours": ours, "materialised": other, "scikit-learn": theirs}, rounds)
    rows = [ratio("k-means", times["ours"], "materialised", times["materialised"], ">=", KMEANS_BAR)]
    rows.append(ratio("  ", times["ours"], "scikit-learn", times["scikit-learn"], ">=", 1.0))
    sides = f"{memory['temp'] / 2**20:.1f} MiB", "materialised", f"{peak['temp'] / 2**20:.0f} MiB"
    rows.append(report.Row("  temporaries", *sides, memory["temp"] / peak["temp"], "<=", MEMORY_BAR))
    yield rows


def decode(rounds: int) -> Iterator[list[report.Row]]:
    """A token through a whole layer behind a cache of 64k tokens; the state is handed on."""
    d = HEADS * WIDTH
    heads = {"num_heads": HEADS, "num_kv_heads": GROUPS, "head_dim": WIDTH, "rngs": nnx.Rngs(0)}
    layers = {
        "dense": nn.Attention(d, **heads),
        "MoBA": nn.MoBA(d, block_size=512, top_k=8, **heads),
        "InfLLM-V2": nn.InfLLMv2Attention(d, **heads),
    }
    u, programs = jax.random.normal(jax.random.key(0), (1, d)), {}
    for name, layer in layers.items():
        graphdef, weights = nnx.split(layer)
        noise = lambda x: jax.random.normal(jax.random.key(1), x.shape, x.dtype)  # noqa: E731
        state = jax.tree.map(noise, layer.init_state(1, CACHED)._asdict() | {"positions": None, "length": None})
        held = {"positions": jnp.arange(CACHED)[None], "length": jnp.array([CACHED - 2 * rounds - 9], jnp.int32)}
        start = type(layer.init_state(1, 1))(**state | held)
        step = jax.jit(lambda w, u, s, graphdef=graphdef: nnx.merge(graphdef, w).step(u, s), donate_argnums=2)

        def token(box=[start], step=step, weights=weights):  # noqa: B006
            y, box[0] = step(weights, u, box[0])
            return y

        programs[name] = token
    times = take_turns(programs, rounds)
    yield [ratio(f"{n}, a token", times[n], "dense", times["dense"], "<=", DECODE_BAR) for n in list(layers)[1:]]


PHASES = {"judged": judged, "crossover": crossover, "kmeans": kmeans, "decode": decode}


if __name__ == "__main__":
    raise SystemExit(phases.main("Sparse attention", __doc__, PHASES, RESULTS, rounds=5))

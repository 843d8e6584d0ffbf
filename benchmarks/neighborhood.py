"""Neighborhood attention beside its peers: dense masked attention, unfolded windows, NATTEN, and its own plan.

See `harness.phases` for how it measures.

    pip install -e . && pip install torch && pip install --no-deps natten==0.21.7
    python benchmarks/neighborhood.py                          # plane, strided and volume, some minutes on two cores
    python benchmarks/neighborhood.py plane --rounds 15        # one phase; its results replace those it had
    pip install -e '.[aot]' && python benchmarks/neighborhood.py tpu   # what a TPU's compiler expects
    python benchmarks/neighborhood.py --show                   # the table of the committed results
"""

import functools
import os
import pathlib
import statistics
import warnings
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from harness import measure, phases, report
from harness.phases import compiled, limit, ratio, run, take_turns, with_gradients
from harness.products import product_flops

import portable
from portable import ops, parity
from portable.parity import hlo

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "neighborhood.json"
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
    """The library's attention of all to all."""
    flat = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, v)]
    return ops.attention(*flat).reshape(q.shape)


def _arrays(*shape: int, count: int = 3) -> list[jax.Array]:
    return [jax.random.normal(jax.random.key(i), shape, jnp.float32) for i in range(count)]


def plane(rounds: int) -> Iterator[list[report.Row]]:
    """56 x 56, 4 heads of 32, windows of 7 x 7: the first level of a NAT."""
    q, k, v, dout = _arrays(1, 56, 56, 4, 32, count=4)
    forms = {"ours": na, "dense masked": dense, "unfolded": unfolded}
    calls = {name: functools.partial(fn, window=7) for name, fn in forms.items()}
    want, memory = calls["dense masked"](q, k, v), {}
    for what, args in (("forward", (q, k, v)), ("forward and backward", (q, k, v, dout))):
        made = {n: compiled(with_gradients(f) if len(args) == 4 else f, *args) for n, f in calls.items()}
        programs = {name: call for name, (call, *_) in made.items()}
        if len(args) == 3:
            programs["NATTEN flex"] = natten_flex(q, k, v, window=7)
            for name in ("ours", "unfolded", "NATTEN flex"):
                error = np.abs(np.asarray(programs[name]()) - want).max()
                assert error < 1e-5, (name, error)
        times = take_turns(programs, rounds)
        bars = {"dense masked": 20, "unfolded": 10 if len(args) == 3 else 3, "NATTEN flex": 5}
        yield [ratio(f"56x56, {what}", times["ours"], n, times[n], ">=", bars[n]) for n in programs if n != "ours"]
        memory[what] = {name: hlo.memory(done)["temp"] for name, (_, done, _) in made.items()}
    for what, found in memory.items():
        ours, theirs = found["ours"], found["dense masked"]
        text = f"{ours / 2**20:.1f} MiB", "dense masked", f"{theirs / 2**20:.0f} MiB"
        yield [report.Row(f"56x56, {what}, memory", *text, ours / theirs, "<=", 1 / 8, f"1/{theirs / ours:.0f}")]


def strided(rounds: int) -> Iterator[list[report.Row]]:
    """256 x 256, windows of 80 x 80, 1 head of 64: the plan's FLOPs and its bound."""
    q, k, v = _arrays(1, 256, 256, 1, 64)
    rows, plans = [], {}
    programs: dict[str, Callable] = {}
    for stride in (16, 1):
        plans[stride] = portable.ops.neighborhood_plan((256, 256), 80, stride, heads=1, dim=64)
        programs[f"stride {stride}"], done, _ = compiled(functools.partial(na, window=80, stride=stride), q, k, v)
        counted, planned = product_flops(hlo.text(done)), plans[stride].flops
        text = f"{counted / 1e9:.2f} GFLOP", "the plan", f"{planned / 1e9:.2f} GFLOP"
        off = abs(counted / planned - 1)
        rows.append(report.Row(f"256x256, stride {stride}, products", *text, off, "<=", 0.02, f"{100 * off:.2f} %"))
    programs["dense"] = run(all_pairs, q, k, v)
    times = take_turns(programs, max(3, rounds // 3))
    against = "attention of all to all"
    for stride, plan in plans.items():
        row = ratio(f"256x256, stride {stride}", times[f"stride {stride}"], against, times["dense"], ">=")
        rows.append(row)
        bound = f"bound of the plan, {plan.speedup:.2f}"
        others = {name: x / plan.speedup for name, x in row.others.items()}
        bar, share = 0.8 if stride == 16 else None, row.value / plan.speedup
        rows.append(report.Row("  of the bound", f"{row.value:.2f}", bound, "", share, ">=", bar, others=others))
    yield rows


def volume(rounds: int) -> Iterator[list[report.Row]]:
    """Windows of 11 x 11 x 11, 4 heads of 64, forward and backward."""
    del rounds
    for space in ((16, 32, 32), (8, 32, 32)):
        args = _arrays(1, *space, 4, 64, count=4)
        windows = functools.partial(na, window=11, pad_small=space[0] < 11)
        call, done, seconds = compiled(with_gradients(windows), *args)
        taken = statistics.median(measure.timed(lambda: jax.block_until_ready(call()))["wall"] for _ in range(3))  # noqa: B023
        name = f"{'x'.join(map(str, space))}, windows of 11"
        yield [
            limit(f"{name}, compile", seconds, "s", 60),
            limit(f"{name}, memory", hlo.memory(done)["temp"] / 2**20, "MiB", 2048),
            limit(f"{name}, forward and backward", taken, "s"),
        ]


def tpu(rounds: int) -> Iterator[list[report.Row]]:
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
    for stride in (1, 16):
        ours = estimated(lambda q, k, v, stride=stride: na(q, k, v, window=80, stride=stride))
        for name, theirs in peers.items():
            text = f"{1e3 * ours:.2f} ms", name, f"{1e3 * theirs:.1f} ms"
            yield [report.Row(f"v6e estimate, 256x256, stride {stride}", *text, ours / theirs, "<=", 0.25)]


PHASES = {"plane": plane, "strided": strided, "volume": volume, "tpu": tpu}


if __name__ == "__main__":
    raise SystemExit(phases.main("Neighborhood attention", __doc__, PHASES, RESULTS, rounds=15, by_name=["tpu"]))

"""`moe_ffn` beside its peers on a processor: a dense network on as many rows, ragged_dot, and transformers' experts.

See `harness.phases` for how it measures.

    pip install -e '.[oracles]'
    python benchmarks/moe.py                        # every phase, about half an hour on two cores
    python benchmarks/moe.py sizes --rounds 5       # one phase; its results replace those it had
    python benchmarks/moe.py --show                 # the table of the committed results
"""

import functools
import gc
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import phases, report
from harness.phases import compiled, holding, ratio, run, take_turns, with_gradients
from harness.products import product_flops

from portable import ops, parity
from portable.ops._grouped_matmul import tiles, xla_large_tiles
from portable.parity import hlo

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "moe.json"
D, F = 1024, 2816
# (tokens, choices of each, experts), and the bar on time over one dense network on tokens * choices rows.
SIZES = {(512, 2, 8): 1.6, (512, 6, 64): 1.7, (4096, 2, 8): 0.9, (4096, 6, 64): 0.9}
BACKWARD_BAR, RAGGED_BAR, SKEW_BAR, DECODE_BAR = 3.2, 4.0, 1.3, 2.0


def routing(tokens: int, k: int, experts: int, skew: float = 0.0) -> ops.Routing:
    """Returns random choices; `skew` is the exponent of a Zipf law over experts."""
    logits = jax.random.gumbel(jax.random.key(7), (tokens, experts)) - skew * jnp.log1p(jnp.arange(experts))
    weights, indices = jax.lax.top_k(jax.nn.softmax(logits), k)
    return ops.Routing(indices, weights, experts)


def weights(experts: int, d: int = D, f: int = F) -> list[jax.Array]:
    """Returns w_gate, w_up [e, d, f] and w_down [e, f, d]."""
    shapes = (experts, d, f), (experts, d, f), (experts, f, d)
    return [0.02 * jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def apart(stacked: list[jax.Array]) -> list[tuple]:
    """Returns each expert's arrays by themselves."""
    return [tuple(jnp.array(matrix) for matrix in w) for w in stacked]


def dense(x, w_gate, w_up, w_down):
    """One gated network."""
    return (jax.nn.silu(x @ w_gate) * (x @ w_up)) @ w_down


def torch_experts(stacked: list[jax.Array], chosen: ops.Routing, x: jax.Array, gradients: bool) -> dict[str, Callable]:
    """Returns runs of transformers' Mixtral experts by its implementations, on the same weights."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=chosen.num_experts)
    with torch.device("meta"):
        experts = MixtralExperts(config)
    gate, up, down = (torch.from_numpy(np.swapaxes(np.asarray(w), 1, 2).copy()) for w in stacked)
    given = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
    experts.load_state_dict(given, assign=True)
    experts.requires_grad_(gradients)
    rows = torch.from_numpy(np.array(x)).requires_grad_(gradients)
    indices, weight = torch.from_numpy(np.array(chosen.indices)).long(), torch.from_numpy(np.array(chosen.weights))

    def run(kind: str) -> Any:
        config._experts_implementation = kind
        if not gradients:
            with torch.no_grad():
                return experts(rows, indices, weight)
        experts.zero_grad()
        rows.grad = None
        out = experts(rows, indices, weight)
        out.backward(torch.ones_like(out))
        return out.detach()

    return {f"transformers, {kind}": functools.partial(run, kind) for kind in ("eager", "grouped_mm")}


def sizes(rounds: int) -> Iterator[list[report.Row]]:
    """Forward, with the experts' arrays apart and stacked, and forward and backward."""
    for (tokens, k, experts), bar in SIZES.items():
        name = f"{tokens} tokens, {k} of {experts}"
        print(name, file=sys.stderr)
        rows = []
        stacked, chosen = weights(experts), routing(tokens, k, experts)
        x = jax.random.normal(jax.random.key(3), (tokens, D))
        repeated = jnp.repeat(x, k, 0)
        apart_arrays = apart(stacked)
        stacked_run, program, _ = compiled(ops.moe_ffn, x, *stacked, chosen)
        memory = hlo.memory(program)
        programs = {"stacked": stacked_run, "apart": run(ops.moe_ffn, x, *apart_arrays, chosen)}
        programs["dense"] = run(dense, repeated, *[w[0] for w in stacked])
        if experts == 8:
            ragged = functools.partial(ops.moe_ffn, implementation="xla_ragged")
            programs["ragged_dot"] = run(ragged, x, *stacked, chosen)
        programs |= torch_experts(stacked, chosen, x, False)
        want = np.asarray(programs["stacked"]())
        for other in set(programs) - {"stacked", "dense"}:
            error = np.abs(np.asarray(programs[other]()) - want).max() / np.abs(want).max()
            assert error < 1e-5, (other, error)
        times = take_turns(programs, rounds)
        rows.append(ratio(f"{name}, forward", times["apart"], "a dense network", times["dense"], "<=", bar))
        rows.append(ratio("  stacked", times["stacked"], "a dense network", times["dense"], "<=", None))
        if experts == 8:
            rows.append(ratio("  stacked", times["stacked"], "ragged_dot", times["ragged_dot"], ">=", RAGGED_BAR))
        for other in [o for o in programs if o.startswith("transformers")]:
            rows.append(ratio("  stacked", times["stacked"], other, times[other], ">=", 1.0))
        limit = 1.2 * 2**30 if (tokens, experts) == (4096, 64) else None
        text = f"{memory['temp'] / 2**20:.0f} MiB"
        rows.append(report.Row("  stacked, memory", text, "", "", memory["temp"], "<=", limit, text))
        forward = times["stacked"]
        del programs, apart_arrays, stacked_run, program, want
        gc.collect()

        def value(x, gate, up, down, given, chosen=chosen):
            return ops.moe_ffn(x, gate, up, down, ops.Routing(chosen.indices, given, chosen.num_experts))

        args = [x, *stacked, chosen.weights, jnp.ones_like(x)]
        programs: dict[str, Callable] = {"both": holding(run(with_gradients(value), *args))}
        programs |= torch_experts(stacked, chosen, x, True)
        times = take_turns(programs, max(3, rounds // 2))
        rows.append(ratio("  forward and backward", times["both"], "its forward", forward, "<=", BACKWARD_BAR))
        for other in [o for o in programs if o.startswith("transformers")]:
            rows.append(ratio("  forward and backward", times["both"], other, times[other], ">=", 1.0))
        del programs, stacked, args
        gc.collect()
        yield rows


def skew(rounds: int) -> Iterator[list[report.Row]]:
    """64 experts, tokens spread by Zipf's law, against the same number spread evenly."""
    for tokens, k in ((512, 6), (4096, 6)):
        stacked, x = weights(64), jax.random.normal(jax.random.key(3), (tokens, D))
        programs = {
            n: run(ops.moe_ffn, x, *stacked, routing(tokens, k, 64, s)) for n, s in (("even", 0.0), ("Zipf", 1.0))
        }
        times = take_turns(programs, rounds)
        yield [ratio(f"{tokens} tokens, {k} of 64, by Zipf", times["Zipf"], "even", times["even"], "<=", SKEW_BAR)]


def decode(rounds: int) -> Iterator[list[report.Row]]:
    """One token through 4 layers of 64 experts of 2048 x 768, 8 chosen, against products with fixed experts."""
    d, f, experts, k, layers = 2048, 768, 64, 8, 4
    x = jax.random.normal(jax.random.key(3), (1, d))
    stacks = [weights(experts, d, f) for _ in range(layers)]
    lists = [apart(stack) for stack in stacks]
    chosen = routing(1, k, experts)

    def routed(x, layers, chosen):
        for gate, up, down in layers:
            x = x + ops.moe_ffn(x, gate, up, down, chosen)
        return x

    picked = [int(i) for i in np.asarray(chosen.indices)[0]]

    def fixed(x, layers, weights):
        for gate, up, down in layers:
            x = x + sum(weights[0, j] * dense(x, gate[e], up[e], down[e]) for j, e in enumerate(picked))
        return x

    made = {"stacked": compiled(routed, x, stacks, chosen), "apart": compiled(routed, x, lists, chosen)}
    made["fixed"] = compiled(fixed, x, lists, chosen.weights)
    times = take_turns({name: call for name, (call, *_) in made.items()}, 4 * rounds)
    rows, expert = [], 3 * d * f * 4
    for name, bar in (("apart", DECODE_BAR), ("stacked", DECODE_BAR)):
        rows.append(ratio(f"one token, {name}", times[name], "fixed experts", times["fixed"], "<=", bar))
        temp = hlo.memory(made[name][1])["temp"]
        texts = f"{temp / 2**20:.2f} MiB", "one expert", f"{expert / 2**20:.0f} MiB"
        rows.append(report.Row("  memory", *texts, temp / expert, "<=", 1.0))
    yield rows


def flops(rounds: int) -> Iterator[list[report.Row]]:
    """Products in the programs that compilers make for GPUs and TPUs, bfloat16, over those that routing asks for."""
    del rounds
    if reason := parity.missing("tpu") or parity.missing("cuda"):
        raise SystemExit(reason)
    for tokens, k, experts in SIZES:
        chosen = routing(tokens, k, experts)
        sizes_of = jnp.bincount(chosen.indices.ravel(), length=experts)
        sizes = xla_large_tiles.TILING.for_rows(tokens).sizes
        counts = {size: int(n.sum()) for size, (_, n) in zip(sizes, tiles.cut(sizes_of, sizes), strict=True)}
        of, row = jax.ShapeDtypeStruct, 2 * 3 * D * F
        up, down = of((experts, D, F), jnp.bfloat16), of((experts, F, D), jnp.bfloat16)
        args = of((tokens, D), jnp.bfloat16), up, up, down, of((tokens, k), jnp.float32), of((tokens, k), jnp.int32)

        def value(x, gate, up, down, weights, indices, experts=experts):
            return ops.moe_ffn(x, gate, up, down, ops.Routing(indices, weights, experts))

        busy = int((sizes_of > 0).sum())

        def runs(dims, counts=counts, busy=busy):
            # A loop over experts holds one for every size of their tiles; such a loop runs, on average, n / busy times.
            inside = [n for size, n in counts.items() if size in dims]
            return busy if len(inside) > 1 else inside[0] / busy

        for target in ("cuda-sm80", "cuda-sm90", "cuda-sm100", "tpu-v5e", "tpu-v6e", "tpu-7x"):
            done = parity.compile_for(target, value, *args)
            if target.startswith("cuda"):
                needed = row * sum(size * n for size, n in counts.items())
                found = product_flops(hlo.text(done), runs)
            else:
                needed, found = row * tokens * k, done.cost_analysis()["flops"]
            name = f"{tokens} tokens, {k} of {experts}, {target}"
            texts = f"{found / 1e9:.1f} GFLOP", "needed and padding", f"{needed / 1e9:.1f} GFLOP"
            yield [report.Row(name, *texts, found / needed, "<=", 1.1, f"{found / needed:.3f}")]


PHASES = {"sizes": sizes, "skew": skew, "decode": decode, "flops": flops}


if __name__ == "__main__":
    raise SystemExit(phases.main("Mixture of experts", __doc__, PHASES, RESULTS, rounds=7, by_name=["flops"]))

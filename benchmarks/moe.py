"""`moe_ffn` beside its peers on a processor: a dense network on as many rows, ragged_dot, and transformers' experts.

All programs of a size are compiled and warmed up in one process, then take turns, one sample each a round, in an order
that rotates. A ratio is one of medians of wall time.

    pip install -e '.[oracles]'
    python benchmarks/moe.py                        # every phase, about half an hour on two cores
    python benchmarks/moe.py sizes --rounds 5       # one phase; its results replace those it had
    python benchmarks/moe.py --show                 # the table of the committed results

Large arrays cost a processor more to get than to fill where the C library asks the system for them in small pages; on
Linux GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks for large ones. It is set for every program here, peers included.
"""

import argparse
import functools
import gc
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import measure, report

from portable import ops
from portable.parity import hlo

TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results" / "moe.json"
OTHERS = ("minima", "processor time")
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


def with_gradients(fn: Callable) -> Callable:
    """Returns (arguments..., dout) -> (value, gradients)."""

    def both(*args):
        out, pull = jax.vjp(fn, *args[:-1])
        return out, pull(args[-1])

    return both


def torch_experts(kind: str, stacked: list[jax.Array], chosen: ops.Routing, x: jax.Array, gradients: bool) -> Callable:
    """Returns a run of transformers' Mixtral experts, by its `kind` of implementation."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=chosen.num_experts)
    config._experts_implementation = kind
    with torch.device("meta"):
        experts = MixtralExperts(config)
    gate, up, down = (torch.from_numpy(np.swapaxes(np.asarray(w), 1, 2).copy()) for w in stacked)
    given = {"gate_up_proj": torch.cat([gate, up], 1), "down_proj": down}
    experts.load_state_dict(given, assign=True)
    experts.requires_grad_(gradients)
    rows = torch.from_numpy(np.array(x)).requires_grad_(gradients)
    indices, weight = torch.from_numpy(np.array(chosen.indices)).long(), torch.from_numpy(np.array(chosen.weights))

    def run() -> Any:
        if not gradients:
            with torch.no_grad():
                return experts(rows, indices, weight)
        experts.zero_grad()
        rows.grad = None
        out = experts(rows, indices, weight)
        out.backward(torch.ones_like(out))
        return out.detach()

    return run


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


def over(what: str, ours: dict, against: str, theirs: dict, relation: str, bar: float | None) -> report.Row:
    """Returns the row of a ratio of medians: our time over theirs ("<="), or theirs over ours (">=")."""

    def ratio(which: str, of: str) -> float:
        value = ours[which][of] / theirs[which][of]
        return value if relation == "<=" else 1 / value

    others = {"minima": ratio("wall", "min"), "processor time": ratio("cpu", "median")}
    texts = f"{1e3 * ours['wall']['median']:.1f} ms", against, f"{1e3 * theirs['wall']['median']:.1f} ms"
    return report.Row(what, *texts, ratio("wall", "median"), relation, bar, others=others)


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
        run, memory = compiled(ops.moe_ffn, x, *stacked, chosen)
        programs = {"stacked": run, "apart": compiled(ops.moe_ffn, x, *apart_arrays, chosen)[0]}
        programs["dense"] = compiled(dense, repeated, *[w[0] for w in stacked])[0]
        if experts == 8:
            ragged = functools.partial(ops.moe_ffn, implementation="xla_ragged")
            programs["ragged_dot"] = compiled(ragged, x, *stacked, chosen)[0]
        for kind in ("eager", "grouped_mm"):
            programs[f"transformers, {kind}"] = torch_experts(kind, stacked, chosen, x, False)
        want = np.asarray(programs["stacked"]())
        for other in set(programs) - {"stacked", "dense"}:
            error = np.abs(np.asarray(programs[other]()) - want).max() / np.abs(want).max()
            assert error < 1e-5, (other, error)
        times = take_turns(programs, rounds)
        rows.append(over(f"{name}, forward", times["apart"], "a dense network", times["dense"], "<=", bar))
        rows.append(over("  stacked", times["stacked"], "a dense network", times["dense"], "<=", None))
        if experts == 8:
            rows.append(over("  stacked", times["stacked"], "ragged_dot", times["ragged_dot"], ">=", RAGGED_BAR))
        for other in [o for o in programs if o.startswith("transformers")]:
            rows.append(over("  stacked", times["stacked"], other, times[other], ">=", 1.0))
        limit = 1.2 * 2**30 if (tokens, experts) == (4096, 64) else None
        text = f"{memory['temp'] / 2**20:.0f} MiB"
        rows.append(report.Row("  stacked, memory", text, "", "", memory["temp"], "<=", limit, text))
        forward = times["stacked"]
        del programs, apart_arrays, run, want
        gc.collect()

        def value(x, gate, up, down, given, chosen=chosen):
            return ops.moe_ffn(x, gate, up, down, ops.Routing(chosen.indices, given, chosen.num_experts))

        args = [x, *stacked, chosen.weights, jnp.ones_like(x)]
        programs: dict[str, Callable] = {"both": compiled(with_gradients(value), *args)[0]}
        for kind in ("eager", "grouped_mm"):
            programs[f"transformers, {kind}"] = torch_experts(kind, stacked, chosen, x, True)
        times = take_turns(programs, max(3, rounds // 2))
        rows.append(over("  forward and backward", times["both"], "its forward", forward, "<=", BACKWARD_BAR))
        for other in [o for o in programs if o.startswith("transformers")]:
            rows.append(over("  forward and backward", times["both"], other, times[other], ">=", 1.0))
        del programs, stacked, args
        gc.collect()
        yield rows


def skew(rounds: int) -> Iterator[list[report.Row]]:
    """64 experts, tokens spread by Zipf's law, against the same number spread evenly."""
    for tokens, k in ((512, 6), (4096, 6)):
        stacked, x = weights(64), jax.random.normal(jax.random.key(3), (tokens, D))
        programs = {
            n: compiled(ops.moe_ffn, x, *stacked, routing(tokens, k, 64, s))[0]
            for n, s in (("even", 0.0), ("Zipf", 1.0))
        }
        times = take_turns(programs, rounds)
        yield [over(f"{tokens} tokens, {k} of 64, by Zipf", times["Zipf"], "even", times["even"], "<=", SKEW_BAR)]


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

    runs = {"stacked": compiled(routed, x, stacks, chosen), "apart": compiled(routed, x, lists, chosen)}
    runs["fixed"] = compiled(fixed, x, lists, chosen.weights)
    times = take_turns({name: run for name, (run, _) in runs.items()}, 4 * rounds)
    rows, expert = [], 3 * d * f * 4
    for name, bar in (("apart", DECODE_BAR), ("stacked", DECODE_BAR)):
        rows.append(over(f"one token, {name}", times[name], "fixed experts", times["fixed"], "<=", bar))
        temp = runs[name][1]["temp"]
        texts = f"{temp / 2**20:.2f} MiB", "one expert", f"{expert / 2**20:.0f} MiB"
        rows.append(report.Row("  memory", *texts, temp / expert, "<=", 1.0))
    yield rows


PHASES = {"sizes": sizes, "skew": skew, "decode": decode}


def main() -> int:
    """Runs the phases, writes their results and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=f"{', '.join(PHASES)}; all unless given")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each program (default 7)")
    parser.add_argument("--json", type=pathlib.Path, default=RESULTS, help="results file")
    parser.add_argument("--show", action="store_true", help="print the table of an existing results file")
    parser.add_argument("--markdown", action="store_true", help="with --show: in Markdown")
    args = parser.parse_args()
    if not args.show and os.environ.get("GLIBC_TUNABLES") != TUNED["GLIBC_TUNABLES"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED})
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
        report.show("Mixture of experts", rows, OTHERS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

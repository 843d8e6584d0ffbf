"""`portable bench sparse`: what methods of sparse attention keep of a model's answers, and what they cost."""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable import ops
from portable.commands._benchmark import timing
from portable.nn import Attention
from portable.parity.roofline import roofline
from portable.parity.targets import TARGETS
from portable.training import recall

BLOCK = 16
COLUMNS = {
    "method": "method",
    "budget": "keys a query",
    "needles": "needles found",
    "recall": "records recalled",
    "gflop": "GFLOP",
    "ms": "ms",
    "temporary_mib": "temporary MiB",
}


def window(q, k, v, budget: int):
    """The last keys alone."""
    return ops.attention(q, k, v, is_causal=True, window=budget)


def _blocks(q, k, v, chosen, block_k: int = BLOCK):
    return ops.block_sparse_attention(q, k, v, chosen, block_q=1, block_k=block_k, is_causal=True)


def moba(q, k, v, budget: int):
    """MoBA."""
    return _blocks(q, k, v, ops.select_moba(q, k, block_k=BLOCK, top_k=max(1, budget // BLOCK)))


def nsa(q, k, v, budget: int):
    """NSA's selected branch: the model has no gates for the others."""
    sizes: dict[str, Any] = {"kernel": BLOCK, "stride": BLOCK, "block_k": BLOCK, "s": k.shape[1]}
    return _blocks(q, k, v, ops.select_nsa(q, ops.block_means(k, BLOCK), top_k=max(3, budget // BLOCK), **sizes))


def infllm(q, k, v, budget: int):
    """InfLLM-V2, sparse from the first position on."""
    sizes: dict[str, Any] = {"kernel": 8, "stride": 4, "block_k": BLOCK, "window": BLOCK}
    return _blocks(q, k, v, ops.select_infllm(q, k, top_k=max(2, budget // BLOCK), **sizes))


def _indexer(q, k):
    """Returns the queries, keys and weights of an indexer that nobody trained: the layer's own heads."""
    (b, t, h, d), g = q.shape, k.shape[2]
    group = jax.nn.one_hot(jnp.arange(h) * g // h, g, dtype=q.dtype)
    return jnp.einsum("bthd,hg->bthgd", q, group).reshape(b, t, h, g * d), k.reshape(b, t, g * d), jnp.ones((b, t, h))


def dsa(q, k, v, budget: int):
    """DSA, whose indexer is the layer's own heads."""
    return _blocks(q, k, v, ops.select_dsa(*_indexer(q, k), top_k=budget), 1)


def hisa(q, k, v, budget: int):
    """HISA with the same indexer, which looks at twice the keys that it chooses."""
    blocks = max(2, 2 * budget // BLOCK)
    return _blocks(q, k, v, ops.select_hisa(*_indexer(q, k), block_k=BLOCK, blocks=blocks, top_k=budget), 1)


def pbs(q, k, v, budget: int):
    """PBS-Attn, with as many blocks as the budget has rather than a threshold."""
    options: dict[str, Any] = {"block_q": BLOCK, "block_k": BLOCK}
    chosen = ops.select_pbs(q, k, segment=2 * BLOCK, threshold=1.0, budget=max(3, budget // BLOCK), **options)
    return ops.permuted_attention(q, k, v, *chosen, is_causal=True, **options)


def squeezed(q, k, v, budget: int):
    """Squeezed Attention to the first three quarters, which are read densely; what follows sees itself densely."""
    fixed = q.shape[1] * 3 // 4
    context = ops.squeeze(k[:, :fixed], max(1, fixed // BLOCK))
    before: Any = ops.attention(q[:, :fixed], k[:, :fixed], v[:, :fixed], is_causal=True)
    late, k_late, v_late = (x[:, fixed:] for x in (q, k, v))
    chosen = ops.select_squeezed(late, context, threshold=0, budget=budget)
    sparse: dict[str, Any] = {"block_q": 1, "block_k": 1, "is_causal": False, "return_lse": True}
    text: Any = ops.block_sparse_attention(late, k[:, :fixed], v[:, :fixed], chosen, **sparse)
    own: Any = ops.attention(late, k_late, v_late, is_causal=True, return_lse=True)
    out, _ = ops.merge_attentions(*zip(text, own, strict=True))
    return jnp.concatenate([before, out], 1)


METHODS: dict[str, Callable] = {
    "window": window,
    "MoBA": moba,
    "NSA": nsa,
    "InfLLM-V2": infllm,
    "DSA": dsa,
    "HISA": hisa,
    "PBS-Attn": pbs,
    "Squeezed": squeezed,
}


class Swapped(nnx.Module):
    """A layer of attention with another way to attend, on the same weights."""

    def __init__(self, layer: Any, attend: Callable):
        self.layer, self.attend = layer, attend

    def __call__(self, u, **options):
        """Returns y [b, t, d]; there is no padding here, and no state."""
        t = u.shape[1]
        q, k, v = self.layer._project(u, jnp.arange(t, dtype=jnp.int32), jnp.full(u.shape[:1], t))
        return self.layer.out(self.attend(q, k, v).reshape(*u.shape[:2], -1))


def swapped(model: Any, attend: Callable) -> Any:
    """Returns the model with `attend(q, k, v)` in all layers of attention."""
    other = nnx.merge(*nnx.split(model))
    for layer in other.layers:
        if isinstance(layer.mixer, Attention):
            layer.mixer = Swapped(layer.mixer, attend)
    return other


def budgets(length: int) -> list[int]:
    """Returns the keys that a query may see: a sixteenth to a half of a question."""
    return [length // n for n in (16, 8, 4, 2) if length // n >= 3 * BLOCK]


def records(
    model: Any, sizes: recall.Sizes, methods: Sequence[str], samples: int, note: Callable[[str], None]
) -> Iterator[dict]:
    """Asks the model the same questions with every method at every budget; yields a row each, of full attention first.

    FLOPs are of matrix products, counted in the traced program of a whole question (selection, all layers, logits), as
    often as loops run, in the default form of each op. Time is of this machine; memory is what the compiled program
    needs beside its arguments and results.
    """
    questions = recall.Questions(held_out=True)
    asked = {kind: questions.batch(kind, sizes.texts, sizes.length, 1) for kind in recall.TASKS}
    runs: list[tuple[str, int | None]] = [("full", None)]
    runs += [(name, budget) for name in methods for budget in budgets(sizes.length)]
    for i, (name, budget) in enumerate(runs):
        one = model if budget is None else swapped(model, functools.partial(METHODS[name], budget=budget))
        graphdef, weights = nnx.split(one)

        def answer(weights, tokens, graphdef=graphdef):
            return nnx.merge(graphdef, weights)(tokens)

        tokens = jnp.asarray(np.concatenate([batch["tokens"] for batch in asked.values()]))
        begin = time.perf_counter()
        program = jax.jit(answer).lower(weights, tokens[:1]).compile()
        record: dict[str, Any] = {"method": name, "budget": budget, "compile_s": time.perf_counter() - begin}
        logits = np.concatenate([program(weights, tokens[at : at + 1]) for at in range(len(tokens))])
        for part, (kind, batch) in zip(np.split(logits, len(asked)), asked.items(), strict=True):
            record[kind] = recall.correct(part, batch["targets"])
        seconds = timing.repeat(lambda p=program, w=weights, x=tokens: jax.block_until_ready(p(w, x[:1])), samples)
        memory = getattr(program.memory_analysis(), "temp_size_in_bytes", None)
        record |= {
            "gflop": sum(roofline(TARGETS["cpu"], answer, weights, tokens[:1]).flops.values()) / 1e9,
            "ms": 1e3 * statistics.median(seconds),
            "samples_s": seconds,
            "temporary_mib": None if memory is None else memory / 2**20,
        }
        seen = f"{name} {budget}" if budget else name
        note(
            f"{i + 1}/{len(runs)}  {seen}: {record['needles']:.0%} and {record['recall']:.0%} in {record['ms']:.1f} ms"
        )
        yield record


def draw(rows: Sequence[dict], path: Any, title: str) -> None:
    """Draws answers over FLOPs, time and memory into a PNG, a line for each method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(2, 3, sharey=True, sharex="col")
    names = list(dict.fromkeys(row["method"] for row in rows if row["budget"] is not None))
    colours = dict(zip(names, ("#999999", "#1f4e79", "#c4541b", "#2e8b57", "#8e44ad", "#d4a017", "#b03060", "#008b8b")))
    markers = dict(zip(names, "osD^vP*X", strict=False))
    [full] = [row for row in rows if row["budget"] is None]
    costs = {"gflop": "GFLOP a question (counted)", "ms": "ms a question", "temporary_mib": "temporary MiB"}
    for line, (kind, what) in zip(grid, (("needles", "needles found"), ("recall", "records recalled")), strict=True):
        for axes, (cost, label) in zip(line, costs.items(), strict=True):
            if full[cost] is None:
                axes.set_visible(False)
                continue
            axes.axhline(full[kind], color="black", linewidth=0.8, linestyle=":")
            axes.plot(full[cost], full[kind], "o", color="black", markersize=9, label="full attention", zorder=5)
            for name in names:
                points = sorted((row["budget"], row[cost], row[kind]) for row in rows if row["method"] == name)
                at, found = [x for _, x, _ in points], [y for _, _, y in points]
                style = {"color": colours[name], "marker": markers[name], "markersize": 6, "linewidth": 1.3}
                axes.plot(at, found, label=name, alpha=0.9, **style)
            axes.set_xscale("log")
            axes.set_ylim(-0.04, 1.04)
            axes.grid(alpha=0.25, linewidth=0.6, which="both")
            axes.spines[["top", "right"]].set_visible(False)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
            if kind == "recall":
                axes.set_xlabel(label)
            if cost == "gflop":
                axes.set_ylabel(what)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    figure.savefig(path, format="png")

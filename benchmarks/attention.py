"""`attention` beside `jax.nn.dot_product_attention` on a processor: time, memory over the length, and accuracy.

Value and gradients of one layer's attention in float32, compiled. Memory is what XLA's compiler gives a program for
temporaries, so lengths that would take long to run cost a compilation only. See `harness.phases` for how it measures.

    python benchmarks/attention.py                      # every phase, some minutes on two cores
    python benchmarks/attention.py memory               # one phase; its results replace those it had
    python benchmarks/attention.py --show               # the table of the committed results
"""

import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from harness import phases, report
from harness.phases import compiled, ratio, take_turns, with_gradients

from portable.ops import attention
from portable.parity import hlo
from portable.parity.numbers import relative

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "attention.json"
PEER = "jax.nn"
# (batch, length, heads, groups, width, causal), and the bar on time over the peer's.
SHAPES = {
    "4k tokens, 4 heads of 64": ((1, 4096, 4, 4, 64, False), 1.3),
    "4k tokens, 4 heads of 64, causal": ((1, 4096, 4, 4, 64, True), 1.3),
    "4k tokens, 8 heads of 128 in 2 groups, causal": ((1, 4096, 8, 2, 128, True), None),
    "1k tokens, 12 heads of 64, batch 4, causal": ((4, 1024, 12, 12, 64, True), None),
    "128 tokens, 12 heads of 64, batch 8, causal": ((8, 128, 12, 12, 64, True), None),
}
GRADIENT_BAR, POWER_BAR = 5e-6, 1.05
PEER_LENGTHS = (2048, 4096, 8192)  # where the peer's scores still fit a machine
LINEAR = (8192, 16384, 32768, 65536)  # where blocks are full, and no constant hides the slope


def program(who: str, causal: bool) -> Callable:
    """Returns (q, k, v, dout) -> (value, gradients) of ours or the peer's."""
    fn = attention if who == "ours" else jax.nn.dot_product_attention
    return with_gradients(lambda q, k, v: fn(q, k, v, is_causal=causal))


def shapes(b: int, t: int, h: int, g: int, width: int) -> list[jax.ShapeDtypeStruct]:
    """Returns those of q, k, v and the cotangent."""
    return [jax.ShapeDtypeStruct((b, t, n, width), jnp.float32) for n in (h, g, g, h)]


def arrays(*sizes: int) -> list[jax.Array]:
    """Returns random q, k, v and cotangent."""
    return [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(shapes(*sizes))]


def times(rounds: int) -> Iterator[list[report.Row]]:
    """Value and gradients of shapes of models."""
    for name, ((*sizes, causal), bar) in SHAPES.items():
        print(name, file=sys.stderr)
        given = arrays(*sizes)
        found = take_turns({who: compiled(program(who, bool(causal)), *given)[0] for who in ("ours", PEER)}, rounds)
        yield [ratio(name, found["ours"], PEER, found[PEER], "<=", bar)]


def memory(rounds: int) -> Iterator[list[report.Row]]:
    """Temporaries of value and gradients by length, at 4 heads of 64; how ours grow with it."""
    del rounds

    def temp(who: str, t: int) -> int:
        return hlo.memory(compiled(program(who, False), *shapes(1, t, 4, 4, 64))[1])["temp"]

    for t in PEER_LENGTHS:
        ours, theirs = temp("ours", t), temp(PEER, t)
        sides = f"{ours / 2**20:.0f} MiB", PEER, f"{theirs / 2**20:.0f} MiB"
        yield [report.Row(f"temporaries at {t} tokens", *sides, ours / theirs, "<=")]
    lengths, sizes = np.array(LINEAR, float), np.array([temp("ours", t) for t in LINEAR], float)
    slope, offset = np.polyfit(lengths, sizes, 1)
    power = float(np.polyfit(np.log(lengths), np.log(sizes), 1)[0])
    deviation = 100 * np.abs(slope * lengths + offset - sizes).max() / sizes.max()
    what = f"temporaries from {LINEAR[0]} to {LINEAR[-1]} tokens, as n to the power"
    yield [report.Row(what, f"{slope:.0f} B a token", "a line", f"within {deviation:.1f} %", power, "<=", POWER_BAR)]


def accuracy(rounds: int) -> Iterator[list[report.Row]]:
    """Errors of value and gradients at 1024 causal tokens against the definition in float64."""
    del rounds
    given, errors = arrays(1, 1024, 4, 2, 64), {}
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x), jnp.float64) for x in given]
        defined: Any = lambda q, k, v: attention(q, k, v, is_causal=True, implementation="reference")  # noqa: E731
        want = jax.tree.leaves(with_gradients(defined)(*wide))
    for who in ("ours", PEER):
        got = jax.tree.leaves(compiled(program(who, True), *given)[0]())
        errors[who] = max(relative(x, y) for x, y in zip(got, want, strict=True))
    ours, theirs = (f"{errors[who]:.1e}" for who in ("ours", PEER))
    yield [report.Row("error of value and gradients", ours, PEER, theirs, errors["ours"], "<=", GRADIENT_BAR, ours)]


PHASES = {"times": times, "memory": memory, "accuracy": accuracy}


if __name__ == "__main__":
    raise SystemExit(phases.main("Attention, value and gradients", __doc__, PHASES, RESULTS, rounds=9))

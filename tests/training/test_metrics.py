"""Bits per byte against sums written out, and what a run shows of itself."""

import io
import itertools
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable.checks import DataError
from portable.training.log import Log, read_log
from portable.training.metrics import bits_per_byte, sample
from portable.training.plot import loss_curve, smooth
from portable.training.progress import Bar, Lines, Report, duration
from portable.training.text import Document
from tests.oracles import need


class Counting(nnx.Module):
    """Predicts from the current byte and how many bytes it has read, so that lost state or context shows."""

    def __init__(self):
        self.table = nnx.Param(jnp.asarray(np.random.default_rng(0).normal(size=(256, 256)), jnp.float32))

    def init_state(self, batch_size):
        return jnp.zeros(batch_size)

    def __call__(self, tokens, *, state=None, return_state=False):
        seen = state[:, None] + jnp.arange(1, tokens.shape[1] + 1)
        logits = self.table[...][tokens] * (1 + jnp.sin(seen))[..., None]
        return (logits, seen[:, -1]) if return_state else logits


def bits(table: np.ndarray, data: bytes, ends: bool = True) -> float:
    total, stream = 0.0, [0, *data, *([0] if ends else [])]
    for i, (token, target) in enumerate(itertools.pairwise(stream)):
        logits = table[token] * (1 + math.sin(i + 1))
        total += (np.log(np.exp(logits).sum()) - logits[target]) / math.log(2)
    return total


def test_documents_are_scored_whole_from_a_fresh_state_with_their_end():
    model = Counting()
    table = np.asarray(model.table[...], np.float64)
    rng = np.random.default_rng(1)
    texts = [rng.integers(1, 256, n, np.uint8).tobytes() for n in (1, 63, 64, 65, 300, 7)]
    expected = sum(bits(table, text) for text in texts)
    for window, batch_size in ((64, 2), (1000, 8), (50, 1)):
        score = bits_per_byte(model, texts, window=window, batch_size=batch_size)
        assert score.bits == pytest.approx(expected, rel=1e-5)
        assert (score.bytes, score.documents) == (500, 6)
        assert score.bits_per_byte == score.bits / 500
    cut = Document("", texts[4], ends=False)
    assert bits_per_byte(model, [cut]).bits == pytest.approx(bits(table, texts[4], ends=False), rel=1e-5)


def test_nothing_to_score_is_said_in_a_sentence():
    for nothing in ([], [b""]):
        with pytest.raises(DataError, match="got no documents or only empty ones: give at least one byte"):
            bits_per_byte(Counting(), nothing)


def test_a_sample_is_spread_over_the_text():
    documents = [Document("a", bytes([1]) * 10_000), Document("b", bytes([2]) * 5_000, ends=False)]
    whole = sample(documents, 10**9, piece=1000)
    assert b"".join(p.data for p in whole) == documents[0].data + documents[1].data
    assert [p.ends for p in whole] == [False] * 9 + [True] + [False] * 5
    part = sample(documents, 3000, piece=1000)
    assert [(p.name, len(p.data)) for p in part] == [("a", 1000), ("a", 1000), ("b", 1000)]
    assert sample([], 100) == []


def test_a_log_has_each_step_once_after_a_restart(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, after=0)
    log.write([{"step": i, "loss": 1 / i} for i in range(1, 8)])
    log.close()
    with path.open("ab") as file:
        file.write(b'{"step": 8, "lo')  # killed while writing
    log = Log(path, after=5)
    assert [r["step"] for r in read_log(path)] == [1, 2, 3, 4, 5]
    log.write([{"step": 6, "loss": 2.0}])
    log.close()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in records] == [*[(i, 1 / i) for i in range(1, 6)], (6, 2.0)]
    assert read_log(tmp_path / "none.jsonl") == []


def test_the_curve_is_a_picture(tmp_path):
    need("matplotlib")
    records = [{"step": i, "loss": 5.0 / i + 1} for i in range(1, 200)]
    records[100]["held_out_bits_per_byte"] = 2.0
    for count in (199, 1, 0):
        path = tmp_path / f"{count}.png"
        loss_curve(records[:count], path, bits_per_nat=1.4427, title="a run")
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 5000


def test_smoothing_neither_lags_nor_bends():
    line = [10.0 - 0.1 * i for i in range(100)]
    assert smooth(line)[:90] == pytest.approx(line[:90])
    assert smooth([2.0] * 99 + [9.0])[-1] < 4
    zigzag = smooth([1.0, 3.0] * 50)
    assert max(abs(v - 2) for v in zigzag[10:90]) < 0.11
    assert smooth([]) == []


def test_progress_on_a_terminal_and_elsewhere():
    from rich.console import Console

    report = Report(30, 60, 1.5, 2.164, 1234.5, 185.0, held_out=2.25)
    plain = io.StringIO()
    lines = Lines(plain)
    lines.report(report)
    assert plain.getvalue() == (
        "step 30/60  loss 1.5000  2.164 bits/byte  held out 2.250  1,234 tokens/s  3:05 min left\n"
    )
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=160))
    bar.start(20, 60)
    bar.advance(30)
    bar.report(report)
    bar.note("a note [with] brackets")
    bar.close()
    shown = screen.getvalue()
    for part in ("1.5000", "2.164", "2.250", "1,234", "3:05 min", "30/60", "a note [with] brackets"):
        assert part in shown
    assert [duration(s) for s in (None, 0.4, 59.4, 60, 3599, 3725)] == [
        "?",
        "0 s",
        "59 s",
        "1:00 min",
        "59:59 min",
        "1:02 h",
    ]

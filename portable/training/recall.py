"""A small model that finds values beside their keys in a long text, trained in minutes: for studies of attention."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable.models.decoder import Decoder, DecoderConfig
from portable.nn import Rotary
from portable.training.data import IGNORE
from portable.training.options import TrainOptions
from portable.training.progress import Report, Silent
from portable.training.stdlib import stdlib_text
from portable.training.step import init_state, make_step, parts

KEYS, VALUES = 32, 16
RECORD = 256  # tokens behind the bytes: one for each record of a key and a value, for each key, for each value
KEY = RECORD + KEYS * VALUES
VALUE = KEY + KEYS
TASKS = {"needles": 4, "recall": 32}  # records in a text


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a study.

    Attributes:
      length: tokens of a question. short: of those that training begins with.
      steps, batch: of training. share: of the steps that are of the full length.
      texts: questions that are asked of each kind.
      width, layers: of the model.
    """

    length: int = 1024
    short: int = 128
    steps: int = 600
    batch: int = 32
    share: float = 0.25
    texts: int = 32
    width: int = 64
    layers: int = 2


QUICK = Sizes(length=192, short=96, steps=4, batch=4, share=0.5, texts=2, width=32)


class Questions:
    """Texts of the standard library's sources with records of a key and a value in them, and keys to be answered.

    "needles" has a few records anywhere in the first three quarters, "recall" many one behind the other; the keys that
    are asked stand at the end. A record is one token, so that one layer of attention can find it.
    """

    def __init__(self, held_out: bool = False):
        text = stdlib_text()
        documents = text.held_out if held_out else text.train
        self.bytes = np.frombuffer(b"".join(d.data for d in documents), np.uint8).astype(np.int32)

    def batch(self, kind: str, rows: int, length: int, seed: int) -> dict[str, np.ndarray]:
        """Returns a `portable.training.data.Batch` of [rows, length]; only answers are targets."""
        rng = np.random.default_rng((seed, length, rows, list(TASKS).index(kind)))
        count = min(TASKS[kind], length // 4)
        tokens, targets = np.empty((rows, length), np.int32), np.full((rows, length), IGNORE, np.int32)
        for row in range(rows):
            start = rng.integers(len(self.bytes) - length)
            tokens[row] = self.bytes[start : start + length]
            keys, values = rng.permutation(KEYS)[:count], rng.integers(VALUES, size=count)
            room = length * 3 // 4
            if kind == "needles":
                at = rng.permutation(room)[:count]
            else:
                at = rng.integers(room - count + 1) + np.arange(count)
            tokens[row, at] = RECORD + keys * VALUES + values
            asked = rng.permutation(count)[: length // 8]
            tokens[row, length - len(asked) :] = KEY + keys[asked]
            targets[row, length - len(asked) :] = VALUE + values[asked]
        return {"tokens": tokens, "targets": targets, "segments": np.zeros_like(tokens)}


def small_model(sizes: Sizes) -> Decoder:
    """Returns the model before training.

    Heads turn a quarter of their channels by position, so that what is learned on short texts holds on long ones.
    """
    config = DecoderConfig(
        vocab_size=VALUE + VALUES,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=2 * sizes.width,
        rope=Rotary(dims=8),
        initializer_range=0.05,
        max_position_embeddings=sizes.length,
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def train(model: Decoder, sizes: Sizes, shown: Silent) -> tuple[Decoder, list[float]]:
    """Returns the model trained by the library's own step, and its losses; `shown` is told about every tenth step.

    Short questions come first, as few steps are enough to go on to long ones.
    """
    options = TrainOptions(
        steps=sizes.steps, batch_size=sizes.batch, length=sizes.length, learning_rate=3e-3, warmup=sizes.steps // 20,
        weight_decay=0.01,
    )  # fmt: skip
    graphdef, params, biases, rest = parts(model)
    state, step = init_state(params, biases, options), make_step(graphdef, rest, options)
    losses: list[float] = []
    begin = time.perf_counter()
    shown.start(0, sizes.steps)
    for i, batch in enumerate(_batches(sizes), 1):
        state, metrics = step(state, {name: jnp.asarray(x) for name, x in batch.items()})
        losses.append(float(metrics["loss"]))
        shown.advance(i)
        if i % 10 == 0 or i == sizes.steps:
            each = (time.perf_counter() - begin) / i
            rate = batch["tokens"].size / each
            shown.report(Report(i, sizes.steps, losses[-1], None, rate, (sizes.steps - i) * each))
    shown.close()
    return nnx.merge(graphdef, state.params, state.biases, rest), losses


def _batches(sizes: Sizes) -> Iterator[dict[str, np.ndarray]]:
    questions, first = Questions(), round(sizes.steps * (1 - sizes.share))
    for i in range(sizes.steps):
        length = sizes.short if i < first else sizes.length
        rows = sizes.batch if i < first else max(2, sizes.batch * sizes.short // sizes.length)
        halves = [questions.batch(kind, rows // 2, length, i + 1) for kind in TASKS]
        yield {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}


def correct(logits: Any, targets: Any) -> float:
    """Returns the share of answers that are right."""
    asked = np.asarray(targets) != IGNORE
    return float((np.asarray(logits).argmax(-1) == targets)[asked].mean())

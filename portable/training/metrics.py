"""Held-out quality in bits per byte, the one measure that does not depend on the tokenizer."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable.checks import DataError
from portable.nn import fresh_state, unstack
from portable.training.data import IGNORE
from portable.training.step import cross_entropy
from portable.training.text import Document
from portable.training.tokens import ByteTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model needs to write documents down.

    Attributes:
      bits: sum of -log2 p over every token and every end of a document.
      bytes: size of the documents.
      documents: how many there were.
    """

    bits: float
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        """bits / bytes: 8 is no compression."""
        return self.bits / self.bytes


def bits_per_byte(
    model: nnx.Module,
    documents: Sequence[Document | bytes],
    tokenizer: Tokenizer | None = None,
    *,
    window: int = 1024,
    batch_size: int = 8,
) -> Score:
    """Measures how well a model predicts documents, each read from its first byte to its end.

    Every document starts from the empty state with the separator as its only context; the state is carried
    over windows, so the context is the whole document. The end of the document is predicted too, as for a
    compressor that must be able to stop. Divided by the bytes of the text, whatever the tokens are.

    Args:
      model: `model(tokens [b, t], state=, return_state=True) -> (logits [b, t, v], state)` with
        `init_state` (see `portable.nn.fresh_state`; a cache is as long as the longest document).
      documents: documents or plain bytes; empty ones count for nothing.
      tokenizer: the byte tokenizer by default.
      window: tokens a call; changes memory, not the result beyond rounding.
      batch_size: documents at a time.

    Raises:
      DataError: there is not one byte to predict.
    """
    tokenizer = tokenizer or ByteTokenizer()
    whole = [d if isinstance(d, Document) else Document("", d) for d in documents]
    whole = [d for d in whole if d.data]
    if not whole:
        raise DataError("bits per byte needs text, got no documents or only empty ones: give at least one byte.")
    sequences = sorted((_sequence(d, tokenizer) for d in whole), key=len, reverse=True)
    rows: list[list[np.ndarray]] = [[] for _ in range(min(batch_size, len(sequences)))]
    for ids in sequences:  # the longest first, each to the shortest row: rows end at about the same time
        min(rows, key=lambda row: sum(map(len, row))).append(_windows(ids, window))
    calls = max(sum(map(len, row)) for row in rows)
    room = max(len(windows) for row in rows for windows in row) * window
    # [rows, calls, 3, window]: inputs, targets, and in the third line whether a document begins.
    grid = np.full((len(rows), calls, 3, window), IGNORE, np.int32)
    for row, documents_of_row in zip(grid, rows, strict=True):
        filled = np.concatenate(documents_of_row)
        row[: len(filled)] = filled
    model = unstack(model)  # only layers one by one carry a state
    graphdef, variables = nnx.split(model)
    state, bits = fresh_state(model, len(rows), room), 0.0
    for call in range(calls):
        tokens, targets, begins = grid[:, call].swapaxes(0, 1)
        nats, state = _score(graphdef, room, variables, state, np.maximum(tokens, 0), targets, begins[:, 0] == 1)
        bits += float(nats) / math.log(2)
    return Score(bits, sum(len(d.data) for d in whole), len(whole))


def sample(documents: Sequence[Document], size: int, *, piece: int = 4096) -> list[Document]:
    """Returns evenly spaced pieces of at most `piece` bytes, about `size` bytes together or all there is."""
    pieces = []
    for document in documents:
        for at in range(0, len(document.data), piece):
            data = document.data[at : at + piece]
            ends = document.ends and at + piece >= len(document.data)
            pieces.append(Document(document.name, data, ends))
    count = max(1, min(len(pieces), round(len(pieces) * size / max(1, sum(len(p.data) for p in pieces)))))
    return [pieces[i * len(pieces) // count] for i in range(count)] if pieces else []


def _sequence(document: Document, tokenizer: Tokenizer) -> np.ndarray:
    ends = [tokenizer.separator] if document.ends else []
    return np.concatenate([[tokenizer.separator], tokenizer.encode(document.data), ends]).astype(np.int32)


def _windows(ids: np.ndarray, window: int) -> np.ndarray:
    """Cuts a sequence into [n, 3, window]: inputs, targets, 1 in the window where it begins."""
    count = max(1, -(-(len(ids) - 1) // window))
    flat = np.full((2, count * window), IGNORE, np.int32)
    flat[:, : len(ids) - 1] = ids[:-1], ids[1:]
    cut = np.zeros((count, 3, window), np.int32)
    cut[:, :2] = flat.reshape(2, count, window).swapaxes(0, 1)
    cut[0, 2] = 1
    return cut


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(graphdef, room, variables, state, tokens, targets, begins):
    model = nnx.merge(graphdef, variables)

    def reset(fresh, old):
        return jnp.where(begins.reshape(-1, *[1] * (old.ndim - 1)), fresh, old)

    state = jax.tree.map(reset, fresh_state(model, len(tokens), room), state)
    logits, state = model(tokens, state=state, return_state=True)
    return cross_entropy(logits, targets)[0], state

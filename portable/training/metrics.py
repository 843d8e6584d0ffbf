"""Held-out quality in bits per byte, the one measure that does not depend on the tokenizer."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from portable.checks import DataError
from portable.nn import unstack
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
        `init_state(b)`.
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
    rows = sorted((_sequence(d, tokenizer) for d in whole), key=len)
    batch_size = min(batch_size, len(rows))
    model = unstack(model)  # only layers one by one carry a state
    graphdef, variables = nnx.split(model)
    bits = 0.0
    for at in range(0, len(rows), batch_size):
        group = rows[at : at + batch_size]
        calls = -(-(len(group[-1]) - 1) // window)
        tokens = np.zeros((batch_size, calls * window), np.int32)
        targets = np.full((batch_size, calls * window), IGNORE, np.int32)
        for row, ids in enumerate(group):
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        state = model.init_state(batch_size)
        for call in range(calls):
            part = slice(call * window, (call + 1) * window)
            nats, state = _score(graphdef, variables, state, tokens[:, part], targets[:, part])
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


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, variables, state, tokens, targets):
    logits, state = nnx.merge(graphdef, variables)(tokens, state=state, return_state=True)
    return cross_entropy(logits, targets)[0], state

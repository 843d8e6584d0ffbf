"""Packed windows of tokens, and batches of them as a pure function of the step."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from portable.checks import DataError
from portable.training.text import Document
from portable.training.tokens import Tokenizer

IGNORE = -1  # a target that no loss is computed for


class Batch(TypedDict):
    """Windows of one step, each [b, t] int32.

    Keys:
      tokens: inputs.
      targets: the token after each input, IGNORE where there is none.
      segments: number of the document within the window, from 0; a model's state must not cross a change.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segments: np.ndarray


@dataclasses.dataclass(frozen=True)
class Packed:
    """Documents end to end, a separator before each and after the last.

    Attributes:
      tokens: [n] ids, in the tokenizer's own dtype.
      starts: [documents] positions of the separators that open a document, ascending.
      bytes: size of the text behind the tokens.
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int


def pack(documents: Sequence[Document], tokenizer: Tokenizer) -> Packed:
    """Tokenizes and concatenates documents."""
    parts, starts, at = [], [], 0
    for document in documents:
        ids = tokenizer.encode(document.data)
        parts += [np.asarray([tokenizer.separator], ids.dtype), ids]
        starts.append(at)
        at += 1 + len(ids)
    if documents and documents[-1].ends:
        parts.append(np.asarray([tokenizer.separator], parts[-1].dtype))
    tokens = np.concatenate(parts) if parts else np.zeros(0, np.int32)
    return Packed(tokens, np.asarray(starts, np.int64), sum(len(d.data) for d in documents))


class Windows:
    """A random-access source of windows: item i predicts tokens [i t + 1, (i + 1) t + 1).

    Every token but the first is a target of exactly one window; the last window is filled up with ignored
    targets.
    """

    def __init__(self, packed: Packed, length: int):
        """
        Args:
          packed: the tokens.
          length: tokens a window, t.

        Raises:
          DataError: there is less text than one window.
        """
        if len(packed.tokens) < length + 1:
            raise DataError(
                f"the text is shorter than one window: a window of {length} tokens needs {length + 1}, got "
                f"{len(packed.tokens)} from {packed.bytes} bytes; give more text or a smaller --length."
            )
        self.packed = packed
        self.length = length

    def __len__(self) -> int:
        return -(-(len(self.packed.tokens) - 1) // self.length)

    def __getitem__(self, index) -> Batch:
        at, t = int(index) * self.length, self.length
        ids = self.packed.tokens[at : at + t + 1].astype(np.int32)
        tokens, targets = np.zeros(t, np.int32), np.full(t, IGNORE, np.int32)
        tokens[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
        tokens[len(ids) - 1 :] = ids[-1]
        segments = np.searchsorted(self.packed.starts, np.arange(at, at + t), side="right").astype(np.int32)
        return {"tokens": tokens, "targets": targets, "segments": segments - segments[0]}

    def __repr__(self) -> str:
        return f"Windows({len(self)} of {self.length} tokens)"


def endless(source: Any, seed: int) -> Any:
    """Returns the items of a source again and again, every epoch a new permutation, as grain's dataset.

    Raises:
      DataError: grain is not installed.
    """
    try:
        import grain
    except ImportError as error:
        raise DataError(
            "training needs the package `grain`, not installed here: pip install 'portable-jax[train]'."
        ) from error
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat(None, reseed_each_epoch=True)


class Batches:
    """Shuffled batches without end: `batches[step]` depends on the source, the seed and the step, and nothing else.

    So a run resumes exactly from a step number alone. Every epoch is a new permutation; a batch may span two.
    """

    def __init__(self, windows: Any, batch_size: int, seed: int, *, noise: bool = False):
        """Args:
        windows: `Windows`, or another source of `Batch` [t].
        batch_size: windows a batch. seed: of the order.
        noise: whether a batch has `noise` too, [b, 2] uint32 random bits of each window.
        """
        rows = endless(windows, seed)
        self._dataset = (rows.random_map(_noisy) if noise else rows).batch(batch_size)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of `step` (from 0): arrays [batch_size, t]."""
        return self._dataset[step]  # pyright: ignore[reportReturnType]


def _noisy(row: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {**row, "noise": rng.integers(0, 2**32, 2, np.uint32)}

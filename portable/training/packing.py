"""Examples packed into rows of one length, none of which sees another."""

import bisect
from collections.abc import Sequence

import numpy as np

from portable.checks import DataError
from portable.training.data import IGNORE, Batch
from portable.training.examples import Example


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into bins, the largest first, each where it leaves the least room (best-fit decreasing).

    As Ding et al. 2024 (arXiv:2404.10830) pack documents: little is wasted, and none is cut that fits a bin.

    Args:
      sizes: of the items, each in 1..capacity.
      capacity: of a bin.

    Returns:
      The items of each bin, by number.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # ascending, those that some bin has
    having: dict[int, list[int]] = {}
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect.bisect_left(rooms, sizes[item])
        if at == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[at]
            chosen = having[room].pop()
            if not having[room]:
                del having[room]
                rooms.pop(at)
        bins[chosen].append(item)
        if left := room - sizes[item]:
            if left not in having:
                having[left] = []
                bisect.insort(rooms, left)
            having[left].append(chosen)
    return bins


class Rows:
    """A random-access source of rows: several examples one after another, each a segment of its own.

    An example of n tokens takes n - 1 positions, since its last token is only predicted. One that is longer than a row
    is cut: into pieces where everything is trained, else at the row's end.

    Attributes:
      length: positions a row. cut, lost: examples that lost their end, and that were left out because nothing that is
        trained lay within a row. trained: tokens that are learned.
    """

    def __init__(self, examples: Sequence[Example], length: int, *, packed: bool = True):
        """Args:
        examples: with at least two tokens each; shorter ones are passed over.
        length: positions a row.
        packed: False gives each example a row of its own.

        Raises:
          DataError: nothing is left to train on.
        """
        self.length, self.cut, self.lost = length, 0, 0
        self._pieces: list[tuple[np.ndarray, np.ndarray]] = []
        for tokens, trained, _ in examples:
            whole = trained[1:].all()
            for at in range(0, len(tokens) - 1 if whole else 1, length):
                piece = tokens[at : at + length + 1], trained[at : at + length + 1]
                if piece[1][1:].any():
                    self._pieces.append(piece)
                    self.cut += not whole and len(tokens) > length + 1
                elif not whole:
                    self.lost += 1
        if not self._pieces:
            raise DataError(
                f"there is nothing to train on in rows of {length} tokens: got {len(examples)} examples, "
                f"{self.lost} of them with a prompt that fills a row; give more examples or a larger --length."
            )
        sizes = [len(tokens) - 1 for tokens, _ in self._pieces]
        self._bins = best_fit(sizes, length) if packed else [[i] for i in range(len(sizes))]
        self.trained = sum(int(trained[1:].sum()) for _, trained in self._pieces)

    def __len__(self) -> int:
        return len(self._bins)

    def __getitem__(self, index) -> Batch:
        t, at = self.length, 0
        tokens, targets = np.zeros(t, np.int32), np.full(t, IGNORE, np.int32)
        own = self._bins[int(index)]
        segments = np.full(t, len(own), np.int32)  # what is left over is a segment too
        for number, piece in enumerate(own):
            ids, trained = self._pieces[piece]
            end = at + len(ids) - 1
            tokens[at:end], segments[at:end] = ids[:-1], number
            targets[at:end] = np.where(trained[1:], ids[1:], IGNORE)
            at = end
        return {"tokens": tokens, "targets": targets, "segments": segments}

    def __repr__(self) -> str:
        return f"Rows({len(self)} of {self.length} tokens)"

    def summary(self) -> str:
        """A line or two for people: how full the rows are, what was cut."""
        filled = sum(len(tokens) - 1 for tokens, _ in self._pieces) / (len(self) * self.length)
        line = f"{len(self):,} rows of {self.length} tokens, {filled:.1%} filled"
        if self.cut:
            line += f"\n{self.cut:,} example{'s are' if self.cut > 1 else ' is'} longer than a row and cut at its end"
        if self.lost:
            line += f"\n{self.lost:,} left out, because the prompt alone fills a row; a larger --length takes them"
        return line

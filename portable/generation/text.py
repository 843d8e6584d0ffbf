"""Text from tokens that arrive a few at a time."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

# A character has up to four bytes, hence at most this many tokens: what is broken by then stays broken.
_PATIENCE = 4
_BROKEN = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes tokens as they come, and gives out text only once its last character is whole.

    Tokenizers may join a token with the one before it (spaces, parts of a character), so each piece is
    decoded together with the piece before it.
    """

    def __init__(self, decode: Callable[[Any], bytes], before: Sequence[int] | np.ndarray = ()):
        """Begins after the tokens `before`, which are not given out.

        Args:
          decode: from a list of token ids to text in UTF-8, in which characters may be broken.
          before: the prompt; its last tokens are enough.
        """
        self._decode = decode
        # The last tokens given out: what the next ones may be joined with.
        self._shown = [int(i) for i in before[-_PATIENCE:]]
        self._waiting: list[int] = []

    def feed(self, tokens: Iterable[int]) -> str:
        """Takes further tokens; returns the text that is now certain, perhaps none."""
        out = []
        for token in tokens:
            self._waiting.append(int(token))
            text = self._text()
            if not text.endswith(_BROKEN) or len(self._waiting) >= _PATIENCE:
                out.append(text)
                # A token without text, such as one that ends a text, leaves what the next one is joined with.
                self._shown, self._waiting = self._waiting if text else self._shown + self._waiting, []
        return "".join(out)

    def close(self) -> str:
        """Returns what is left, with U+FFFD in place of a character that was cut."""
        text, self._shown, self._waiting = self._text(), [], []
        return text

    def _text(self) -> str:
        before = self._decode(self._shown)
        both = self._decode(self._shown + self._waiting)
        return both[len(before) :].decode("utf-8", errors="replace")

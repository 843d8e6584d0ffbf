"""Text to token ids and back: bytes as they are, or a `tokenizer.json`."""

import hashlib
import json
from pathlib import Path
from typing import Protocol

import numpy as np

from portable.checks import DataError

# Tokens by which published tokenizers end a document, best known first.
_SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")


class Tokenizer(Protocol):
    """What training needs of a tokenizer.

    Attributes:
      name: a word for the log and the run's configuration.
      vocab_size: number of ids, separator included.
      separator: id that stands before every document and, read as a target, ends it. `encode` never returns
        it.

    `encode_chat` takes the text of a chat template, in which special tokens are written out, and returns ids [n] and
    where in the text each begins, in characters [n].
    """

    name: str
    vocab_size: int
    separator: int

    def encode(self, data: bytes) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> bytes: ...

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]: ...


class ByteTokenizer:
    """One token a byte, 256 ids; text in any encoding.

    Byte 0 is the separator: it occurs in no text file (a file that holds it counts as binary), so a
    separator costs no 257th id, which would not be a byte.
    """

    name = "bytes"
    vocab_size = 256
    separator = 0

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the bytes of `data` as uint8 [n]; DataError if one of them is 0."""
        if b"\0" in data:
            raise DataError(
                f"text for the byte tokenizer must not hold byte 0, got it at {data.index(0)} of "
                f"{len(data)}: convert UTF-16 to UTF-8 and leave binary files out."
            )
        return np.frombuffer(data, np.uint8)

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the bytes of `text`, and the character that each is of, int64; there are no special tokens."""
        sizes = [len(c.encode("utf-8", "replace")) for c in text]
        return self.encode(text.encode("utf-8", "replace")), np.repeat(np.arange(len(text)), sizes)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the bytes for `ids` [n], separators left out."""
        ids = np.asarray(ids)
        return ids[ids != self.separator].astype(np.uint8).tobytes()


class FileTokenizer:
    """A `tokenizer.json` read with the `tokenizers` library (`pip install 'portable-jax[hf]'`).

    The separator is the end-of-document token the file declares, else one id more than the file has. Bytes
    that are not UTF-8 become U+FFFD; special tokens written out in a text are encoded as ordinary text.
    """

    def __init__(self, path: str | Path):
        try:
            from tokenizers import Tokenizer as Engine
        except ImportError as error:
            raise DataError(
                "a tokenizer.json needs the package `tokenizers`, not installed here: "
                "pip install 'portable-jax[hf]', or leave --tokenizer out to train on bytes."
            ) from error
        path = Path(path)
        try:
            text = path.read_text("utf-8")
            json.loads(text)["model"]
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}; give a tokenizer.json.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not a tokenizer.json (JSON with a `model` entry): give one.") from error
        self._engine = Engine.from_str(text)
        self._engine.encode_special_tokens = True
        self._engine.no_padding()
        self._engine.no_truncation()
        vocab = self._engine.get_vocab(with_added_tokens=True)
        size = max(vocab.values()) + 1
        known = [vocab[token] for token in _SEPARATORS if token in vocab]
        self.separator = known[0] if known else size
        self.vocab_size = max(size, self.separator + 1)
        self.name = f"tokenizer.json {hashlib.sha256(text.encode()).hexdigest()[:16]}"
        self.path = path

    def encode(self, data: bytes) -> np.ndarray:
        """Returns the token ids of `data` as int32 [n]."""
        text = data.decode("utf-8", errors="replace")
        return np.asarray(self._engine.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_chat(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of `text` as int32 [n], special tokens read as such, and where each begins [n]."""
        self._engine.encode_special_tokens = False
        try:
            found = self._engine.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False)
        finally:
            self._engine.encode_special_tokens = True
        return np.asarray(found.ids, np.int32), np.asarray([first for first, _ in found.offsets], np.int64)

    def decode(self, ids: np.ndarray) -> bytes:
        """Returns the text of `ids` [n] as UTF-8, separators left out."""
        ids = np.asarray(ids)
        return self._engine.decode(ids[ids != self.separator].tolist(), skip_special_tokens=False).encode()


def load_tokenizer(path: str | Path | None) -> Tokenizer:
    """Returns the byte tokenizer for None, else that of the `tokenizer.json` at `path`, or DataError."""
    return ByteTokenizer() if path is None else FileTokenizer(path)

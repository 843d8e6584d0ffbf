"""Text that every Python installation has: the source of its standard library.

The embedded model is trained on it. Left out are test suites (larger than all the rest and repetitive), the
code tables of `encodings` and files generated for one machine; what remains is about ten megabytes of code
and prose.
"""

import hashlib
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from portable.training.text import Document, Text, read_text

_EXCLUDE = (
    "site-packages/*",
    "dist-packages/*",
    "test/*",
    "*/test/*",
    "*/tests/*",
    "*/idle_test/*",
    "encodings/*",
    "_sysconfigdata*",
    "config-*",
)


def stdlib_text(folder: str | Path | None = None) -> Text:
    """Returns the standard library's source, a twentieth of the files (by sha256 of their path) held out.

    Args:
      folder: with the library; the running Python's by default.

    Raises:
      DataError: the folder holds no Python files (some distributions zip them).
    """
    return read_text(folder or sysconfig.get_path("stdlib"), include=("*.py",), exclude=_EXCLUDE)


def describe(text: Text, python: str) -> str:
    """Returns the file list as JSON: every path with its sha256, by part, and the rule that split them.

    Args:
      text: the corpus.
      python: version it came with.
    """

    def part(documents: Sequence[Document]) -> dict[str, str]:
        return {d.name: hashlib.sha256(d.data).hexdigest() for d in documents}

    value = {
        "python": python,
        "rule": text.rule,
        "train_bytes": sum(len(d.data) for d in text.train),
        "held_out_bytes": sum(len(d.data) for d in text.held_out),
        "held_out": part(text.held_out),
        "train": part(text.train),
    }
    return json.dumps(value, indent=1) + "\n"


def unlike(text: Text, description: str) -> list[str]:
    """Returns the paths whose content or part differs from a file list written by `describe`."""
    saved, now = json.loads(description), json.loads(describe(text, ""))
    before = {(part, *item) for part in ("train", "held_out") for item in saved[part].items()}
    after = {(part, *item) for part in ("train", "held_out") for item in now[part].items()}
    return sorted({name for _, name, _ in before ^ after})

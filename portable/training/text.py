"""Text files as documents: found, read, and split into training and held-out parts."""

import dataclasses
import fnmatch
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from portable.checks import DataError


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a part of one.

    Attributes:
      name: path relative to the folder it was found in, with forward slashes.
      data: its bytes.
      ends: whether the text ends here; False for a part cut before the end.
    """

    name: str
    data: bytes
    ends: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """Documents to train on and documents never trained on.

    Attributes:
      train, held_out: the documents of each part, in a fixed order.
      rule: one sentence on how the parts were told apart.
      skipped: (name, reason) of every file found and not used.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    rule: str
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def fingerprint(self) -> str:
        """sha256 over names, contents and split; equal exactly if a run would see the same text."""
        digest = hashlib.sha256()
        for part in (self.train, self.held_out):
            digest.update(f"{len(part)}\n".encode())
            for document in part:
                digest.update(f"{document.name}\n{hashlib.sha256(document.data).hexdigest()}\n".encode())
        return digest.hexdigest()

    def summary(self) -> str:
        """A line or two for people: sizes, the split rule, what was left out."""

        def size(part: Sequence[Document]) -> str:
            files = len({document.name for document in part})
            return f"{sum(len(d.data) for d in part):,} bytes in {files:,} file{'s' if files != 1 else ''}"

        line = f"train on {size(self.train)}"
        line += f", held out {size(self.held_out)} ({self.rule})" if self.held_out else ", nothing held out"
        if self.skipped:
            reasons = Counter(reason for _, reason in self.skipped)
            counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
            line += f"\nskipped {counts}: " + ", ".join(name for name, _ in self.skipped[:3])
            line += ", ..." if len(self.skipped) > 3 else ""
        return line


def in_twentieth(name: str) -> bool:
    """True for about one name in twenty, the same on every machine: sha256(name) % 20 == 0."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0


def read_text(
    path: str | Path, *, include: Sequence[str] = (), exclude: Sequence[str] = (), hold_out: bool = True
) -> Text:
    """Reads a text file, or every text file below a folder, and holds a part out.

    In a folder, files whose path hashes to a multiple of 20 are held out, as long as that makes up between a
    fiftieth and a quarter of the bytes; otherwise (a single file, a folder of few) the last twentieth of
    every file. Empty, unreadable and binary files (those with a byte 0) in a folder are skipped and named in
    `Text.skipped`; hidden files and folders are not looked at.

    Args:
      path: a file or a folder.
      include: glob patterns on the relative path; when given, only files that match one are read.
      exclude: glob patterns on the relative path; files that match one are not read.
      hold_out: False trains on everything.

    Raises:
      DataError: nothing there to train on; says what was found instead.
    """
    path = Path(path)
    if path.is_dir():
        documents, skipped = _read_folder(path, include, exclude)
    else:
        document, reason = _read(path, path.name)
        if document is None:
            raise DataError(f"{path} cannot be trained on: the file is {reason}; give a text file or a folder of them.")
        documents, skipped = [document], []
    return split(documents, hold_out=hold_out, skipped=skipped)


def split(documents: Sequence[Document], *, hold_out: bool = True, skipped: Sequence[tuple[str, str]] = ()) -> Text:
    """Splits documents into training and held-out parts by the rule of `read_text`."""
    if not hold_out:
        return Text(tuple(documents), (), "", tuple(skipped))
    held = [d for d in documents if in_twentieth(d.name)]
    held_bytes, all_bytes = (sum(len(d.data) for d in part) for part in (held, documents))
    if all_bytes / 50 <= held_bytes <= all_bytes / 4:
        train = [d for d in documents if not in_twentieth(d.name)]
        return Text(tuple(train), tuple(held), "sha256 of the path is a multiple of 20", tuple(skipped))
    heads, tails = [], []
    for document in documents:
        at = len(document.data) - len(document.data) // 20
        # A line cut in two would give its end away to no one, but reads badly in examples.
        at = document.data.rfind(b"\n", at // 2, at) + 1 or at
        heads.append(Document(document.name, document.data[:at], ends=at == len(document.data)))
        if document.data[at:]:
            tails.append(Document(document.name, document.data[at:]))
    return Text(tuple(heads), tuple(tails), "the last twentieth of every file", tuple(skipped))


def _read_folder(
    folder: Path, include: Sequence[str], exclude: Sequence[str]
) -> tuple[list[Document], list[tuple[str, str]]]:
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__pycache__"]
        names += [(Path(root) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    wanted = [
        name
        for name in sorted(names)
        if (not include or any(fnmatch.fnmatch(name, glob) for glob in include))
        and not any(fnmatch.fnmatch(name, glob) for glob in exclude)
    ]
    documents, skipped = [], []
    for name in wanted:
        document, reason = _read(folder / name, name)
        if document is None:
            skipped.append((name, reason))
        else:
            documents.append(document)
    if not documents:
        found = ", ".join(f"{n} {reason}" for reason, n in Counter(r for _, r in skipped).items())
        found = found or (f"{len(names)} files, none selected" if names else "no files")
        raise DataError(f"{folder} holds no text to train on, got {found}: give a folder with text files.")
    return documents, skipped


def _read(path: Path, name: str) -> tuple[Document | None, str]:
    try:
        data = path.read_bytes()
    except OSError as error:
        return None, f"unreadable ({error.strerror})"
    if not data:
        return None, "empty"
    return (None, "binary (it holds byte 0)") if b"\0" in data else (Document(name, data), "")

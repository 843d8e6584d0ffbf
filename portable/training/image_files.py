"""Files of images by class: found, opened once, split into two parts, decoded."""

import dataclasses
import hashlib
import io
import os
import struct
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from portable.checks import DataError
from portable.training.text import in_twentieth

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
SMALLEST = 4  # pixels a side: the largest patch of a stem
_IN_MEMORY = 2**30  # bytes of decoded images kept; more are decoded again at every use
_HELD_OUT = ("val", "test")


@dataclasses.dataclass(frozen=True)
class Info:
    """A file's (width, height), whether it has no colours, and the sha256 of its bytes."""

    size: tuple[int, int]
    grey: bool
    digest: str


class Files(Sequence):
    """Image files as [size, size, c] uint8, decoded once as long as there is room."""

    def __init__(self, paths: Sequence[Path], size: int, channels: int):
        self._paths, self._size, self._channels = list(paths), size, channels
        self._kept: dict[int, np.ndarray] = {}
        self._room = _IN_MEMORY // (size * size * channels)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        index = range(len(self))[index]
        if index in self._kept:
            return self._kept[index]
        pixels = decode(self._paths[index], self._size, self._channels)
        if len(self._kept) < self._room:
            self._kept[index] = pixels
        return pixels


def decode(path: str | Path, size: int, channels: int) -> np.ndarray:
    """Returns an image file as [size, size, channels] uint8: turned upright, on white where transparent, resized.

    Raises:
      DataError: the file cannot be read, any more.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16") or image.mode == "I":
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB" if channels == 3 else "L")
            resized = image.resize((size, size), Image.Resampling.BILINEAR)
    except _faults() as error:
        raise DataError(f"{path} can no longer be read as an image: {error}; restore it.") from error
    return np.asarray(resized).reshape(size, size, channels)


def _faults() -> tuple[type[Exception], ...]:
    from PIL import Image

    return (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)


def parts(folder: Path) -> list[Path]:
    """Returns the folders of the two parts, or the one folder of both."""
    if (folder / "train").is_dir():
        for name in _HELD_OUT:
            if (folder / name).is_dir():
                return [folder / "train", folder / name]
    return [folder]


def subfolders(root: Path, exclude: Sequence[Path]) -> list[str]:
    """Returns the names of the folders in a folder, sorted, without hidden and excluded ones."""
    out = {path.resolve() for path in exclude}
    found = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".") and p.resolve() not in out]
    return sorted(p.name for p in found)


def walk(root: Path, classes: Sequence[str], exclude: Sequence[Path]) -> list[tuple[Path, int]]:
    """Returns the images of each class, in a fixed order."""
    out = {path.resolve() for path in exclude}
    found = []
    for label, name in enumerate(classes):
        for where, folders, files in os.walk(root / name):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(where) / f).resolve() not in out)
            images = [f for f in sorted(files) if f.lower().endswith(SUFFIXES) and not f.startswith(".")]
            found += [(Path(where) / f, label) for f in images]
    return sorted(found, key=lambda pair: pair[0].relative_to(root).as_posix())


def open_all(folder: Path, paths: Sequence[Path]) -> tuple[dict[Path, Info], list[tuple[str, str]]]:
    """Opens and decodes every image; returns those that can be used, and what is wrong with the others."""
    from PIL import Image

    opened, faults = {}, []
    for path in paths:
        fault = None
        try:
            data = path.read_bytes()
            if not data:
                fault = "empty"
            else:
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
                    if min(image.size) < SMALLEST:
                        fault = f"smaller than {SMALLEST} x {SMALLEST} pixels"
                    grey = image.mode in ("1", "L", "I", "I;16", "I;16B", "LA")
                    opened[path] = Info(image.size, grey, hashlib.sha256(data).hexdigest())
        except _faults():
            fault = "broken"
        if fault:
            opened.pop(path, None)
            faults.append((path.relative_to(folder).as_posix(), fault))
    return opened, faults


def split(found: list[tuple[Path, int]], folder: Path) -> tuple[list[list[tuple[Path, int]]], str]:
    """Returns the two parts of one folder's images, and the rule."""
    names = {path: path.relative_to(folder).as_posix() for path, _ in found}
    held = {path for path in names if in_twentieth(names[path])}
    rule = "sha256 of the path is a multiple of 20"
    labels = {label for _, label in found}
    there = [{label for path, label in found if (path in held) == part} for part in (False, True)]
    if not (len(found) / 50 <= len(held) <= len(found) / 4 and there == [labels, labels]):
        held, rule = set(), "a twentieth of each class, by sha256 of the path"
        for label in labels:
            own = [path for path, other in found if other == label]
            own.sort(key=lambda path: hashlib.sha256(names[path].encode()).hexdigest())
            held |= set(own[: max(1, len(own) // 20)]) if len(own) > 1 else set()
    return [[pair for pair in found if (pair[0] in held) == part] for part in (False, True)], rule


def listed(faults: Sequence[tuple[str, str]]) -> str:
    """Returns `2 broken (a.png, b.png), 1 empty (c.png)`."""
    reasons = Counter(reason for _, reason in faults)
    parts = []
    for reason, count in reasons.most_common():
        names = [name for name, why in faults if why == reason]
        parts.append(f"{count:,} {reason} ({', '.join(names[:3])}{', ...' if count > 3 else ''})")
    return ", ".join(parts)

"""Results kept on disk by content, so that what was compiled once is not compiled again.

A result is found by its job, the source of portable and the versions of the compilers; failing that, by the lowered
program itself, so that a change elsewhere in the source costs a lowering and not a compilation.
"""

import functools
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from portable import files

# What a compiled program depends on, beside its text.
PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "jax-triton", "triton")


def default_folder() -> pathlib.Path:
    """Returns the folder of the user's cache: $PORTABLE_CACHE, else portable's part of $XDG_CACHE_HOME or ~/.cache."""
    if named := os.environ.get("PORTABLE_CACHE"):
        return pathlib.Path(named) / "parity"
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "portable" / "parity"


@functools.cache
def versions() -> dict[str, str]:
    """Returns the versions of the installed packages that results depend on."""
    found = {}
    for package in PACKAGES:
        if any(True for _ in metadata.distributions(name=package)):
            found[package] = metadata.version(package)
    return found


@functools.cache
def source() -> str:
    """Returns a hash of every Python file and device description of portable."""
    digest = hashlib.sha256()
    home = pathlib.Path(__file__).resolve().parent.parent
    for folder in (home, home / "models", home / "pallas_kernels"):  # the latter two may be links
        for file in sorted(p for p in folder.rglob("*") if p.suffix in (".py", ".txtpb")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def key(*parts: Any) -> str:
    """Returns a file name for JSON-like parts and the versions."""
    return hashlib.sha256(json.dumps([parts, versions()], sort_keys=True).encode()).hexdigest()[:40]


class Store:
    """A folder of JSON files. A file that cannot be read counts as absent; a folder that cannot be written, as off."""

    def __init__(self, folder: str | os.PathLike | None) -> None:
        """Args:
        folder: where results are kept; None keeps nothing.
        """
        self.folder = None if folder is None else pathlib.Path(folder)

    def get(self, name: str) -> dict[str, Any] | None:
        """Returns the object kept under a key, or None."""
        if self.folder is None:
            return None
        try:
            found = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def put(self, name: str, value: Mapping[str, Any]) -> None:
        """Keeps an object under a key. A reader sees it whole or not at all."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.replace(self.folder / f"{name}.json", json.dumps(dict(value)))
        except OSError as fault:
            folder, self.folder = self.folder, None
            warnings.warn(
                f"parity: results cannot be kept in {folder} ({fault.strerror or fault}), so the next run compiles "
                "them again; name another folder with --cache or $PORTABLE_CACHE.",
                stacklevel=2,
            )

"""Checks versions before jax or flax is used, so that an old runtime gets a sentence and not a traceback."""

import sys
from importlib.metadata import PackageNotFoundError, version

# The same bounds stand in pyproject.toml; a test compares them.
REQUIRED = {"jax": ((0, 10), (0, 12)), "flax": ((0, 12, 5), (0, 13))}


def problem(package: str, found: str | None) -> str | None:
    """Returns the sentence for a user whose `package` is missing or outside the supported versions, else None."""
    low, high = REQUIRED[package]
    bounds = f"portable needs {package}>={_text(low)},<{_text(high)}"
    if found is None:
        return f"{bounds}; it is not installed. Run: pip install portable-jax"
    digits = tuple(int(part) for part in found.split(".")[:3] if part.isdigit())
    if low <= digits < high:
        return None
    return (
        f"{bounds}; this process has {found}. Run: pip install -U portable-jax. On Colab, run the notebook's first "
        "cell, then Runtime > Restart session."
    )


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _installed(package: str) -> str | None:
    # What is loaded counts: after an upgrade in a running process the metadata is newer than the module.
    if loaded := getattr(sys.modules.get(package), "__version__", None):
        return loaded
    try:
        return version(package)
    except PackageNotFoundError:
        return None


for _package in REQUIRED:
    if _problem := problem(_package, _installed(_package)):
        raise ImportError(_problem)

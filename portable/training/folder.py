"""The folder of a run: whose it is, and whether this command may continue it."""

import json
from pathlib import Path
from typing import Any

from portable import files
from portable.checks import CheckpointError

_OURS = {
    "config.json",
    "config.json.tmp",
    "log.jsonl",
    "log.jsonl.tmp",
    "checkpoints",
    "model",
    "adapter",
    "loss.png",
    "curves.png",
    "confusion.png",
    ".lock",
}


def claim(folder: Path, description: dict[str, Any], information: dict[str, Any]) -> list[str]:
    """Makes the folder this run's, or checks that it already is.

    Args:
      folder: of the run; created if missing.
      description: what determines the run's losses; must equal what the folder was started with.
      information: what is good to know but may change (versions of libraries).

    Returns:
      Sentences about information that changed.

    Raises:
      CheckpointError: the folder is another run's (the differences are named), holds other things, or cannot
        be used.
    """
    path = folder / "config.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if other := sorted(p.name for p in folder.iterdir() if p.name not in _OURS):
                raise CheckpointError(
                    f"{folder} is no run's folder, it holds {', '.join(other[:3])}: give a new or empty one."
                )
            files.replace(path, json.dumps(description | {"information": information}, indent=2) + "\n")
            return []
        saved = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be used for a run: {error.strerror}; give another --out.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); restore it or give another --out.") from error
    before = saved.pop("information", {}) if isinstance(saved, dict) else {}
    # Through JSON, because a tuple comes back as a list and inf as a word.
    found = differences(saved, json.loads(json.dumps(description)))
    if found:
        more = f"; and {len(found) - 6} more" if len(found) > 6 else ""
        raise CheckpointError(
            f"{folder} holds another run: {'; '.join(found[:6])}{more}. "
            "Give the command that run was started with, or another --out."
        )
    changed = differences(before, json.loads(json.dumps(information)))
    return [f"since this run began {line}: losses may differ in the last bits" for line in changed]


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Returns `name was A, is B` for every leaf of two JSON values that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = list(before) + [key for key in now if key not in before]
        found = [differences(before.get(k), now.get(k), f"{name}.{k}" if name else k) for k in keys]
        return [line for lines in found for line in lines]
    return [] if before == now else [f"{name} was {_short(before)}, is {_short(now)}"]


def lock(folder: Path):
    """Returns a file to keep open while the run goes on; CheckpointError if another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: two runs in one folder are not told apart
        return None
    file = (folder / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(
            f"another process is training in {folder}: wait for it or stop it, or give another --out."
        ) from error
    except OSError:  # a file system without locks, such as some network drives
        pass
    return file


def _short(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."

"""Training state in orbax checkpoints: written in the background, complete or not there at all."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from portable.checks import CheckpointError

_TEMPORARY = ".orbax-checkpoint-tmp"  # what orbax calls a folder until every file in it is on the disk


class TrainingCheckpoints:
    """The checkpoints of one run: `folder/<step>/`, the latest few kept.

    A save copies the arrays off the device and returns; files are written by a background thread into a
    temporary folder that is renamed when complete, and only then is the oldest checkpoint removed. A process
    killed at any moment therefore leaves the previous checkpoint whole.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        """Opens or creates the folder; `interrupted` then names the unfinished saves found and removed."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = Path(folder).resolve()  # orbax wants absolute paths
        if "[" in str(self.folder):  # orbax takes the path for a glob, finds nothing to merge and says it is done
            raise CheckpointError(
                f"orbax cannot keep checkpoints below a folder with '[' in its name, got {self.folder}: choose another."
            )
        with _refused(f"the checkpoint folder {folder} cannot be used"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.interrupted = sorted(p.name for p in self.folder.iterdir() if p.name.endswith(_TEMPORARY))
            for name in self.interrupted:
                shutil.rmtree(self.folder / name)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler()}  # named, so that shapes are known before reading
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, state: Any) -> None:
        """Starts writing a checkpoint; waits for the one before it.

        Args:
          step: its number, above every earlier one.
          state: a pytree of arrays; may be donated as soon as this returns.

        Raises:
          CheckpointError: the disk is full or not writable, now or during the previous save. Complete
            checkpoints stay.
        """
        arrays = _flat(state)
        need = sum(x.nbytes for x in arrays.values())
        with self._writing(step):
            self._manager.wait_until_finished()
            free = shutil.disk_usage(self.folder).free
            if free < need:
                raise OSError(f"no space left on device, {need:,} bytes needed and {free:,} free")
            self._manager.save(step, args=self._ocp.args.Composite(state=self._ocp.args.StandardSave(arrays)))

    def wait(self) -> None:
        """Blocks until every save is on the disk; raises what `save` raises."""
        with self._writing(None):
            self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[Any, int, list[str]] | None:
        """Reads the newest checkpoint that can be read.

        Args:
          like: a pytree of arrays or ShapeDtypeStructs with the structure, shapes and dtypes to expect.

        Returns:
          (state with numpy leaves, its step, a sentence about every newer checkpoint that could not be
          read), or None when there is no checkpoint.

        Raises:
          CheckpointError: the newest one belongs to another model or optimizer (all differences are named),
            or none of
          those there can be read.
        """
        notes = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arrays = self._read(step, like)
            except (ValueError, KeyError, OSError) as error:
                if isinstance(error, CheckpointError):
                    raise
                reason = (str(error).splitlines() or [""])[0][:160]
                notes.append(f"checkpoint {self.folder / str(step)} cannot be read ({reason}) and was not used.")
                continue
            leaves = [arrays[name] for name in _flat(like)]
            for newer in [s for s in self._manager.all_steps() if s > step]:
                self._manager.delete(newer)  # or a new save of that step would be refused
            return jax.tree.unflatten(jax.tree.structure(like), leaves), step, notes
        if notes:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read, got: {' '.join(notes)} Delete it.")
        return None

    def close(self) -> None:
        """Ends the background threads; the saves must have been waited for."""
        self._manager.close()

    def _read(self, step: int, like: Any) -> dict[str, np.ndarray]:
        want = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in _flat(like).items()}
        stored = self._manager.item_metadata(step)["state"]
        if stored is None:
            raise OSError("its array files are missing")
        got = {name: (tuple(x.shape), np.dtype(x.dtype)) for name, x in stored.tree.items()}
        if differences := _differences(got, want):
            raise CheckpointError(
                f"checkpoint {self.folder / str(step)} is of another model or optimizer: {differences}; "
                "give the options that run was started with, or another folder."
            )
        # Numpy leaves: orbax then reports a damaged file as ValueError, not as a bare Exception.
        target = {name: np.empty(shape, dtype) for name, (shape, dtype) in want.items()}
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(target))
        with _quiet():
            return self._manager.restore(step, args=args)["state"]

    @contextlib.contextmanager
    def _writing(self, step: int | None) -> Iterator[None]:
        whole = self.latest
        left = f"the checkpoint of step {whole} is complete" if whole is not None else "no checkpoint was complete yet"
        what = f"the checkpoint of step {step}" if step is not None else "the last checkpoint"
        with _quiet(), _refused(f"{what} could not be written to {self.folder}", f"{left}; "):
            yield


def _flat(tree: Any) -> dict[str, Any]:
    """Names every leaf by its path, so that a checkpoint is a flat {name: array} that any orbax reads."""

    def part(key) -> str:
        return str(next(v for a in ("key", "name", "idx") if (v := getattr(key, a, None)) is not None))

    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {".".join(part(key) for key in path): leaf for path, leaf in leaves}


def _differences(got: dict, want: dict, most: int = 4) -> str:
    lines = [f"{name} is missing" for name in want if name not in got]
    lines += [f"{name} is not part of this run" for name in got if name not in want]
    lines += [
        f"{name} is {got[name][1]}{list(got[name][0])}, expected {want[name][1]}{list(want[name][0])}"
        for name in want
        if name in got and got[name] != want[name]
    ]
    more = f" and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


@contextlib.contextmanager
def _refused(what: str, left: str = "") -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
        text = str(error)
        full = any(sign in text.lower() for sign in ("no space left", "file too large", "quota", "os_error_code='28'"))
        reason = "the disk is full" if full else (text.splitlines() or [type(error).__name__])[0][:200]
        do = "free some space" if full else "mend that"
        raise CheckpointError(f"{what}: {reason}; {left}{do} and run the same command again.") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from logging, with tracebacks, the errors that are raised here as one sentence."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)

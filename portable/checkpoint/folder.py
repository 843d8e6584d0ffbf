"""Folders of safetensors files, as on the Hugging Face hub: read by blocks of rows, written atomically."""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from portable.checks import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The dtypes of weights, in numpy's words and in safetensors'.
WORDS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

# Rows are copied out of the mapped file in blocks of at most this many bytes, and the mapping is dropped
# after as
# many: its pages count as memory of the process for as long as it lives.
_BLOCK = 16 * 2**20

HOW_TO_CONVERT = """portable never unpickles a file, as a pickle can run any code. Convert it once with torch:

    import torch
    from safetensors.torch import save_file
    weights = torch.load("pytorch_model.bin", map_location="cpu", weights_only=True)
    save_file({name: w.clone().contiguous() for name, w in weights.items()}, "model.safetensors")

and put config.json beside model.safetensors."""


class Entry(NamedTuple):
    """One tensor of a checkpoint: its file, its dtype in safetensors' words (F32, BF16, ...), its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder; nothing but their names is read until asked for.

    Attributes:
      folder: where they lie.
      entries: the tensors by name.

    Raises:
      CheckpointError: no safetensors file, a truncated or foreign one, or an index that does not fit them.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = folder = Path(folder)
        self.entries: dict[str, Entry] = {}
        self._mapped: dict[Path, Any] = {}
        self._copied = 0
        files, index = _files(folder)
        for file in files:
            opened = self._open(file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                self.entries[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
        self._mapped.clear()
        absent = [f"{name} ({file})" for name, file in index.items() if name not in self.entries]
        if absent:
            raise CheckpointError(
                f"{folder / INDEX} names tensors that its files do not hold: {', '.join(absent)}; "
                "download or save the checkpoint again."
            )

    def rows(self, name: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields rows start:stop of a tensor as (first row, array), some megabytes at a time."""
        entry = self.entries[name]
        if not entry.shape:
            yield 0, np.atleast_1d(self._open(entry.file).get_tensor(name))
            return
        step = max(1, _BLOCK // max(1, 8 * math.prod(entry.shape[1:])))
        for row in range(start, stop, step):
            block = self._open(entry.file).get_slice(name)[row : min(row + step, stop)]
            yield row, block
            self._copied += block.nbytes
            if self._copied >= _BLOCK:
                self._mapped.clear()
                self._copied = 0

    def _open(self, file: Path) -> Any:
        if file not in self._mapped:
            from safetensors import SafetensorError, safe_open

            try:
                self._mapped[file] = safe_open(file, framework="numpy")
            except (SafetensorError, OSError) as fault:
                raise CheckpointError(
                    f"{file} cannot be read as safetensors: it is truncated or something else ({fault}); "
                    "download or save it again."
                ) from fault
        return self._mapped[file]


def _files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Returns the files to read and {tensor: file name} where an index says so."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
            raise CheckpointError(f'{folder / INDEX} has no "weight_map" of tensor names to files; save it again.')
        names = sorted(set(index.values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{folder / INDEX} names files outside its folder: {', '.join(outside)}.")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(names)} files that its index names: "
                f"{', '.join(missing)}; download or copy them too."
            )
        return [folder / name for name in names], index
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found, {}
    if found:
        raise CheckpointError(
            f"{folder} holds several safetensors files and no {INDEX} to say which belong together: "
            f"{', '.join(file.name for file in found)}."
        )
    if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        raise CheckpointError(f"{folder} holds weights only as pickle: {', '.join(pickles)}. {HOW_TO_CONVERT}")
    raise CheckpointError(f"{folder} holds no safetensors file; it has {_listing(folder)}.")


def _listing(folder: Path) -> str:
    return ", ".join(sorted(file.name for file in folder.iterdir())) or "no file at all"


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; CheckpointError if there is no file, no JSON or no object."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}; it has {_listing(file.parent)}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise CheckpointError(f"{file} is not JSON ({fault}); download or save it again.") from fault
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(found).__name__}.")
    return found


class Source(NamedTuple):
    """A tensor to write: described beforehand, fetched in its turn, so that one at a time is in memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Source], max_shard_size: int) -> None:
    """Writes config.json and the tensors: one file or, beyond `max_shard_size` bytes, several and an index.

    Every file is written beside its place, forced to the disk and renamed. Readers go by one of the renames
    alone, so a process killed at any moment leaves the weights that were there or the new ones, never a
    mixture, and a full disk leaves everything as it was.

    Raises:
      CheckpointError: the folder cannot be written.
    """
    shards = _shards(tensors, max_shard_size)
    replaced = _indexed(folder)
    names = [SINGLE]
    if len(shards) > 1:
        names = _shard_names("model", len(shards))
        # Readers go by the old index until the new one is in place, so the files it names stay untouched.
        names = _shard_names("model_b", len(shards)) if replaced & set(names) else names
    partial = {folder / name: folder / f".{name}.partial" for name in (*names, "config.json", INDEX)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            _write_tensors(partial[folder / name], shard)
        _write_json(partial[folder / "config.json"], config)
        if len(shards) > 1:
            weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
            size = sum(source.nbytes for source in tensors.values())
            _write_json(partial[folder / INDEX], {"metadata": {"total_size": size}, "weight_map": weight_map})
            final = [*names, "config.json", INDEX]
        else:
            final = ["config.json", SINGLE]
        for name in final:
            os.replace(partial[folder / name], folder / name)
        # Of a single file and an index readers take the single file, so it goes first.
        for name in (SINGLE, INDEX, *sorted(replaced)):
            if name not in final:
                (folder / name).unlink(missing_ok=True)
    except OSError as fault:
        raise CheckpointError(
            f"cannot write {folder}: {fault.strerror or fault}; the weights that were there are unchanged."
        ) from fault
    finally:
        for file in partial.values():
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _shards(tensors: Mapping[str, Source], limit: int) -> list[dict[str, Source]]:
    shards: list[dict[str, Source]] = [{}]
    size = 0
    for name, source in tensors.items():
        if shards[-1] and size + source.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = source
        size += source.nbytes
    return shards


def _shard_names(stem: str, count: int) -> list[str]:
    return [f"{stem}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _indexed(folder: Path) -> set[str]:
    """The files of the index in a folder, if it has a readable one."""
    with contextlib.suppress(CheckpointError):
        weight_map = read_json(folder / INDEX).get("weight_map") if (folder / INDEX).is_file() else None
        if isinstance(weight_map, dict):
            return {name for name in weight_map.values() if isinstance(name, str) and Path(name).name == name}
    return set()


def _write_tensors(file: Path, tensors: Mapping[str, Source]) -> None:
    # Wider elements first keeps every tensor aligned to its own elements.
    ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for name, source in ordered:
        span = [offset, offset + source.nbytes]
        header[name] = {"dtype": WORDS[source.dtype.name], "shape": list(source.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, source in ordered:
            out.write(np.ascontiguousarray(source.fetch()).reshape(-1).view(np.uint8).data)
        out.flush()
        os.fsync(out.fileno())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.write(json.dumps(content, indent=2, allow_nan=False) + "\n")
        out.flush()
        os.fsync(out.fileno())

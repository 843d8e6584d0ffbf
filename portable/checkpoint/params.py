"""Puts the tensors of a checkpoint into a model, and takes them out again, by a weight map."""

import functools
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable.checkpoint.folder import WORDS, Checkpoint, Source
from portable.checkpoint.weight_map import Block, Tensor, WeightMap
from portable.checks import CheckpointError

Model = TypeVar("Model", bound=nnx.Module)
_DTYPES = {word: jnp.dtype(name) for name, word in WORDS.items()}


class Mismatch(NamedTuple):
    """One tensor that does not fit the model, as it is told to the user."""

    kind: str
    name: str
    expected: str = ""
    got: str = ""

    def __str__(self) -> str:
        told = [f"expected {self.expected}"] * bool(self.expected) + [f"got {self.got}"] * bool(self.got)
        return f"  {self.kind:<11} {self.name}: {', '.join(told)}"


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's parameters by dotted path, of an abstract model too."""
    return {path: value.shape for path, value in _params(model).items()}


def load_params(
    build: Callable[[jnp.dtype], Model],
    checkpoint: Checkpoint,
    weight_map: WeightMap,
    *,
    dtype: jnp.dtype | None = None,
    compute_dtype: jnp.dtype | None = None,
    strict: bool = True,
) -> Model:
    """Builds a model from a checkpoint without initialising what the checkpoint holds.

    Arrays go to the device one by one, the largest first, each assembled in one host buffer.

    Args:
      build: the model for a compute dtype; only traced, unless parameters are missing and `strict` is False.
      checkpoint: where the tensors are.
      weight_map: of the model and the checkpoint's format.
      dtype: of the parameters; None keeps each as it is in the file.
      compute_dtype: None: `dtype`, or that of most of the file's bytes.
      strict: False turns missing and unexpected tensors into a warning; missing ones are initialised.

    Raises:
      CheckpointError: tensors do not fit; all of them are named.
    """
    compute = compute_dtype or dtype or jax.dtypes.canonicalize_dtype(_main_dtype(checkpoint))
    abstract = nnx.eval_shape(lambda: build(compute))
    found, mismatches = _match(weight_map, shapes(abstract), checkpoint)
    _report(mismatches, checkpoint, type(abstract).__name__, strict)

    parts: dict[str, list[tuple[Tensor, Block]]] = {}
    for tensor in found.values():
        for block in tensor.blocks:
            parts.setdefault(block.path, []).append((tensor, block))
    names = {tensor.name: name for name, tensor in found.items()}
    graphdef, state = nnx.split(abstract)
    variables = {_dotted(path): (path, variable) for path, variable in nnx.to_flat_state(state)}
    not_finite: set[str] = set()

    def read(path: str) -> jax.Array:
        kept = _DTYPES[checkpoint.entries[names[parts[path][0][0].name]].dtype]
        wanted = jax.dtypes.canonicalize_dtype(dtype or kept)
        array = _aligned(variables[path][1].shape, wanted)
        for tensor, block in parts[path]:
            name, view = names[tensor.name], tensor.view(array, block)
            for place, part in _parts(checkpoint, name, tensor, block):
                view[place] = part
                if not np.isfinite(part).all():
                    not_finite.add(name)
        return jax.block_until_ready(jax.device_put(array))

    # The largest first: whatever its buffer costs beside its place on the device, the rest is not there yet.
    order = sorted(parts, key=lambda path: -int(np.prod(variables[path][1].shape)))
    values = {variables[path][0]: read(path) for path in order}
    if not_finite:
        warnings.warn(
            f"{checkpoint.folder}: NaN or infinity in {', '.join(sorted(not_finite))}; is the file damaged?",
            stacklevel=3,
        )
    values |= _initialised(lambda: build(compute), [path for path, _ in variables.values() if path not in values])
    filled = [(path, variable.replace(values[path])) for path, variable in variables.values()]
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def tensors_of(model: nnx.Module, weight_map: WeightMap) -> dict[str, Source]:
    """Returns the tensors of a model's checkpoint, each fetched from the device only when it is asked for."""
    params = _params(model)

    @functools.lru_cache(maxsize=1)  # tensors of one stacked parameter follow each other: one transfer for all
    def array(path: str) -> np.ndarray:
        return np.asarray(params[path].get_value())

    def source(tensor: Tensor) -> Source:
        def fetch() -> np.ndarray:
            views = [tensor.view(array(block.path), block) for block in tensor.blocks]
            if len(views) == 1:
                return views[0]
            joined = np.empty(tensor.shape, views[0].dtype)
            for block, view in zip(tensor.blocks, views, strict=True):
                joined[_at(block.axis, block.places(tensor.shape[block.axis]))] = view
            return joined

        return Source(np.dtype(params[tensor.blocks[0].path].dtype), tensor.shape, fetch)

    return {tensor.name: source(tensor) for tensor in weight_map.tensors(shapes(model))}


def _parts(checkpoint: Checkpoint, name: str, tensor: Tensor, block: Block) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields a parameter's part of a tensor as (where it lies in the parameter's view, values), in pieces."""
    length = tensor.shape[block.axis] if tensor.shape else 1
    if not block.axis and block.period == length:  # rows in one run: no other rows are read
        for row, rows in checkpoint.rows(name, block.start, block.stop):
            yield slice(row - block.start, row - block.start + len(rows)), rows
        return
    places = block.places(length)
    for row, rows in checkpoint.rows(name, 0, tensor.shape[0]):
        if block.axis:
            yield slice(row, row + len(rows)), rows[_at(block.axis, places)]
        else:
            here = np.flatnonzero((places >= row) & (places < row + len(rows)))
            yield here, rows[places[here] - row]


def _at(axis: int, places: Any) -> tuple:
    return (*[slice(None)] * axis, places)


def _params(model: nnx.Module) -> dict[str, nnx.Variable]:
    """What a checkpoint holds: Params, and other variables that are not the state of a random generator."""
    held = nnx.Not(nnx.RngState)
    return {_dotted(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, held))}


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def _main_dtype(checkpoint: Checkpoint) -> jnp.dtype:
    """The dtype of most of a checkpoint's bytes."""
    sizes: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + int(np.prod(entry.shape))
    return _DTYPES.get(max(sizes, key=sizes.__getitem__, default="F32"), _DTYPES["F32"])


def _aligned(shape: tuple[int, ...], dtype: jnp.dtype) -> np.ndarray:
    """An uninitialised array that a CPU device takes over as it is, instead of copying it."""
    size = dtype.itemsize * int(np.prod(shape))
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _match(
    weight_map: WeightMap, expected: Mapping[str, tuple[int, ...]], checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], list[Mismatch]]:
    """Returns the tensors found, by their names in the file, and all that does not fit."""
    found: dict[str, Tensor] = {}
    mismatches = []
    spelled: dict[str, str] = {}
    for tensor in weight_map.tensors(expected):
        name = next((n for n in (tensor.name, *tensor.also) if n in checkpoint.entries), None)
        if name is None:
            mismatches.append(Mismatch("missing", tensor.name, str(list(tensor.shape))))
            continue
        found[name], spelled[tensor.name] = tensor, name
        _, dtype, shape = checkpoint.entries[name]
        if shape != tensor.shape:
            mismatches.append(Mismatch("wrong shape", name, str(list(tensor.shape)), str(list(shape))))
        if dtype not in _DTYPES:
            mismatches.append(Mismatch("wrong dtype", name, f"one of {', '.join(_DTYPES)}", dtype))
    for name, entry in checkpoint.entries.items():
        if name in found:
            continue
        if weight_map.ignored and re.fullmatch(weight_map.ignored, name):
            continue
        original = spelled.get(weight_map.repeats.get(name, ""))
        if original is None:
            mismatches.append(Mismatch("unexpected", name, "", f"{entry.dtype} {list(entry.shape)}"))
        elif not _equal(checkpoint, name, original):
            mismatches.append(Mismatch("wrong copy", name, f"the values of {original}", "others"))
    return found, mismatches


def _equal(checkpoint: Checkpoint, name: str, other: str) -> bool:
    one, two = checkpoint.entries[name], checkpoint.entries[other]
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    rows = one.shape[0] if one.shape else 1
    pairs = zip(checkpoint.rows(name, 0, rows), checkpoint.rows(other, 0, rows), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for (_, a), (_, b) in pairs)


def _report(mismatches: list[Mismatch], checkpoint: Checkpoint, model: str, strict: bool) -> None:
    """Raises one error on everything that does not fit, or warns where `strict` is off and that is enough."""
    mild = {"missing", "unexpected"}
    forgiven = [m for m in mismatches if m.kind in mild]
    if len(forgiven) < len(mismatches) or (strict and mismatches):
        hint = " strict=False would ignore the missing and the unexpected." if forgiven else ""
        raise CheckpointError(
            f"{checkpoint.folder}: {len(mismatches)} tensors do not fit the {model} of its config.json; "
            f"use the config of these weights.{hint}\n" + "\n".join(map(str, mismatches))
        )
    if forgiven:
        warnings.warn(
            f"{checkpoint.folder}: {len(forgiven)} tensors ignored; missing ones are initialised at random:\n"
            + "\n".join(map(str, forgiven)),
            stacklevel=4,
        )


def _initialised(build: Callable[[], nnx.Module], paths: list[tuple]) -> dict[tuple, jax.Array]:
    """Initialises only the variables at `paths`: compiled, so that the others are never computed."""
    if not paths:
        return {}

    @jax.jit
    def some() -> list[jax.Array]:
        variables = dict(nnx.to_flat_state(nnx.state(build())))
        return [variables[path].get_value() for path in paths]

    return dict(zip(paths, some(), strict=True))

"""Weights that an adapter trains whole, in PEFT's files."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable.adapters import names
from portable.checkpoint import WeightMap
from portable.checkpoint.weight_map import Tensor

# What PEFT writes before a tensor's name.
PREFIX = "base_model.model."


def write_saved(tensors: dict, model: nnx.Module, saved: dict[str, Any], weight_map: WeightMap | None) -> list[str]:
    """Adds the weights that are trained whole; returns the modules they belong to."""
    owners = []
    for tensor in names.tensors(model, weight_map) if saved else ():
        if not any(block.path in saved for block in tensor.blocks):
            continue
        tensors[PREFIX + tensor.name] = _joined(tensor, saved)
        owners.append(names.module_of(tensor.name))
    return list(dict.fromkeys(owners))


def read_whole(
    model: nnx.Module, whole: dict[str, np.ndarray], trained: Any, weight_map: WeightMap | None
) -> tuple[dict, list[str]]:
    """Returns {path: value} of weights trained whole, and a line for each tensor that does not fit.

    PEFT may also write the frozen weight of an adapted embedding, which then must be the model's.
    """
    known = {t.name: t for t in names.tensors(model, weight_map)} if whole else {}
    values, problems = {}, []
    shapes = names.shapes(model) if whole else {}
    for key, array in whole.items():
        tensor = known.get(key)
        if tensor is None:
            problems.append(f"  unknown     {key}")
        elif tensor.shape != array.shape:
            problems.append(f"  wrong shape {key}: expected {list(tensor.shape)}, got {list(array.shape)}")
        else:
            if not any(names.module_of(key) == m or names.module_of(key).endswith(f".{m}") for m in trained):
                if not np.array_equal(
                    array, _joined(tensor, {b.path: _variable(model, b.path) for b in tensor.blocks})
                ):
                    problems.append(f"  other value {key}: the file has another one than the model")
                continue
            for block in tensor.blocks:
                target = values.setdefault(block.path, np.zeros(shapes[block.path], np.float32))
                places = (*[slice(None)] * block.axis, block.places(array.shape[block.axis] if array.shape else 1))
                tensor.view(target, block)[...] = np.atleast_1d(array)[places]
    return values, problems


def _joined(tensor: Tensor, variables: Any) -> np.ndarray:
    """Returns a tensor's values from variables by path."""
    out = np.zeros(tensor.shape, np.float32)
    for block in tensor.blocks:
        array = np.asarray(variables[block.path].get_value(), np.float32)
        places = (*[slice(None)] * block.axis, block.places(tensor.shape[block.axis] if tensor.shape else 1))
        out[places] = tensor.view(array, block)
    return out


def _variable(model: Any, path: str) -> Any:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def set_whole(model: nnx.Module, values: dict[str, np.ndarray]) -> None:
    for path, array in values.items():
        variable = _variable(model, path)
        variable.set_value(jnp.asarray(array, variable.get_value().dtype))

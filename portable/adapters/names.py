"""What a model's weights are called in its checkpoint, and so in PEFT's files."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx

from portable.adapters.matching import dotted, matrix_sizes, modules
from portable.checkpoint import Rule, WeightMap, same, transposed
from portable.checkpoint.weight_map import Tensor
from portable.models import MODELS
from portable.models.language_model import LanguageModel

# What adapters put beside a layer's own attributes.
_OWN = {"adapters", "bank", "rows", "saved"}


def shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a model's own weights by path, whatever adapters it has; stacked layers must be lists."""
    held = nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
    return {".".join(map(str, path)): v.get_value().shape for path, v in held if not _OWN & set(map(str, path))}


def weight_map(model: nnx.Module) -> WeightMap:
    """Returns the weight map of a model of `portable.models`; of another one torch's names at the same paths."""
    family = next((family for family in MODELS.values() if isinstance(model, family.model)), None)
    if family is not None:
        config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
        return family.weight_map("transformers" if "transformers" in config.formats else config.formats[0], config)
    found = {dotted(path): module for path, module, _ in modules(model)}
    rules = []
    for path in shapes(model):
        owner, _, leaf = path.rpartition(".")
        name = {"kernel": "weight", "embedding": "weight", "scale": "weight"}.get(leaf, leaf)
        layout = _layout(found[owner]) if leaf == "kernel" else same
        rules.append(Rule(f"{owner}.{name}" if owner else name, path, layout))
    return WeightMap(tuple(rules))


def _layout(layer: Any) -> Callable:
    """Returns how torch holds the kernel of a layer."""
    if isinstance(layer, nnx.Conv):
        return lambda x: x.transpose(x.ndim - 1, x.ndim - 2, *range(x.ndim - 2))
    if isinstance(layer, nnx.LinearGeneral | nnx.Einsum):
        d, o = matrix_sizes(layer)
        return lambda x: x.reshape(d, o).T
    return transposed


def tensors(model: nnx.Module, given: WeightMap | None = None) -> list[Tensor]:
    """Returns the tensors of a model's checkpoint, each with the weights that it holds."""
    return (given or weight_map(model)).tensors(shapes(model))


def module_of(tensor: str) -> str:
    """Returns the module that a tensor belongs to, by PEFT's use of names."""
    return tensor.removesuffix(".weight").removesuffix(".bias")


def aliases(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Returns the checkpoint's modules, by the path of each weight; none for a model that is not the library's."""
    found: dict[str, list[str]] = {}
    for path, name in _pairs(model):
        found.setdefault(path, []).append(name)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def module_aliases(model: nnx.Module) -> dict[str, tuple[str, ...]]:
    """Returns the same by the paths of modules."""
    found: dict[str, list[str]] = {}
    for path, name in _pairs(model):
        found.setdefault(path.rpartition(".")[0], []).append(name)
    return {path: tuple(dict.fromkeys(names)) for path, names in found.items()}


def _pairs(model: nnx.Module) -> Iterator[tuple[str, str]]:
    if not any(isinstance(model, family.model) for family in MODELS.values()):
        return
    for tensor in tensors(model):
        for block in tensor.blocks:
            yield block.path, module_of(tensor.name)


def check_tied(model: nnx.Module) -> None:
    """Raises ValueError where an adapted embedding is the head too."""
    if isinstance(model, LanguageModel) and model.head is None and hasattr(model.embed, "adapters"):
        raise ValueError(
            "merge: the embedding has an adapter and is the head too, which the adapter leaves as it was; leave the "
            "embedding out of target_modules, or keep the adapter apart."
        )

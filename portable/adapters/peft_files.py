"""Adapters to and from PEFT's folders: adapter_config.json and adapter_model.safetensors."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable import nn
from portable.adapters import names
from portable.adapters.config import DoRAConfig, LoRAConfig, ends
from portable.adapters.kinds import Adapted, is_low_rank
from portable.adapters.low_rank import LowRank, value
from portable.adapters.matching import Target, candidates
from portable.adapters.peft_config import from_peft, to_peft
from portable.adapters.peft_whole import PREFIX, read_whole, set_whole, write_saved
from portable.adapters.saved import save_modules, saved_weights
from portable.adapters.surgery import activate, active, adapted_layers, attach, check_name, low_rank, unstacked
from portable.checkpoint import Checkpoint, WeightMap, locate, read_json
from portable.checkpoint.weight_map import Block, Tensor
from portable.checks import CheckpointError, ConfigError
from portable.files import replace

_ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "m",
    ".lora_magnitude_vector.weight": "m",
}


class _Part(NamedTuple):
    """One of our weights in one of the checkpoint's modules: rows of its output, of one expert or of none."""

    target: Target
    block: Block
    tensor: Tensor


def save_peft(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    weight_map: WeightMap | None = None,
    base_model: str | None = None,
) -> None:
    """Writes an adapter as PEFT does, so that PEFT loads it for the same model in torch.

    A fused projection of the checkpoint, whose blocks are layers of their own here, is written as one: exactly so where
    the blocks' A are equal, else with their ranks side by side. Experts are written one by one, as linear layers.

    Args:
      model: with adapters by low rank.
      folder: is created if need be.
      name: of the adapter; None for the active one.
      weight_map: what the weights are called in torch; None takes that of a model of `portable.models`, and the same
        paths for others.
      base_model: folder or hub id of the model, for PEFT's AutoPeftModel.

    Raises:
      ValueError: there is no such adapter, or it is not LoRA or DoRA.
      CheckpointError: the folder cannot be written.
    """
    name = active(model) if name is None else name
    if name is None:
        raise ValueError("save_peft: the model has no active adapter; activate one, or give its name.")
    if any(layer.bank is not None for _, layer, _ in adapted_layers(model)):
        raise ValueError("save_peft: rows of this view have adapters of their own; save the model it was made of.")
    with unstacked(model):
        modules = _modules(model, weight_map)
        adapters = {
            (id(t.layer), t.slot): t.layer.adapters[t.slot][name]
            for parts in modules.values()
            for t in {id(p.target): p.target for p in parts}.values()
            if isinstance(t.layer, Adapted) and name in t.layer.adapters.get(t.slot, {})
        }
        if not adapters:
            raise ValueError(f"save_peft: the model has no adapter called {name!r} on weights that its checkpoint has.")
        if not all(map(is_low_rank, adapters.values())):
            raise ValueError(f"save_peft: PEFT's format holds LoRA and DoRA; {name!r} is another kind.")
        lost = [
            t.names[0]
            for t in candidates(model)
            if isinstance(t.layer, Adapted) and name in t.layer.adapters.get(t.slot, {})
            if (id(t.layer), t.slot) not in adapters
        ]
        if lost:
            raise ValueError(
                f"save_peft: PEFT has no linear layer for {', '.join(lost)}: the checkpoint holds all experts in one "
                "tensor, or has no such weight. Leave them out of the adapter, or give a weight_map that names them."
            )
        config = next(iter(adapters.values())).config
        tensors: dict[str, np.ndarray] = {}
        targets, ranks, alphas = [], {}, {}
        for module, parts in modules.items():
            own = [adapters.get((id(p.target.layer), p.target.slot)) for p in parts]
            if any(a is not None for a in own):
                rank, scale = _write(tensors, module, parts, own)
                targets.append(module)
                alpha = scale * (rank**0.5 if config.rslora else rank)
                same = abs(alpha - config.alpha) <= 1e-9 * abs(config.alpha)
                ranks[module], alphas[module] = rank, config.alpha if same else alpha
        saved = saved_weights(model, name)  # pyright: ignore[reportArgumentType]
        owners = write_saved(tensors, model, saved, weight_map)
    patterns = _patterns(ranks, config.rank), _patterns(alphas, config.alpha)
    content = to_peft(config, targets, *patterns, owners, base_model)
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        from safetensors.numpy import save

        arrays = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
        replace(folder / "adapter_model.safetensors", save(arrays, metadata={"format": "pt"}))
        replace(folder / "adapter_config.json", json.dumps(content, indent=2) + "\n")
    except OSError as fault:
        raise CheckpointError(f"save_peft: {folder} cannot be written: {fault.strerror or fault}.") from fault


def load_peft(
    model: nnx.Module,
    folder_or_hub_id: str | os.PathLike[str],
    *,
    name: str = "default",
    weight_map: WeightMap | None = None,
) -> list[str]:
    """Puts an adapter that PEFT wrote into a model, in place, and makes it the active one.

    Args:
      model: the adapter's base model.
      folder_or_hub_id: with adapter_config.json and adapter_model.safetensors.
      name: of the adapter in the model. weight_map: as for `save_peft`.

    Returns:
      The names of what was adapted.

    Raises:
      CheckpointError: a file is missing or damaged, an adapter is for another model (everything that does not fit is
        listed), or holds NaN.
      ConfigError: it uses options that are not supported; they are named.
      ValueError: the model has an adapter of this name.
    """
    check_name(model, name)
    folder = locate(folder_or_hub_id)
    given = read_json(folder / "adapter_config.json")
    config = from_peft(given, str(folder / "adapter_config.json"))
    tensors, broken = _read(folder)
    if broken:
        raise CheckpointError(f"{folder}: NaN or infinity in {', '.join(sorted(broken))}; save the adapter again.")
    found, whole = _sorted(tensors)
    with unstacked(model):
        modules = _modules(model, weight_map)
        problems = [f"  unknown     {module}" for module in sorted(found.keys() - modules.keys())]
        made: list[tuple[Target, LowRank]] = []
        for module, factors in found.items():
            if module in modules:
                problems += _fit(module, modules[module], factors, config)
        values, misfits = read_whole(model, whole, config.modules_to_save or (), weight_map)
        problems += misfits
        if problems or not found:
            listed = "\n".join(problems) or "  it holds no factors"
            raise CheckpointError(f"{folder}: the adapter is for another model than this one:\n{listed}")
        for parts, factors in _by_layer(modules, found):
            made.append((parts[0].target, _attached(config, parts, factors)))
        if values:
            save_modules(model, config, name)
        for target, adapter in made:
            attach(target, name, adapter)
        activate(model, name)
        set_whole(model, values)
    return [target.names[0] for target, _ in made]


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Returns the entries of a pattern: what is not the default, and the modules that such an entry would match too.

    The first entry that ends a name counts, so longer names come first.
    """
    other = {module: x for module, x in values.items() if x != default}
    other |= {m: x for m, x in values.items() if any(ends(re.escape(entry), m) for entry in other)}
    return {re.escape(module): other[module] for module in sorted(other, key=len, reverse=True)}


def _modules(model: nnx.Module, weight_map: WeightMap | None) -> dict[str, list[_Part]]:
    """Returns, by PEFT's names, the modules that can have adapters, each with its weights in the order of rows."""
    where = {}
    for target in candidates(model):
        path = target.names[0]
        path = path if isinstance(target.layer, nn.MoE) else f"{path}.{target.slot}"
        where[path] = target
    found: dict[str, list[_Part]] = {}
    for tensor in names.tensors(model, weight_map):
        own = [where[block.path] for block in tensor.blocks if block.path in where]
        if len(own) < len(tensor.blocks) or not tensor.name.endswith(".weight"):
            continue
        if not any(isinstance(t.layer, nn.MoE) and b.index is None for t, b in zip(own, tensor.blocks, strict=True)):
            found[names.module_of(tensor.name)] = [_Part(where[b.path], b, tensor) for b in tensor.blocks]
    return found


def _places(part: _Part) -> np.ndarray:
    """Returns the rows of the tensor that are this weight's outputs."""
    return part.block.places(part.tensor.shape[part.block.axis])


def _factor(array: Any, index: int | None) -> np.ndarray:
    array = np.asarray(array)
    return array if index is None else array[index]


def _write(tensors: dict, module: str, parts: list[_Part], own: list) -> tuple[int, float]:
    """Adds a module's factors; returns their rank and scale."""
    real = [(p, a) for p, a in zip(parts, own, strict=True) if a is not None]
    lefts = [_factor(value(a.a), p.block.index).T for p, a in real]
    scale = real[0][1].scale
    alike = all(left.shape == lefts[0].shape and np.array_equal(left, lefts[0]) for left in lefts)
    alike = alike and all(a.scale == scale for _, a in real)
    rank = len(lefts[0]) if alike else sum(map(len, lefts))
    embedding = isinstance(parts[0].target.layer, nnx.Embed)
    rows = parts[0].tensor.shape[1 if embedding else parts[0].block.axis]
    right = np.zeros((rows, rank), lefts[0].dtype)
    magnitude = np.zeros(rows, np.float32)
    for part, adapter in zip(parts, own, strict=True):
        if adapter is None:  # a block without an adapter in a module with one: its own norms, and no update
            w = np.asarray(part.target.kind.matrix(part.target.layer, part.target.slot), np.float32)
            magnitude[_places(part)] = np.linalg.norm(_factor(w, part.block.index), axis=0)
    start = 0
    for part, adapter in real:
        places = np.arange(rows) if embedding else _places(part)
        b = _factor(value(adapter.b), part.block.index).T * (adapter.scale / scale)
        columns = np.arange(rank) if alike else np.arange(start, start + b.shape[1])
        right[np.ix_(places, columns)] = b
        start += b.shape[1]
        if adapter.magnitude is not None:
            magnitude[places] = _factor(value(adapter.magnitude), part.block.index)
    left = lefts[0] if alike else np.concatenate(lefts)
    path = PREFIX + module
    layer = parts[0].target.layer
    if isinstance(layer, nnx.Conv):
        k = layer.kernel_size
        left = left.reshape(rank, *k, -1).transpose(0, len(k) + 1, *range(1, len(k) + 1))
        right = right.reshape(*right.shape, *[1] * len(k))
        magnitude = magnitude.reshape(1, -1, *[1] * len(k))
    if embedding:
        tensors |= {f"{path}.lora_embedding_A": left, f"{path}.lora_embedding_B": right}
    else:
        tensors |= {f"{path}.lora_A.weight": left, f"{path}.lora_B.weight": right}
    if real[0][1].magnitude is not None:
        tensors[f"{path}.lora_magnitude_vector"] = magnitude
    return rank, scale


def _read(folder: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the tensors of the file, and the names of those that are not finite."""
    source = Checkpoint(folder)
    tensors, broken = {}, []
    for key, entry in source.entries.items():
        rows = [part for _, part in source.rows(key, 0, entry.shape[0] if entry.shape else 1)]
        tensors[key] = np.concatenate(rows) if rows else np.zeros(entry.shape, np.float32)
        if not np.isfinite(tensors[key].astype(np.float32)).all():
            broken.append(key)
    return tensors, broken


def _sorted(tensors: dict[str, np.ndarray]) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Returns {module: its factors a, b, m} and {tensor: a weight that was trained whole}."""
    found: dict[str, dict[str, np.ndarray]] = {}
    whole = {}
    for key, array in tensors.items():
        bare = key.removeprefix(PREFIX)
        end = next((end for end in _ENDS if bare.endswith(end)), None)
        if end is None:
            for part in (".modules_to_save.default", ".modules_to_save", ".base_layer"):
                bare = bare.replace(part, "")
            whole[bare] = array
        else:
            found.setdefault(bare.removesuffix(end), {})[_ENDS[end]] = array
    return found, whole


def _fit(module: str, parts: list[_Part], factors: dict[str, np.ndarray], config: LoRAConfig) -> list[str]:
    """Returns a line for everything about a module's factors that does not fit."""
    wanted = {"a", "b", "m"} if isinstance(config, DoRAConfig) else {"a", "b"}
    if wanted != factors.keys():
        listed = {"a": "lora_A", "b": "lora_B", "m": "lora_magnitude_vector"}
        missing = [listed[k] for k in sorted(wanted - factors.keys())] or ["nothing"]
        more = [listed[k] for k in sorted(factors.keys() - wanted)]
        return [f"  incomplete  {module}: lacks {', '.join(missing)}" + (f", has {', '.join(more)}" if more else "")]
    rank, lines = factors["a"].shape[0], []
    shape = parts[0].tensor.shape
    if isinstance(parts[0].target.layer, nnx.Embed):
        expected = {"a": (rank, shape[0]), "b": (shape[1], rank), "m": (shape[1],)}
    else:
        ones = (1,) * (len(shape) - 2)
        expected = {"a": (rank, *shape[1:]), "b": (shape[0], rank, *ones)}
        expected["m"] = (1, shape[0], *ones) if ones else (shape[0],)
    for key in sorted(wanted):
        if factors[key].shape != expected[key]:
            lines.append(
                f"  wrong shape {module} ({'lora_A' if key == 'a' else 'lora_B' if key == 'b' else 'magnitude'}): "
                f"expected {list(expected[key])}, got {list(factors[key].shape)}"
            )
    most = min(shape[0], int(np.prod(shape[1:])))
    if rank < 1 or rank > most:
        lines.append(f"  wrong rank  {module}: expected 1 to {most}, got {rank}")
    elif rank != config.rank_of(module):  # its scale would be another
        lines.append(f"  wrong rank  {module}: adapter_config.json says {config.rank_of(module)}, got {rank}")
    return lines


def _by_layer(modules: dict[str, list[_Part]], found: dict) -> list[tuple[list[_Part], list[tuple[str, dict]]]]:
    """Groups the parts by our weights: of experts there is one for each, of other layers one."""
    groups: dict[tuple[int, str], tuple[list[_Part], list]] = {}
    for module, factors in found.items():
        for part in modules[module]:
            parts, own = groups.setdefault((id(part.target.layer), part.target.slot), ([], []))
            parts.append(part)
            own.append((module, factors))
    return list(groups.values())


def _attached(config: LoRAConfig, parts: list[_Part], own: list[tuple[str, dict]]) -> LowRank:
    """Returns the adapter of one of our weights from the factors of the modules that hold it."""
    target = parts[0].target
    w, axes = target.kind.matrix(target.layer, target.slot), target.kind.axes(target.layer, target.slot)
    made, scales = [], set()
    for part, (module, factors) in zip(parts, own, strict=True):
        a, b, m = factors["a"], factors["b"], factors.get("m")
        rank = len(a)
        if isinstance(target.layer, nnx.Embed):
            places = np.arange(b.shape[0])
        else:
            places = _places(part)
        if isinstance(target.layer, nnx.Conv):
            k = a.ndim - 2
            a = a.transpose(0, *range(2, 2 + k), 1).reshape(rank, -1)
        b = b.reshape(b.shape[0], rank)[places].T
        scales.add(config.scale(rank, config.alpha_of(module)))
        made.append((a.T, b, None if m is None else m.reshape(-1)[places]))
    if len({a.shape for a, _, _ in made}) > 1 or len(scales) > 1:
        raise ConfigError(
            f"{target.names[0]}: its experts have adapters of different ranks or alphas; make them alike."
        )
    a, b, m = made[0]
    if parts[0].block.index is not None:
        a, b = np.zeros((*w.shape[:-2], *a.shape), a.dtype), np.zeros((*w.shape[:-2], *b.shape), b.dtype)
        m = None if m is None else np.array(jnp.linalg.norm(w.astype(jnp.float32), axis=-2))
        for part, (left, right, size) in zip(parts, made, strict=True):
            a[part.block.index], b[part.block.index] = left, right
            if m is not None:
                m[part.block.index] = size
    m = None if m is None else jnp.asarray(m, jnp.float32)
    return low_rank(config, w, a, b, m, scales.pop(), axes)

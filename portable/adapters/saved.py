"""Modules that an adapter trains whole (PEFT's modules_to_save): their weights stay in place, the model's own wait."""

import re
from typing import Any

from flax import nnx

from portable.adapters import names as weights
from portable.adapters.config import AdapterConfig
from portable.adapters.matching import dotted, modules, nearest_names
from portable.adapters.variables import AdapterParam, StoredParam


def save_modules(model: nnx.Module, config: AdapterConfig | None, name: str | None) -> list[str]:
    """Turns the weights of modules_to_save into what is trained, in place; returns the names of the modules.

    Without a config the copies of `name` are dropped, or, without a name, the weights in use become the model's own.

    Raises:
      ValueError: a name fits no module, or a module is trained whole by another adapter.
    """
    if config is None:
        for module in _holders(model):
            if name is None or module.saved_name == name:
                if name is None:
                    _finish(module)
                else:
                    _swap(module, False)
                for field in ("saved", "saved_name", "saved_active"):
                    delattr(module, field)
        return []
    found: dict[str, list[tuple[Any, str]]] = {}
    aliases = weights.module_aliases(model)
    for path, module, _ in modules(model):
        own = [field for field, v in vars(module).items() if isinstance(v, nnx.Param)]
        called = (dotted(path), *aliases.get(dotted(path), ()))
        for wanted in config.modules_to_save or ():
            inside = [m for m in (re.match(rf"((?:.*\.)?{re.escape(wanted)})(\..*)?$", n) for n in called) if m]
            if inside and own:
                found.setdefault(wanted, []).extend((module, field) for field in own)
    missing = [m for m in config.modules_to_save or () if m not in found]
    if missing:
        every = [dotted(path) for path, _, _ in modules(model)]
        raise ValueError(
            f"{type(config).__name__}: modules_to_save names {', '.join(missing)}, which no module is called; the "
            f"nearest names are: {', '.join(nearest_names(missing, every))}."
        )
    pairs = [pair for group in found.values() for pair in group]
    for module, _ in pairs:
        if getattr(module, "saved_name", name) != name:
            raise ValueError(
                f"{type(config).__name__}: a module of modules_to_save={list(config.modules_to_save or ())} is trained "
                f"whole by the adapter {module.saved_name!r} already; remove that one first."
            )
    for module, field in pairs:
        if not hasattr(module, "saved_name"):
            module.saved, module.saved_name, module.saved_active = nnx.Dict(), name, True
        if field in module.saved:
            continue
        param = getattr(module, field)
        metadata = param.get_metadata()
        module.saved[field] = StoredParam(param.get_value(), **metadata)
        setattr(module, field, AdapterParam(param.get_value().astype(config.adapter_dtype), **metadata))
    return list(found)


def saved_of(model: nnx.Module) -> list[str]:
    """Returns the names of adapters that train modules whole."""
    return list(dict.fromkeys(module.saved_name for module in _holders(model)))


def saved_in_use(model: nnx.Module) -> bool:
    """Returns whether a module is used as an adapter trained it."""
    return any(module.saved_active for module in _holders(model))


def saved_weights(model: nnx.Module, name: str) -> dict[str, Any]:
    """Returns {path: value} of what an adapter trains whole."""
    found = {}
    for path, module, _ in modules(model):
        if getattr(module, "saved_name", None) == name:
            for field in module.saved:
                source = getattr(module, field) if module.saved_active else module.saved[field]
                found[dotted((*path, field))] = source
    return found


def activate_saved(model: nnx.Module, name: str | None) -> None:
    """Puts the copies of one adapter in use, and the model's own weights everywhere else."""
    for module in _holders(model):
        _swap(module, module.saved_name == name)


def _holders(model: nnx.Module) -> list[Any]:
    return [module for _, module, _ in modules(model) if hasattr(module, "saved_name")]


def _swap(module: Any, trained: bool) -> None:
    if module.saved_active == trained:
        return
    kind = AdapterParam if trained else nnx.Param
    for field in module.saved:
        here, there = getattr(module, field), module.saved[field]
        setattr(module, field, kind(there.get_value(), **there.get_metadata()))
        module.saved[field] = StoredParam(here.get_value(), **here.get_metadata())
    module.saved_active = trained


def _finish(module: Any) -> None:
    """Makes the weights in use the module's own."""
    for field in module.saved:
        param = getattr(module, field)
        dtype = module.saved[field].get_value().dtype
        setattr(module, field, nnx.Param(param.get_value().astype(dtype), **param.get_metadata()))

"""Which weights of a model a configuration names."""

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx

from portable import nn
from portable.adapters.config import AdapterConfig
from portable.adapters.kinds import Adapted, Kind, kind_of


class Target(NamedTuple):
    """A weight that can have an adapter.

    Attributes:
      names: how it is called: its path in the model first, then its names in the model's checkpoint.
      layer: the module. slot: the attribute of its weight. kind: of the module.
      stacked: whether the layer's variables have a leading axis of stacked layers.
    """

    names: tuple[str, ...]
    layer: Any
    slot: str
    kind: Kind
    stacked: bool


def modules(model: nnx.Module) -> Iterator[tuple[tuple, Any, bool]]:
    """Yields (path, module, whether it is in an `nn.Stack`), in the order of paths, without what adapters hold."""
    every = list(nnx.iter_modules(model))
    held = {(*path, field) for path, m in every for field in _held(m)}
    found = [(path, m) for path, m in every if not any(path[:n] in held for n in range(1, len(path) + 1))]
    stacks = [path for path, m in found if isinstance(m, nn.Stack)]
    for path, module in sorted(found, key=lambda item: [(isinstance(p, str), p) for p in item[0]]):
        yield path, module, any(path[: len(s)] == s for s in stacks)


def _held(module: Any) -> tuple[str, ...]:
    """Returns the attributes of a module that are an adapter's."""
    adapted = ("adapters", "bank") if isinstance(module, Adapted) else ()
    return (*adapted, "saved") if hasattr(module, "saved_name") else adapted


def matrix_sizes(layer: Any) -> tuple[int, int]:
    """Returns (d, o), the sizes of a layer's weight as a matrix."""
    kind: Any = kind_of(layer)
    return tuple(kind.matrix(layer, kind.slots(layer)[0]).shape[-2:])


def dotted(path: Sequence[Any]) -> str:
    """Returns a path as a name."""
    return ".".join(map(str, path))


def candidates(model: nnx.Module, aliases: Any = None) -> list[Target]:
    """Returns every weight that can have an adapter.

    Args:
      model: any module.
      aliases: {path of a weight: its names in the checkpoint}, or None.
    """
    found = []
    for path, module, stacked in modules(model):
        kind = kind_of(module)
        if kind is None:
            continue
        for slot in kind.slots(module):
            name = dotted((*path, slot)) if isinstance(module, nn.MoE) else dotted(path)
            others = (aliases or {}).get(dotted((*path, slot)), ())
            found.append(Target((name, *others), module, slot, kind, stacked))
    return found


def chosen(config: AdapterConfig, targets: Sequence[Target]) -> list[Target]:
    """Returns the targets that a configuration names.

    Raises:
      ValueError: it names none; the message has the nearest names.
    """
    if config.target_modules is None:
        raise ValueError(
            f"{type(config).__name__}: target_modules must name what is adapted; got None. There are, for example: "
            f"{', '.join(t.names[0] for t in targets[:4])}."
        )
    wanted = config.target_modules
    entries = (wanted,) if isinstance(wanted, str) else tuple((name,) for name in wanted)
    matched = {id(t): t for entry in entries for t in _matched(config, entry, targets) if not excluded(config, t)}
    matched = [t for t in targets if id(t) in matched]
    if matched or not targets:
        if not targets:
            raise ValueError(f"{type(config).__name__}: the model has no layer that takes an adapter.")
        return matched
    raise ValueError(
        f"{type(config).__name__}: no module is matched by target_modules={_shown(wanted)}"
        f"{' and what is not excluded' if config.exclude_modules else ''}; the nearest names are: "
        f"{', '.join(nearest_names(wanted, [n for t in targets for n in t.names]))}."
    )


def excluded(config: AdapterConfig, target: Target) -> bool:
    """Returns whether exclude_modules or modules_to_save take a target out."""
    for name in target.names:
        if config.exclude_modules is not None and _named(config.exclude_modules, name):
            return True
        if any(re.match(rf"(^|.*\.){re.escape(m)}($|\..*)", name) for m in config.modules_to_save or ()):
            return True
    return False


def nearest_names(wanted: Any, names: Sequence[str]) -> list[str]:
    """Returns some ends of names that are like what was asked for."""
    ends = {".".join(name.split(".")[-k:]) for name in names for k in (1, 2)}
    asked = (wanted,) if isinstance(wanted, str) else wanted
    close = [m for text in asked for m in difflib.get_close_matches(re.sub(r"[^\w.]", "", text), sorted(ends), 4, 0.4)]
    plain = sorted({end for end in ends if "." not in end and not end.isdigit()})
    return list(dict.fromkeys([*close, *plain]))[:8]


def _shown(names: Any) -> str:
    return repr(names) if isinstance(names, str) else str(list(names))


def _named(names: Any, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(name == n or name.endswith(f".{n}") for n in names)


def _matched(config: AdapterConfig, entry: Any, targets: Sequence[Target]) -> list[Target]:
    """Returns what one entry names: by paths of the model or, where it is none of those, by names of its checkpoint."""
    own = [t for t in targets if _matches(config, entry, t.names[0], t)]
    return own or [t for t in targets if any(_matches(config, entry, name, t) for name in t.names[1:])]


def _matches(config: AdapterConfig, entry: Any, name: str, target: Target) -> bool:
    if entry == "all-linear":
        linear = isinstance(target.layer, nnx.Linear | nnx.LinearGeneral | nnx.Einsum)
        if not linear or "vocab" in getattr(target.layer, target.slot).get_metadata().get("axes", ())[-1:]:
            return False
    elif not _named(entry, name):
        return False
    if config.layers_to_transform is None:  # which an expression does not go with
        return True
    wanted = config.layers_to_transform
    patterns = config.layers_pattern
    patterns = (patterns,) if isinstance(patterns, str) else patterns or (r"[^.]*",)
    found = filter(None, (re.match(rf"(?:^|.*?\.){p}\.(?P<i>\d+)\.", name) for p in patterns))
    number = next((int(m["i"]) for m in found), None)
    return number is not None and (number == wanted if isinstance(wanted, int) else number in wanted)

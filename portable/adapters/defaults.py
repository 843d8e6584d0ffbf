"""What is adapted where nobody says: a choice for each family of models."""

from typing import Any

from flax import nnx

from portable import nn
from portable.adapters.config import AdapterConfig
from portable.adapters.matching import candidates, chosen, dotted, modules

# Layers that "all-linear" leaves out unless they are named, by the module they belong to. A router decides who learns,
# and PEFT refuses the output projection of Mamba, whose kernels in torch read its weight past the adapter.
_NOT: tuple[tuple[type, tuple[str, ...]], ...] = (
    (nn.MoE, ("router", "router_hidden", "router_residual", "noise", "shared_gate")),
    (nn.Mamba2, ("out",)),
)


def default_targets(model: nnx.Module, *, rank: int = 1) -> dict[str, Any]:
    """Returns target_modules and exclude_modules for a configuration: "all-linear", without what should not be adapted.

    Those are layers into a vocabulary, routers of experts, Mamba-2's output projection, which PEFT could not load, and
    matrices that are narrower than the rank. Experts are left out too: name them, or use ESFT (`expert_targets`).

    Args:
      model: with or without adapters, layers as a list.
      rank: of the adapter; 1 for one that has none.

    Raises:
      ValueError: no layer is left.
    """
    everything = candidates(model)
    linear = chosen(AdapterConfig(target_modules="all-linear"), everything)
    owners = {dotted(path): module for path, module, _ in modules(model)}
    out = set()
    for target in linear:
        parent, _, leaf = target.names[0].rpartition(".")
        left = any(isinstance(owners.get(parent), kind) and leaf in names for kind, names in _NOT)
        if left or rank > min(target.kind.matrix(target.layer, target.slot).shape[-2:]):
            out.add(target.names[0])
    taken = {t.names[0].rpartition(".")[2] for t in linear if t.names[0] not in out}
    if not taken:
        raise ValueError(
            f"no linear layer of {type(model).__name__} can have an adapter of rank {rank} by default; give a smaller "
            f"rank or target_modules, such as {linear[0].names[0]!r}."
        )
    last = {name: name.rpartition(".")[2] for name in out}
    exclude = sorted({name if end in taken else end for name, end in last.items()})
    return {"target_modules": "all-linear", "exclude_modules": exclude or None}


def expert_targets(model: nnx.Module) -> dict[str, Any]:
    """Returns target_modules for every matrix of every layer's experts (ESFT).

    Raises:
      ValueError: the model has no experts.
    """
    names = [t.names[0] for t in candidates(model) if isinstance(t.layer, nn.MoE)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no layer with experts, whose chosen ones ESFT trains.")
    return {"target_modules": names}

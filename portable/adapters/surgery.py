"""Adapters put into a model, chosen, switched off, merged and taken out."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from portable import nn
from portable.adapters import names as weights
from portable.adapters.chosen import Chosen
from portable.adapters.config import AdapterConfig, DoRAConfig, ESFTConfig, LoRAConfig, S2FTConfig, ends
from portable.adapters.kinds import Adapted, adapted_class, dense, is_low_rank
from portable.adapters.low_rank import LowRank
from portable.adapters.matching import Target, candidates, chosen, dotted, modules
from portable.adapters.saved import activate_saved, save_modules, saved_in_use, saved_of
from portable.adapters.variables import AdapterParam, StoredParam

Model = TypeVar("Model", bound=nnx.Module)


def apply(
    model: nnx.Module, config: AdapterConfig, *, name: str = "default", rngs: nnx.Rngs | None = None
) -> list[str]:
    """Puts an adapter into a model, in place, and makes it the active one.

    Each adapted layer becomes a subclass of its class, with the same weights at the same paths, and with what is
    trained as `AdapterParam` beside them: the filter for optimizers (`nnx.Optimizer(model, tx, wrt=AdapterParam)`),
    gradients (`nnx.DiffState(0, AdapterParam)`) and checkpoints. A new adapter changes nothing, unless init="random".

    Args:
      model: any NNX module with nnx.Linear, LinearGeneral, Einsum, Embed, Conv or portable.nn.MoE layers; stacked
        (`portable.nn.stack`) or not.
      config: LoRAConfig, DoRAConfig, S2FTConfig or ESFTConfig.
      name: of the adapter; a model may have several.
      rngs: source of what is drawn; None for nnx.Rngs(0).

    Returns:
      The names of what was adapted, modules trained whole last.

    Raises:
      ValueError: nothing is matched, a rank is above what a matrix has, the name is taken, or a matched layer cannot
        have this adapter. The model is then as it was.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"apply: config must be LoRAConfig, DoRAConfig, ...; got {type(config).__name__}.")
    rngs = nnx.Rngs(0) if rngs is None else rngs
    check_name(model, name)
    with unstacked(model):
        targets = chosen(config, candidates(model, weights.aliases(model)))
        problems = [f"{t.names[0]}: {why}" for t in targets if (why := _refuses(t, config))]
        if problems:
            raise ValueError(f"{type(config).__name__} fits not everything it names: {'; '.join(problems)}.")
        made = [(t, _adapter(t, config, rngs)) for t in targets]
        made = [(t, adapter) for t, adapter in made if adapter is not None]
        if not made:
            raise ValueError(f"{type(config).__name__}: its experts name no layer among those of target_modules.")
        extra = save_modules(model, config, name)
        for target, adapter in made:
            attach(target, name, adapter)
        activate(model, name)
    return [t.names[0] for t, _ in made] + extra


def attach(target: Target, name: str, adapter: Any) -> None:
    """Gives a weight an adapter under a name; the layer's class changes with its first."""
    layer = target.layer
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_class(type(layer))
        layer.adapters, layer.active, layer.enabled = nnx.Dict(), None, True
        layer.bank = layer.rows = nnx.data(None)
    if target.slot not in layer.adapters:
        layer.adapters[target.slot] = nnx.Dict()
    layer.adapters[target.slot][name] = adapter


def check_name(model: nnx.Module, name: str) -> None:
    """Raises ValueError unless a new adapter can have this name."""
    if not re.fullmatch(r"[^./\s]+", name):
        raise ValueError(f"an adapter's name must have no dot, slash or space; got {name!r}.")
    if any(layer.bank is not None for _, layer, _ in adapted_layers(model)):
        raise ValueError("rows of this view have adapters of their own; apply another to the model it was made of.")
    if name in adapter_names(model):
        raise ValueError(
            f"the model has an adapter called {name!r} already; choose another name, or remove it first "
            f"(portable.adapters.remove(model, {name!r}))."
        )


def adapted_layers(model: nnx.Module) -> list[tuple[str, Any, bool]]:
    """Returns (path, layer, whether it is in an `nn.Stack`) of every layer with adapters."""
    return [(dotted(path), m, stacked) for path, m, stacked in modules(model) if isinstance(m, Adapted)]


def adapter_names(model: nnx.Module) -> list[str]:
    """Returns the names of a model's adapters, in the order in which they came."""
    own = [name for _, layer, _ in adapted_layers(model) for slot in layer.adapters.values() for name in slot]
    return list(dict.fromkeys(own + saved_of(model)))


def active(model: nnx.Module) -> str | None:
    """Returns the name of the adapter in use, None where there is none."""
    return next((layer.active for _, layer, _ in adapted_layers(model) if layer.active is not None), None)


def activate(model: nnx.Module, name: str | None) -> None:
    """Makes one adapter the one in use, in place; None uses none.

    Only what is in use is `AdapterParam`; the others wait as `StoredParam`, out of sight of optimizers.

    Raises:
      ValueError: the model has no such adapter.
    """
    known = adapter_names(model)
    if name is not None and name not in known:
        raise ValueError(f"the model has no adapter called {name!r}; there are: {', '.join(known) or 'none'}.")
    for _, layer, _ in adapted_layers(model):
        layer.active = name
        for slot in layer.adapters.values():
            for own, adapter in slot.items():
                _retype(adapter, AdapterParam if own == name else StoredParam)
    activate_saved(model, name)


def _retype(adapter: Any, kind: type) -> None:
    for field in ("a", "b", "magnitude", "delta"):
        variable = getattr(adapter, field, None)
        if variable is not None:
            setattr(adapter, field, kind(variable.get_value(), **variable.get_metadata()))


@contextlib.contextmanager
def disable(model: nnx.Module) -> Iterator[None]:
    """Runs the model as it was before any adapter, inside the context."""
    layers = [layer for _, layer, _ in adapted_layers(model)]
    before, name = [layer.enabled for layer in layers], active(model)
    activate_saved(model, None)
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
        activate_saved(model, name)


def remove(model: nnx.Module, name: str) -> None:
    """Takes an adapter out of a model, in place. With its last adapter a layer is of its own class again.

    Raises:
      ValueError: the model has no such adapter.
    """
    if active(model) == name or name not in adapter_names(model):
        activate(model, None if name in adapter_names(model) else name)
    activate_saved(model, None)
    for _, layer, _ in adapted_layers(model):
        for slot in list(layer.adapters):
            if name in layer.adapters[slot]:
                del layer.adapters[slot][name]
            if not len(layer.adapters[slot]):
                del layer.adapters[slot]
        if not len(layer.adapters):
            _restore(layer)
    save_modules(model, None, name)


def _restore(layer: Any) -> None:
    for field in ("adapters", "active", "enabled", "bank", "rows"):
        delattr(layer, field)
    layer.__class__ = layer.base


def refresh(model: nnx.Module, *, mesh: Any = None, rules: Any = None) -> None:
    """Computes DoRA's norms anew, in place, for all calls until the next refresh.

    Adapters change once an optimizer step, so call it once a step, before the microbatches; or once before inference.
    Without any refresh each call computes the norms, which is slower and always right. Inside compiled code, refresh
    the model that was merged there. Layers whose norm is differentiated (detach=False) are left to compute it.

    Args:
      model: with adapters; of the active one.
      mesh, rules: of `portable.sharding`, where the weights are sharded: each device then expands its own part of a
        norm, and they meet in one all-reduce of an output channel's length.
    """
    for _, layer, _ in adapted_layers(model):
        for slot in layer.kind.slots(layer):
            adapter = layer.adapter(slot)
            if adapter is not None:
                adapter.refresh(layer.kind.matrix(layer, slot), _shards(layer, slot, mesh, rules))


def forget(model: nnx.Module) -> None:
    """Drops the norms that `refresh` kept, in place: every call computes them again."""
    for _, layer, _ in adapted_layers(model):
        for slot in layer.kind.slots(layer):
            if is_low_rank(layer.adapter(slot)):
                layer.adapter(slot).norms = nnx.data(None)


def _shards(layer: Any, slot: str, mesh: Any, rules: Any) -> int:
    if mesh is None:
        return 1
    from portable.sharding import RULES

    axes, matrix = layer.kind.axes(layer, slot), layer.kind.matrix(layer, slot)
    place = (RULES if rules is None else rules).get(axes[-2]) if axes else None
    count = mesh.shape.get(place, 1)
    return count if matrix.shape[-2] % count == 0 else 1


def merge(model: Model) -> Model:
    """Returns a new model with the active adapter in its weights, of plain layers; the one given stays as it is.

    The sum is made in float32 and rounded once to the weight's dtype. An embedding that a model of your own reads a
    second time (`nnx.Embed.attend`) has the update there too once it is merged, which it had not before.

    Raises:
      ValueError: the embedding has an adapter and is the head too (tied by method), which the adapter does not touch;
        or no adapter is active.
    """
    layers = [layer for _, layer, _ in adapted_layers(model)]
    if any(layer.bank is not None for layer in layers):
        raise ValueError("merge: rows of this view have adapters of their own; merge the model it was made of.")
    used = any(layer.adapter(slot) is not None for layer in layers for slot in layer.kind.slots(layer))
    if not used and not saved_in_use(model):
        raise ValueError("merge: the model has no active adapter; activate one (portable.adapters.activate).")
    weights.check_tied(model)
    new = nnx.merge(*nnx.split(model))
    for _, layer, _ in adapted_layers(new):
        for slot in layer.kind.slots(layer):
            found = layer.adapter(slot)
            if found is None:
                continue
            param, matrix = getattr(layer, slot), layer.kind.matrix(layer, slot)
            dtype = matrix.dtype
            merged = found.updated(matrix).astype(dtype).reshape(matrix.shape)
            setattr(layer, slot, type(param)(layer.kind.unflat(layer, slot, merged), **param.get_metadata()))
        _restore(layer)
    save_modules(new, None, None)
    return new


def _refuses(target: Target, config: AdapterConfig) -> str | None:
    layer, matrix = target.layer, None
    if why := target.kind.refuses(layer, config):
        return why
    matrix = target.kind.matrix(layer, target.slot)
    *_, d, o = matrix.shape
    if isinstance(config, LoRAConfig):
        rank = config.rank_of(*target.names)
        if rank > min(d, o):
            return f"rank {rank} is above that of its matrix [{d}, {o}]"
    if isinstance(config, S2FTConfig):
        size = d if config.side == "in" else o
        return f"{config.channels} channels are more than its {size}" if config.channels > size else None
    if isinstance(config, ESFTConfig):
        if not isinstance(layer, nn.MoE):
            return "it has no experts"
        experts = config.experts_of(*target.names)
        if any(e >= matrix.shape[-3] for e in experts):
            return f"experts {list(experts)} are not all among its {matrix.shape[-3]}"
    return None


def _adapter(target: Target, config: Any, rngs: nnx.Rngs) -> Any:
    layer, slot = target.layer, target.slot
    w, axes, dtype = target.kind.matrix(layer, slot), target.kind.axes(layer, slot), config.adapter_dtype
    *lead, d, o = w.shape
    if isinstance(config, S2FTConfig):
        axis, size = (-2, d) if config.side == "in" else (-1, o)
        draws = jax.random.split(rngs.params(), tuple(lead) or (1,)).reshape(-1)
        index = jax.vmap(lambda k: jnp.sort(jax.random.permutation(k, size)[: config.channels]))(draws)
        shape = (*lead, config.channels, o) if axis == -2 else (*lead, d, config.channels)
        return Chosen(config, jnp.zeros(shape, dtype), index.reshape(*lead, -1), axis=axis, axes=axes)
    if isinstance(config, ESFTConfig):
        experts = config.experts_of(*target.names)
        if not experts:
            return None
        shape = (*lead[:-1], len(experts), d, o)
        index = jnp.broadcast_to(jnp.asarray(experts), shape[:-2])
        return Chosen(config, jnp.zeros(shape, dtype), index, axis=-3, axes=axes)
    rank = config.rank_of(*target.names)
    a, b = _drawn(config, isinstance(layer, nnx.Embed), (*lead, d, rank), (*lead, rank, o), rngs)
    return low_rank(config, w, a, b, None, config.scale(rank, config.alpha_of(*target.names)), axes)


def low_rank(config: LoRAConfig, w: Any, a: Any, b: Any, magnitude: Any, scale: float, axes: tuple) -> LowRank:
    """Returns LoRA or DoRA for a weight w [*e, d, o]; a magnitude of None is the updated weight's norm."""
    a, b = jnp.asarray(a, config.adapter_dtype), jnp.asarray(b, config.adapter_dtype)
    if not isinstance(config, DoRAConfig):
        return LowRank(config, a, b, None, None, scale=scale, axes=axes)
    w = dense(w)
    w = w.astype(jnp.promote_types(jnp.float32, w.dtype))
    squares = jnp.sum(jnp.square(w), axis=-2)
    if magnitude is None:
        updated = w + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
        magnitude = jnp.sqrt(jnp.sum(jnp.square(updated), axis=-2)).astype(jnp.promote_types(jnp.float32, a.dtype))
    return LowRank(config, a, b, magnitude, squares, scale=scale, axes=axes)


def _drawn(config: LoRAConfig, embedding: bool, left: tuple, right: tuple, rngs: nnx.Rngs) -> tuple[Any, Any]:
    key, other = rngs.params(), rngs.params()
    d, rank, dtype = left[-2], left[-1], jnp.float32
    a = jax.random.uniform(key, left, dtype, -(d**-0.5), d**-0.5)
    b = jnp.zeros(right, dtype)
    if config.init == "gaussian":
        a = jax.random.normal(key, left, dtype) / rank
    elif config.init == "random":
        b = jax.random.normal(other, right, dtype) * right[-2] ** -0.5
    elif embedding:
        a, b = jnp.zeros(left, dtype), jax.random.normal(other, right, dtype)
    return a, b


@contextlib.contextmanager
def unstacked(model: nnx.Module) -> Iterator[None]:
    """Holds stacked layers (`portable.nn.Stack`) as lists inside the context, in place, so that names count them all.

    Raises:
      ValueError: behind it, layers that were stacked are no longer alike.
    """
    lists = []
    for _, module in list(nnx.iter_modules(model)):
        for field, items in list(vars(module).items()):
            if isinstance(items, nnx.List) and any(isinstance(item, nn.Stack) for item in items):
                sizes = [item.size if isinstance(item, nn.Stack) else 0 for item in items]
                layers = [item.layers() if isinstance(item, nn.Stack) else [item] for item in items]
                setattr(module, field, nnx.List([layer for part in layers for layer in part]))
                lists.append((module, field, sizes))
    try:
        yield
    finally:
        for module, field, sizes in lists:
            layers, items = list(getattr(module, field)), []
            for size in sizes:
                run, layers = layers[: max(1, size)], layers[max(1, size) :]
                items.append(nn.Stack(run) if size else run[0])
            setattr(module, field, nnx.List(items))


def scope(config: AdapterConfig, name: str) -> bool:
    """Returns whether a name is among modules_to_save."""
    return any(ends(re.escape(m), name) for m in config.modules_to_save or ())

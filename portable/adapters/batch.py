"""Views of an adapted model for one call: rows of a batch with adapters of their own, and dropout."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from portable.adapters.kinds import is_low_rank
from portable.adapters.low_rank import LowRank, value
from portable.adapters.surgery import adapted_layers, adapter_names
from portable.adapters.variables import AdapterCache

Model = TypeVar("Model", bound=nnx.Module)


def assign(model: Model, rows: Any, *, names: Sequence[str] | None = None) -> Model:
    """Returns a view of the model in which each row of a batch runs with its own adapter.

    The adapters' factors are stacked once, padded to the largest rank, DoRA's norms computed once; a view given again
    keeps them and takes new rows. What is trained is the stacked copy. The weight's own product is one for all; rows of
    few examples gather their factors, and many tokens are sorted by adapter and multiplied in groups (S-LoRA,
    arXiv:2311.03285; LoRAFusion, arXiv:2510.00206).

    Args:
      model: with adapters by low rank on linear layers and embeddings; or a view.
      rows: for each example (or token, [b, t]) a name, None for no adapter; or an array of integers, numbers of `names`
        and -1 for none. It may be traced.
      names: the adapters, in the order of their numbers; None takes all, as `adapter_names` lists them.

    Raises:
      ValueError: a name is unknown, an adapter is not LoRA or DoRA, or has modules trained whole.
    """
    view = nnx.merge(*nnx.split(model))
    layers = adapted_layers(view)
    if not layers:
        raise ValueError("assign: the model has no adapter; apply or load one first.")
    held = None if layers[0][1].bank is None else list(layers[0][1].bank_names)
    if held is not None and names is not None:
        raise ValueError(f"assign: a view has the adapters it was made with, {', '.join(held)}; give the model itself.")
    known = held or list(names if names is not None else adapter_names(model))
    if unknown := [name for name in known if held is None and name not in adapter_names(model)]:
        raise ValueError(f"assign: no adapter is called {unknown[0]!r}; there are: {', '.join(adapter_names(model))}.")
    ids = _ids(rows, known)
    for path, layer, stacked in layers:
        if layer.bank is None:
            layer.bank = nnx.Dict({slot: _stacked(path, layer, slot, known, stacked) for slot in layer.adapters})
            layer.bank_names = tuple(known)
        count = next(iter(layer.bank.values())).a.get_value().shape[0] if stacked else 0
        layer.rows = AdapterCache(jnp.broadcast_to(ids, (count, *ids.shape)) if stacked else ids)
        layer.adapters = nnx.Dict()
    return view


def _ids(rows: Any, known: list[str]) -> Any:
    if hasattr(rows, "dtype"):
        if not jnp.issubdtype(rows.dtype, jnp.integer):
            raise ValueError(f"assign: rows must be integers or names; got {rows.dtype}.")
        return jnp.asarray(rows, jnp.int32)
    if unknown := [r for r in rows if r is not None and r not in known]:
        raise ValueError(f"assign: no adapter is called {unknown[0]!r}; there are: {', '.join(known)}.")
    return jnp.asarray([-1 if r is None else known.index(r) for r in rows], jnp.int32)


def _stacked(path: str, layer: Any, slot: str, known: list[str], stacked: bool) -> LowRank:
    own, w = layer.adapters[slot], layer.kind.matrix(layer, slot)
    found = [own.get(name, None) for name in known]
    real = [adapter for adapter in found if adapter is not None]
    lead = w.shape[: w.ndim - 2]
    if not all(map(is_low_rank, real)) or hasattr(layer, "saved_name") or len(lead) != stacked:
        raise ValueError(
            f"assign: {path} has an adapter that rows cannot choose: only LoRA and DoRA of one matrix can."
        )
    rank, dtype = max(adapter.rank for adapter in real), real[0].a.get_value().dtype
    d, o = w.shape[-2:]
    magnitudes = any(adapter.magnitude is not None for adapter in real)

    def padded(array: Any, axis: int) -> Any:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (0, rank - array.shape[axis])
        return jnp.pad(array, widths)

    each = []
    for adapter in found:
        if adapter is None:
            a, b = jnp.zeros((*lead, d, rank), dtype), jnp.zeros((*lead, rank, o), dtype)
        else:
            # Scales differ: each goes into its own factor.
            a, b = padded(value(adapter.a), -1), padded(value(adapter.b) * adapter.scale, -2)
        ones = jnp.ones((*lead, o), jnp.float32)
        m = n = ones
        if adapter is not None and adapter.magnitude is not None:
            m, n = value(adapter.magnitude), adapter.norm(w)
        each.append((a, b, m, n))
    a, b, m, n = (jnp.stack(arrays, axis=int(stacked)) for arrays in zip(*each, strict=True))
    config = next((x.config for x in real if x.magnitude is not None), real[0].config)
    bank = LowRank(config, a, b, m if magnitudes else None, None, scale=1.0, ids=True)
    if magnitudes:
        bank.norms = AdapterCache(n)
    return bank


def dropping(model: Model, key: Any) -> Model:
    """Returns a view of the model for one call in training: each adapted layer drops inputs by a key of its own.

    Nothing is dropped without. Inside a recomputed layer (`jax.checkpoint`) the same entries are dropped again.

    Args:
      model: with adapters, of a configuration with dropout above 0.
      key: of `jax.random`; a new one for each call.
    """
    view = nnx.merge(*nnx.split(model))
    for i, (_, layer, _) in enumerate(adapted_layers(view)):
        for j, slot in enumerate(layer.kind.slots(layer)):
            adapter = layer.adapter(slot)
            if not is_low_rank(adapter) or not adapter.config.dropout:
                continue
            own = jax.random.fold_in(jax.random.fold_in(key, i), j)
            lead = adapter.a.get_value().shape[: adapter.a.get_value().ndim - 2 - adapter.ids]
            own = jax.random.split(own, lead) if lead else own
            adapter.key = AdapterCache(own)
    return view

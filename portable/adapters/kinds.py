"""The kinds of layers that take adapters: their weights as matrices, and their calls with an adapter."""

import contextlib
import functools
import math
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from portable import nn, ops
from portable.adapters.chosen import Chosen
from portable.adapters.low_rank import LowRank, value
from portable.ops._moe_ffn import plan as plans
from portable.ops._moe_ffn.activations import activate


class Adapted:
    """What an adapted layer has beside its own: its class is a subclass of the layer's, its own paths stay.

    Attributes:
      adapters: nnx.Dict {weight: nnx.Dict {name of the adapter: LowRank or Chosen}}.
      active: the adapter in use, None for none. enabled: False lets the layer be as it was.
      bank: nnx.Dict {weight: LowRank over several adapters}, and rows: AdapterCache, ids of them; or None.
    """

    __slots__ = ()
    base: type
    kind: "Kind"
    adapters: Any
    active: str | None
    enabled: bool
    bank: Any
    rows: Any

    def adapter(self, slot: str) -> Any:
        """Returns the adapter that this weight is used with, or None."""
        if not self.enabled:
            return None
        if self.bank is not None:
            return self.bank.get(slot, None)
        if self.active is None:
            return None
        return self.adapters.get(slot, {}).get(self.active, None)

    def updated_kernel(self) -> Any:
        """Returns the kernel as the layer's product reads it, in its dtype, for code that multiplies by itself."""
        (slot,) = self.kind.slots(self)
        found, param = self.adapter(slot), getattr(self, slot)
        if found is None:
            return param[...]
        if found.ids:
            raise ValueError(
                f"{self.base.__name__}: this model reads the kernel itself, which is not one where rows have adapters "
                "of their own; use one adapter for the batch."
            )
        return self.kind.unflat(self, slot, found.updated(self.kind.matrix(self, slot), cached=True)).astype(
            param.get_value().dtype
        )

    def linear(self, x, w, bias, **options):
        """Returns the product of x with w and the active adapter; ids where rows have their own."""
        found: Any = self.adapter(self.kind.slots(self)[0])
        if found.ids:
            options["ids"] = value(self.rows)
        return found.linear(x, w, bias, **options)


class Kind:
    """How one type of layer holds its weights, as matrices [*e, d, o], d being what is summed over."""

    def slots(self, layer: Any) -> tuple[str, ...]:
        """Returns the attributes that hold weights."""
        return ("kernel",)

    def axes(self, layer: Any, slot: str) -> tuple:
        """Returns the logical axes (*e, d, o) where the weight has them and is a matrix as it lies; else ()."""
        given = tuple(getattr(layer, slot).get_metadata().get("axes", ()))
        # Stacked layers add an axis in front.
        return (None,) * (self.matrix(layer, slot).ndim - len(given)) + given if given else ()

    def matrix(self, layer: Any, slot: str) -> Any:
        """Returns the weight as [*e, d, o]."""
        return dense(value(getattr(layer, slot)))

    def unflat(self, layer: Any, slot: str, matrix: Any) -> Any:
        """Returns a matrix in the shape of the weight."""
        return matrix.reshape(value(getattr(layer, slot)).shape)

    def refuses(self, layer: Any, config: Any) -> str | None:
        """Returns why a layer cannot have an adapter of this configuration, or None."""
        return None


def dense(w: Any) -> Any:
    """Returns an array; of a quantised one (qwix) what it stands for."""
    if not hasattr(w, "qvalue"):
        return w
    import qwix

    return qwix.dequantize(w)


@contextlib.contextmanager
def _precision(layer: Any):
    if layer.precision is None:
        yield
        return
    with jax.default_matmul_precision(str(getattr(layer.precision, "name", layer.precision)).lower()):
        yield


def _other_product(layer: Any) -> str | None:
    """Says that a layer multiplies by a function of its own, which an adapter would leave out; or None."""
    own = getattr(layer, "dot_general", None)
    if own in (None, jax.lax.dot_general, nn.dot_general) and getattr(layer, "dot_general_cls", None) is None:
        return None
    return f"it multiplies by a dot_general of its own, {getattr(own, '__name__', own)}"


class _Linear(Kind):
    def refuses(self, layer: Any, config: Any) -> str | None:
        return _other_product(layer)

    def call(self, layer: Any, inputs, out_sharding=None):
        """`nnx.Linear.__call__` with an adapter."""
        del out_sharding
        x, bias = layer.promote_dtype((inputs, value(layer.bias)), dtype=layer.dtype)
        kernel = value(layer.kernel)
        if isinstance(layer.adapter("kernel"), Chosen):
            kernel = dense(kernel)
        if not hasattr(kernel, "qvalue"):
            x, bias, kernel = layer.promote_dtype((inputs, bias, kernel), dtype=layer.dtype)
        with _precision(layer):
            return layer.linear(x, kernel, bias, out_dtype=layer.preferred_element_type)


class _Einsum(Kind):
    """Any product of an input with a kernel; letters of kernel, input and output count separate weights."""

    def _parts(self, layer: Any) -> tuple[str, str, str]:
        """Returns the einsum's letters: of the input, the kernel, the output."""
        operands, out = layer.einsum_str.replace(" ", "").split("->")
        return (*operands.split(","), out)

    def _letters(self, layer: Any) -> tuple[list[str], list[str], list[str]]:
        x, kernel, y = self._parts(layer)
        each = [c for c in kernel if c in x and c in y]
        summed = [c for c in kernel if c in x and c not in y]
        return each, summed, [c for c in kernel if c in y and c not in x]

    def refuses(self, layer: Any, config: Any) -> str | None:
        if why := _other_product(layer):
            return why
        x, kernel, y = self._parts(layer)
        each, summed, out = self._letters(layer)
        if len(each + summed + out) < len(kernel) or "..." in kernel or not summed or not out:
            return f"the product {x},{kernel}->{y} is not that of a matrix with vectors"
        return None

    def matrix(self, layer: Any, slot: str) -> Any:
        w = dense(value(layer.kernel))
        each, summed, out = self._letters(layer)
        kernel = self._parts(layer)[1]
        lead = w.ndim - len(kernel)  # stacked layers
        order = [lead + kernel.index(c) for c in each + summed + out]
        w = w.transpose(*range(lead), *order)
        front = lead + len(each)
        sizes = w.shape[front : front + len(summed)], w.shape[front + len(summed) :]
        return w.reshape(*w.shape[:front], *map(math.prod, sizes))

    def unflat(self, layer: Any, slot: str, matrix: Any) -> Any:
        each, summed, out = self._letters(layer)
        kernel, shape = self._parts(layer)[1], value(layer.kernel).shape
        lead = len(shape) - len(kernel)
        size = dict(zip(kernel, shape[lead:], strict=True))
        w = matrix.reshape(*shape[:lead], *[size[c] for c in each + summed + out])
        return w.transpose(*range(lead), *[lead + (each + summed + out).index(c) for c in kernel])

    def axes(self, layer: Any, slot: str) -> tuple:
        return ()

    def call(self, layer: Any, inputs, *args, out_sharding=None):
        """`nnx.Einsum.__call__` and `nnx.LinearGeneral.__call__` with an adapter."""
        del args, out_sharding
        x, kernel, y = self._parts(layer)
        each, summed, out = self._letters(layer)
        dots = [chr(0x3B1 + i) for i in range(inputs.ndim - len(x.replace("...", "")))] if "..." in x else []
        x, y = (s.replace("...", "".join(dots)) for s in (x, y))
        size = dict(zip(x, inputs.shape, strict=True)) | dict(zip(kernel, value(layer.kernel).shape, strict=True))
        free = [c for c in x if c not in each + summed]
        inputs, w, bias = layer.promote_dtype(
            (inputs, self.matrix(layer, "kernel"), value(layer.bias)), dtype=layer.dtype
        )
        rows = inputs.transpose([x.index(c) for c in each + free + summed])
        rows = rows.reshape(*[size[c] for c in each + free], math.prod(size[c] for c in summed))
        options = {"out_dtype": layer.preferred_element_type}
        with _precision(layer):
            if each:
                found = layer.adapter("kernel")
                w = w.reshape(*[size[c] for c in each], *w.shape[-2:])
                graphdef, state = nnx.split(found)

                def one(x, w, state):
                    return nnx.merge(graphdef, state).linear(x, w, **options)

                product: Callable = functools.reduce(lambda f, _: jax.vmap(f), each, one)
                made = product(rows, w, state)
            else:
                made = layer.linear(rows, w, None, **options)
        made = made.reshape([size[c] for c in each + free + out])
        made = made.transpose([(each + free + out).index(c) for c in y])
        return made if bias is None else made + bias.reshape([size[c] if c in kernel else 1 for c in y])


class _LinearGeneral(_Einsum):
    def _parts(self, layer: Any) -> tuple[str, str, str]:
        n, summed, out = len(layer.batch_axis), len(layer.in_features), len(layer.out_features)
        each, inside, made = (
            "".join(chr(start + i) for i in range(k)) for start, k in ((97, n), (105, summed), (65, out))
        )
        return f"{each}...{inside}", f"{each}{inside}{made}", f"{each}...{made}"

    def refuses(self, layer: Any, config: Any) -> str | None:
        wanted = tuple(range(-len(layer.in_features), 0))
        if tuple(layer.axis) != wanted:
            return f"it sums over the axes {layer.axis} of its input; only the last ones, {wanted}, are known"
        return None


class _Embed(Kind):
    def slots(self, layer: Any) -> tuple[str, ...]:
        return ("embedding",)

    def refuses(self, layer: Any, config: Any) -> str | None:
        return "it has a table of words, of which channels are not chosen" if not hasattr(config, "rank") else None

    def call(self, layer: Any, inputs, out_sharding=None):
        """`nnx.Embed.__call__` with an adapter: nothing is dropped, as in PEFT."""
        del out_sharding
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"Embed: tokens must be integers; got {inputs.dtype}.")
        found, (table,) = layer.adapter("embedding"), layer.promote_dtype((value(layer.embedding),), dtype=layer.dtype)
        a, b = (value(v).astype(table.dtype) for v in (found.a, found.b))
        wide = jnp.promote_types(jnp.float32, table.dtype)
        y = jnp.take(table, inputs, axis=0).astype(wide)
        gain = found.gain(table) if not found.ids or found.norms is not None else None
        if not found.ids:
            y = y + found.scale * jnp.matmul(jnp.take(a, inputs, axis=0), b, preferred_element_type=wide)
            return (y if gain is None else gain * y).astype(table.dtype)
        rows = value(layer.rows)
        rows = rows.reshape(*rows.shape, *[1] * (inputs.ndim - rows.ndim))
        own, real = jnp.broadcast_to(jnp.maximum(rows, 0), inputs.shape), (rows >= 0)[..., None]
        low = jnp.einsum("...r,...ro->...o", a[own, inputs], b[own], preferred_element_type=wide)
        y = y + found.scale * jnp.where(real, low, 0)
        return (y if gain is None else jnp.where(real, gain[own], 1) * y).astype(table.dtype)


class _Conv(Kind):
    def matrix(self, layer: Any, slot: str) -> Any:
        w = dense(value(layer.kernel))
        lead = w.shape[: w.ndim - len(layer.kernel_shape)]
        return w.reshape(*lead, -1, w.shape[-1])

    def axes(self, layer: Any, slot: str) -> tuple:
        return ()

    def refuses(self, layer: Any, config: Any) -> str | None:
        if layer.feature_group_count != 1:
            return f"its channels are in {layer.feature_group_count} groups; only one is known"
        if layer.mask is not None:
            return "its kernel is masked"
        return "of a convolution's channels none are chosen" if not hasattr(config, "rank") else None

    def call(self, layer: Any, inputs, out_sharding=None):
        """`nnx.Conv.__call__` with an adapter: a convolution to r channels, then a product (PEFT's ConvNd)."""
        found = layer.adapter("kernel")
        if found.ids:
            raise ValueError(
                "Conv: rows of a batch cannot have adapters of their own through a convolution; use one for all."
            )
        inputs, kernel, bias, a, b = layer.promote_dtype(
            (inputs, value(layer.kernel), value(layer.bias), value(found.a), value(found.b)), dtype=layer.dtype
        )
        wide, config, key = jnp.promote_types(jnp.float32, inputs.dtype), found.config, value(found.key)
        low = inputs
        if key is not None and config.dropout:
            low = _dropped(inputs, key, config.dropout)
        whole = low is not inputs and found.magnitude is not None and config.dropout_mode == "peft"

        def convolved(x, kernel):
            view = types.SimpleNamespace(**{k: v for k, v in vars(layer).items() if k not in ("kernel", "bias")})
            view.kernel, view.bias, view.mask, view.preferred_element_type = kernel, None, None, wide
            view.use_bias, view.kernel_shape, view.out_features = False, kernel.shape, kernel.shape[-1]
            return nnx.Conv.__call__(view, x, out_sharding)  # pyright: ignore[reportArgumentType]

        inner = convolved(low, a.reshape(*kernel.shape[:-1], -1)).astype(inputs.dtype)
        y = convolved(low if whole else inputs, kernel)
        y = y + found.scale * jnp.matmul(inner, b, preferred_element_type=wide)
        gain = found.gain(self.matrix(layer, "kernel"))
        y = y if gain is None else gain * y
        y = y + convolved(inputs - low, kernel) if whole else y
        return (y if bias is None else y + bias.astype(wide)).astype(layer.preferred_element_type or inputs.dtype)


def _dropped(x, key, rate: float):
    bits = jax.random.bits(key, x.shape, jnp.uint32)
    return jnp.where(bits >= jnp.uint32(round(rate * 2**32)), x / (1 - rate), 0).astype(x.dtype)


class _MoE(Kind):
    def slots(self, layer: Any) -> tuple[str, ...]:
        return ("up", "down") if layer.gate is None else ("gate", "up", "down")

    def refuses(self, layer: Any, config: Any) -> str | None:
        if getattr(config, "dropout", 0):
            return "what experts are given is not dropped"
        return None

    def call(self, layer: Any, x, routing: ops.Routing):
        """`nn.MoE._ffn` with adapters: the experts' three products with rows in the experts' order."""
        found = {slot: layer.adapter(slot) for slot in ("gate", "up", "down")}
        if any(a is not None and a.ids for a in found.values()):
            raise ValueError("MoE: rows of a batch cannot have adapters of their own through experts; use one for all.")
        weights: dict[str, Any] = {slot: value(getattr(layer, slot)) for slot in found}
        biases = {"gate": value(layer.gate_bias), "up": value(layer.up_bias), "down": value(layer.down_bias)}
        for slot, adapter in found.items():
            if isinstance(adapter, Chosen):
                weights[slot], found[slot] = adapter.updated(weights[slot]), None
        cast: dict[str, Any] = {s: None if w is None else w.astype(layer.dtype) for s, w in weights.items()}
        if not any(found.values()):
            given = {f"b_{s}": None if b is None else b.astype(layer.dtype) for s, b in biases.items()}
            return ops.moe_ffn(x, cast["gate"], cast["up"], cast["down"], routing, activation=layer.activation, **given)
        experts, k = weights["up"].shape[0], routing.indices.shape[-1]
        plan = plans.make(routing.indices.reshape(-1, k), experts)
        real = routing.indices.reshape(-1, k) < experts

        def product(slot: str, rows):
            if cast[slot] is None:
                return None
            bias, options = biases[slot], {"group_sizes": plan.group_sizes}
            if found[slot] is not None:
                return found[slot].linear(rows, cast[slot], bias, **options)
            y = ops.grouped_matmul(rows, cast[slot], plan.group_sizes)
            return y if bias is None else y + bias.astype(y.dtype)[jnp.sort(routing.indices.reshape(-1)) % experts]

        rows = x.reshape(-1, x.shape[-1]).astype(layer.dtype)[plan.token]
        wide = jnp.promote_types(jnp.float32, rows.dtype)
        gate, up = (None if y is None else y.astype(wide) for y in (product("gate", rows), product("up", rows)))
        y = product("down", activate(layer.activation, gate, up).astype(rows.dtype))
        weight = jnp.where(real, routing.weights.reshape(-1, k).astype(wide), 0)
        return plans.combine(y, plan, weight, real).astype(x.dtype).reshape(x.shape)


KINDS: tuple[tuple[type, Kind], ...] = (
    (nnx.Linear, _Linear()),
    (nnx.LinearGeneral, _LinearGeneral()),
    (nnx.Einsum, _Einsum()),
    (nnx.Embed, _Embed()),
    (nnx.Conv, _Conv()),
    (nn.MoE, _MoE()),
)
_CALLS = {nn.MoE: "_ffn"}


def kind_of(layer: Any) -> Kind | None:
    """Returns the kind of a layer, None where its type has none, or a call of its own."""
    if isinstance(layer, Adapted):
        return layer.kind
    for known, kind in KINDS:
        method = _CALLS.get(known, "__call__")
        if isinstance(layer, known) and getattr(type(layer), method) is getattr(known, method):
            return kind
    return None


@functools.cache
def adapted_class(base: type) -> type:
    """Returns the subclass of a layer's class that runs adapters."""
    known, kind = next((k, kind) for k, kind in KINDS if issubclass(base, k))
    method = _CALLS.get(known, "__call__")

    def call(self, *args, **kwargs):
        if not any(self.adapter(slot) is not None for slot in kind.slots(self)):
            return getattr(base, method)(self, *args, **kwargs)
        return kind.call(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    call.__doc__ = getattr(base, method).__doc__
    name = f"Adapted{base.__name__}"
    # The layer's class first: Python lets an object change to a class of the same layout alone.
    return type(name, (base, Adapted), {method: call, "base": base, "kind": kind, "__module__": __name__})


def is_low_rank(adapter: Any) -> bool:
    """Returns whether an adapter is LoRA or DoRA."""
    return isinstance(adapter, LowRank)

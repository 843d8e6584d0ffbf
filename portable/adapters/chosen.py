"""Adapters that train a chosen part of a weight densely: some channels (S2FT), some experts (ESFT)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from portable import ops
from portable.adapters.config import ESFTConfig, S2FTConfig
from portable.adapters.low_rank import value
from portable.adapters.variables import AdapterParam, StoredParam


class Chosen(nnx.Module):
    """A change of a part of a weight [*e, d, o]: select sparsely, compute densely.

    Attributes:
      delta: AdapterParam, what is added: [*e, k, o] to rows, [*e, d, k] to columns, [.., k, d, o] to experts.
      index: StoredParam [*, k] int32, which rows, columns or experts. axis: -2, -1 or -3, where they are counted.
      config: of the adapter.
    """

    magnitude = None
    ids = False

    def __init__(self, config: S2FTConfig | ESFTConfig, delta, index, *, axis: int, axes: tuple = ()):
        """Args:
        config: S2FTConfig or ESFTConfig. delta, index, axis: as above. axes: logical axes of the weight, or ().
        """
        own = tuple(None if axes and i == len(axes) + axis else name for i, name in enumerate(axes))
        self.delta = AdapterParam(delta, axes=own) if axes else AdapterParam(delta)
        self.index = StoredParam(jnp.asarray(index, jnp.int32))
        self.config, self.axis = config, axis

    def updated(self, w):
        """Returns the weight [*e, d, o] with the change, in float32 or wider."""
        wide = jnp.promote_types(jnp.float32, w.dtype)
        index = value(self.index)

        def add(w, index, delta):
            return w.at[..., index].add(delta) if self.axis == -1 else w.at[index].add(delta)

        for _ in range(index.ndim - 1):  # separate weights
            add = jax.vmap(add)
        return add(w.astype(wide), index, value(self.delta).astype(wide))

    def linear(self, x, w, bias=None, *, ids=None, group_sizes=None, out_dtype=None):
        """Returns the output of the layer with this change; w is [d, o]."""
        del ids, group_sizes  # of low-rank adapters
        out_dtype = out_dtype or x.dtype
        wide = jnp.promote_types(jnp.float32, x.dtype)
        y: Any = ops.linear(x, w.astype(x.dtype), out_dtype=wide)
        delta, index = value(self.delta).astype(x.dtype), value(self.index)
        if self.axis == -2:
            y = y + ops.linear(x[..., index], delta, out_dtype=wide)
        else:
            y = y.at[..., index].add(ops.linear(x, delta, out_dtype=wide))
        return (y if bias is None else y + bias.astype(wide)).astype(out_dtype)

    def refresh(self, w, shards: int = 1) -> None:
        """Nothing follows from the weight."""

    def norm(self, w, shards: int = 1):
        """Returns None: there are no magnitudes."""
        return None

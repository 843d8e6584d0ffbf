"""What the core of `dora_linear` is given, and the products of rows with factors of one adapter or of several."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._grouped_matmul.api import grouped_matmul

# Rows up to which each row's own factors are gathered; more are sorted by adapter, so that each factor is read once.
GATHERED = 64


class Arguments(NamedTuple):
    """The arrays of the core, in its order; letters as in `dora_linear`.

    Attributes:
      x: [*tokens, d]. w: [d, o] floating or integer, or [e, d, o].
      a, b: [d, r] and [r, o]; with ids [n, d, r] and [n, r, o]; with group_sizes [e, d, r] and [e, r, o].
      gain: [o], [n, o] or [e, o] in the accumulator's dtype; None without magnitudes.
      bias: [o], or [e, o]; or None. w_scale: [o], or None.
      ids: [*tokens] or fewer leading axes of it, int32, -1 for no adapter; or None.
      group_sizes: [e] int32, of rows x [m, d]; or None.
      key: [k] uint32, of the dropout; or None.
    """

    x: Any
    w: Any
    a: Any
    b: Any
    gain: Any
    bias: Any
    w_scale: Any
    ids: Any
    group_sizes: Any
    key: Any

    @property
    def wide(self):
        """The dtype of sums."""
        floats = (z for z in self[:7] if z is not None and jnp.issubdtype(z.dtype, jnp.floating))
        return accumulator(*floats)


def dropped(x, a: Arguments, rate: float, generator: str):
    """Returns x with entries zeroed and the rest divided by 1 - rate: of the same bits in every dtype, and linear."""
    if a.key is None:
        return x
    bits = jax.random.bits(jax.random.wrap_key_data(a.key, impl=generator), x.shape, jnp.uint32)
    kept = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def expert_of_rows(a: Arguments):
    """Returns each row's expert [m], the last one's for rows behind the groups."""
    ends = jnp.cumsum(a.group_sizes)
    rows = jnp.sum(ends <= jnp.arange(a.x.shape[0])[:, None], axis=1, dtype=jnp.int32)
    return jnp.minimum(rows, ends.size - 1)


def per_row(values, a: Arguments, fill: float = 0):
    """Returns values [o] as they are, and [n or e, o] as those of each row, `fill` where a row has no adapter."""
    if values.ndim == 1:
        return values
    if a.group_sizes is not None:
        return values[expert_of_rows(a)]
    own = jnp.where(a.ids[..., None] >= 0, values[jnp.maximum(a.ids, 0)], fill)
    return own.reshape(*a.ids.shape, *[1] * (a.x.ndim - 1 - a.ids.ndim), values.shape[-1])


def sum_rows(each, values, a: Arguments):
    """Returns the transpose of `per_row`: sums of each [*tokens, o] in the shape of `values`, in the dtype of each."""
    if values.ndim == 1:
        return jnp.sum(each, axis=tuple(range(each.ndim - 1)))
    if a.ids is not None:
        each = jnp.sum(each, axis=tuple(range(a.ids.ndim, each.ndim - 1)))
    zeros = jnp.zeros(values.shape, each.dtype)
    _, pull = jax.vjp(lambda z: per_row(z, a._replace(x=a.x if a.ids is None else each)), zeros)
    return pull(each)[0]


class Meeting:
    """How rows meet the factors: all one factor, runs of rows their own (gathered), or rows in groups.

    The three products of a layer with x [*tokens, i] and factor [.., i, j]; sums, and results, in `wide`.
    """

    def __init__(self, a: Arguments, shared: bool):
        """Args:
        a: the core's arguments. shared: whether all rows meet one factor, as they do the weight beside adapters.
        """
        self.wide, self.tokens = a.wide, a.x.shape[:-1]
        self.sizes: Any = None
        self.order: Any = None
        self.own: Any = None
        if a.group_sizes is not None:
            self.sizes = a.group_sizes
        elif a.ids is not None and not shared:
            flat, n = a.ids.reshape(-1), a.a.shape[0]
            if a.ids.ndim < len(self.tokens) or flat.size <= GATHERED:
                self.own = flat
            else:
                chosen = jnp.where(flat < 0, n, flat)
                self.order = jnp.argsort(chosen, stable=True)
                self.rank = jnp.zeros_like(self.order).at[self.order].set(jnp.arange(flat.size), unique_indices=True)
                self.sizes = jnp.sum(chosen[:, None] == jnp.arange(n), axis=0, dtype=jnp.int32)

    def _rows(self, x):
        x = x.reshape(-1, x.shape[-1])
        if self.own is not None:
            return x.reshape(self.own.size, -1, x.shape[-1])
        return x if self.order is None else x[self.order]

    def _tokens(self, y):
        y = y.astype(self.wide)
        if self.own is not None:
            y = jnp.where((self.own >= 0)[:, None, None], y, 0)
        y = y if self.order is None else y[self.rank]
        return y.reshape(*self.tokens, y.shape[-1])

    def _factor(self, factor):
        return factor if self.own is None else factor[jnp.maximum(self.own, 0)]

    def product(self, x, factor, dtype=None):
        """Returns x @ factor [*tokens, j], rounded to `dtype` where one is given; 0 for rows without a factor."""
        factor = factor.astype(x.dtype)
        if self.sizes is not None:
            y = self._tokens(grouped_matmul(self._rows(x), factor, self.sizes))
        elif self.own is None:
            return jnp.matmul(x, factor, preferred_element_type=dtype or self.wide)
        else:
            y = self._tokens(jnp.matmul(self._rows(x), self._factor(factor), preferred_element_type=self.wide))
        return y if dtype is None else y.astype(dtype)

    def back(self, dy, factor, dtype=None):
        """Returns dy @ factor.T [*tokens, i], rounded to `dtype` where one is given."""
        return self.product(dy, jnp.swapaxes(factor, -1, -2), dtype)

    def outer(self, x, dy, factor, scale: float = 1.0):
        """Returns scale * x.T @ dy in the shape and dtype of `factor`, summed over the rows that met it."""
        x, dy = self._rows(x), self._rows(dy)
        if self.sizes is not None:
            _, pull = jax.vjp(lambda f: grouped_matmul(x, f.astype(x.dtype), self.sizes), factor)
            return (scale * pull(dy)[0].astype(self.wide)).astype(factor.dtype)
        each = jnp.einsum("...ti,...tj->...ij", x, dy, preferred_element_type=self.wide)
        if self.own is not None:
            each = jnp.where((self.own >= 0)[:, None, None], each, 0)
            each = jnp.zeros(factor.shape, self.wide).at[jnp.maximum(self.own, 0)].add(each)
        return (each if scale == 1 else scale * each).astype(factor.dtype)

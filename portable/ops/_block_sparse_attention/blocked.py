"""What the kernels share: the order of blocks around a kernel, and what a query sees as intervals of places.

A kernel has one function for each of: attention, the gradients of queries, those of keys. A block of queries holds
those of all heads of a lane (`arguments.Blocks`), filled up to the rows that the kernel wants.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from portable.ops._block_sparse_attention.arguments import Arrays, Blocks, Saved, as_sets, for_backward
from portable.selection import Impl

NOWHERE = jnp.iinfo(jnp.int32).max  # a place in no interval


class Core(NamedTuple):
    """A kernel's functions. Queries are [b, m, nq, R, d], keys [b, g, nk, C, d]; `see` is (intervals, places, lists).

    Attributes:
      attend: (q, k, v, see, scale) -> (out, highest, total), the last two [b, m, nq, R] in float32.
      gradients: (q, k, v, dout, highest, inverse, mean, see, scale) -> (dq, dk, dv).
      sizes: (rows, keys of a block, dtype) -> those that the kernel takes.
    """

    attend: Callable
    gradients: Callable
    sizes: Callable


class See(NamedTuple):
    """intervals [b or 1, nq, 2 * A, R] and places [b or 1, nk, A, C] int32; sets [b or 1, lists, nq, n] int32."""

    intervals: Any
    places: Any
    sets: Any


def form(core: Core, why_not: Callable, interpret: Callable) -> Impl:
    """Returns the implementation of the op by a kernel."""
    call = _Call(core)
    return Impl(
        fwd=lambda *arrays, **options: call.save(*arrays, **options)[0],
        save=call.save,
        bwd=call.bwd,
        why_not=why_not,
        interpret=interpret,
    )


def refuses(*arrays, block_q: int, block_k: int, dtypes: Sequence, **options) -> str | None:
    """Says in a sentence what no kernel takes; None where nothing speaks against one."""
    a = Arrays(*arrays)
    if 0 in (*a.q.shape, *a.k.shape, *a.v.shape, a.block_indices.size):
        return f"it needs at least one element; got q {list(a.q.shape)}, k {list(a.k.shape)}, v {list(a.v.shape)}."
    if a.q.dtype not in dtypes:
        return f"it needs {' or '.join(str(jnp.dtype(d)) for d in dtypes)}; got {a.q.dtype}."
    return None


class _Call:
    def __init__(self, core: Core):
        self.core = core

    def save(self, *arrays, block_q: int, block_k: int, is_causal: bool, scale: float):
        """See `reference.fwd`; returns its results, and `Saved`."""
        a = Arrays(*arrays)
        s = Blocks.of(a, block_q, block_k)
        given, see, _ = self._given(a, s, is_causal)
        out, highest, total = self.core.attend(*given, see, scale)
        numbers = (s.token_numbers(x[:, :, :, : s.rows]) for x in (highest, total))
        saved = Saved(s.tokens(out[:, :, :, : s.rows]), *numbers)
        return saved.results, saved

    def bwd(self, residuals, cotangents, *, block_q: int, block_k: int, is_causal: bool, scale: float):
        """The kernels compute the weights anew."""
        *arrays, saved = residuals
        a = Arrays(*arrays)
        s = Blocks.of(a, block_q, block_k)
        given, see, more = self._given(a, s, is_causal)
        dout, *numbers = for_backward(a, Saved(*saved), cotangents)
        filled = lambda x, axis=3: jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])  # noqa: E731
        numbers = [filled(s.numbers(x)) for x in numbers]
        dq, dk, dv = self.core.gradients(*given, filled(s.queries(dout)), *numbers, see, scale)
        found: dict[str, Any] = dict.fromkeys(Arrays._fields)
        found["q"] = s.tokens(dq[:, :, :, : s.rows])
        found |= {name: s.key_tokens(x[:, :, :, :block_k]) for name, x in (("k", dk), ("v", dv))}
        return tuple(found.values())

    def _given(self, a: Arrays, s: Blocks, is_causal: bool):
        """Returns q, k and v in blocks, what is seen, and how many rows were added to a block of queries."""
        rows, columns = self.core.sizes(s.rows, s.block_k, a.q.dtype)
        more, wider = rows - s.rows, columns - s.block_k
        fill = lambda x, n: jnp.pad(x, [(0, 0)] * 3 + [(0, n), (0, 0)])  # noqa: E731
        given = fill(s.queries(a.q), more), *(fill(s.keys(x), wider) for x in (a.k, a.v))
        return given, See(*_axes(a, s, is_causal, more, wider), as_sets(a.block_indices, s.nk)), more


def _axes(a: Arrays, s: Blocks, is_causal: bool, more: int, wider: int):
    """Returns the intervals of queries and the places of keys: positions, and segments where there are some."""
    least = jnp.iinfo(jnp.int32).min
    keys = jnp.arange(s.s, dtype=jnp.int32)[None] if a.kv_positions is None or not is_causal else a.kv_positions
    if is_causal:
        own = jnp.arange(s.t, dtype=jnp.int32)[None] if a.q_positions is None else a.q_positions
        ends = jnp.minimum(own, NOWHERE - 1) + 1  # own + 1 may be too large for int32
    else:
        ends = jnp.full((1, s.t), s.s, jnp.int32)
    firsts, ends, places = [jnp.full_like(ends, least)], [ends], [keys]
    if a.q_segments is not None:
        # An interval has an end behind it: the two highest numbers are one segment.
        asked, held = (jnp.minimum(x.astype(jnp.int32), NOWHERE - 1) for x in (a.q_segments, a.kv_segments))
        firsts, ends, places = [*firsts, asked], [*ends, asked + 1], [*places, held]

    def cut(xs, block: int, count: int, fill: int):
        xs = jnp.stack(jnp.broadcast_arrays(*(x.astype(jnp.int32) for x in xs)), 1)
        xs = jnp.pad(xs, ((0, 0), (0, 0), (0, block * count - xs.shape[2])), constant_values=fill)
        return jnp.swapaxes(xs.reshape(*xs.shape[:2], count, block), 1, 2)

    # What fills up a block of queries sees nothing, as its interval is empty.
    intervals = jnp.tile(cut([*firsts, *ends], s.block_q, s.nq, 0), (1, 1, 1, s.h // s.m))
    intervals = jnp.pad(intervals, ((0, 0), (0, 0), (0, 0), (0, more)))
    places = cut(places, s.block_k, s.nk, NOWHERE)
    return intervals, jnp.pad(places, ((0, 0), (0, 0), (0, 0), (0, wider)), constant_values=NOWHERE)

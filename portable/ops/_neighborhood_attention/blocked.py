"""What the kernels share: the order of tiles around a kernel, keys that all see, and the log-sum-exp's cotangent.

A kernel has one function for each of: attention, the gradients of queries, those of keys, over arrays [N, tokens,
heads, k] in the order of tiles (`layout`); here the op's arrays become such ones and back.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator
from portable.ops._neighborhood_attention import layout, tables
from portable.selection import Impl


class Tiles(NamedTuple):
    """How a call is cut, as a kernel reads it.

    Attributes:
      sides: of each axis.
      pairs: of tiles.
      intervals: [G or 1, T, 2 * rank, R] int32, what each query sees.
      places: [1 or b * G, S, rank, C] int32, where each key is.
    """

    sides: tuple[layout.Side, ...]
    pairs: layout.Pairs
    intervals: jax.Array
    places: jax.Array


class Core(NamedTuple):
    """A kernel's functions.

    Attributes:
      attend: (q, k, v, tiles, scale) -> (out, highest, total), the last two [N, tokens, h] in float32: of the scores of
        a query the highest, and the sum of their exponentials less it; -inf and 0 where it sees nothing.
      gradients: (q, k, v, dout, highest, inverse, mean, tiles, scale) -> (dq, dk, dv): weights are exp(score - highest)
        * inverse, and the cotangents of scores are weights * (dout . v - mean).
      cut: (axes, q, k, v) -> sides.
    """

    attend: Callable
    gradients: Callable
    cut: Callable


def form(core: Core, why_not: Callable, interpret: Callable) -> Impl:
    """Returns the implementation of the op by a kernel."""
    call = _Call(core)
    return Impl(fwd=call.fwd, bwd=call.bwd, why_not=why_not, interpret=interpret)


def refuses(q, k, v, rel_pos_bias, extra_k, extra_v, key_mask, *, dtypes: Sequence, **options) -> str | None:
    """Says in a sentence what no kernel takes; None where nothing speaks against one."""
    if 0 in (*q.shape, *k.shape, *v.shape):
        return f"it needs at least one element; got q {list(q.shape)}, v {list(v.shape)}."
    if q.dtype not in dtypes:
        return f"it needs {' or '.join(str(jnp.dtype(d)) for d in dtypes)}; got {q.dtype}."
    if rel_pos_bias is not None:
        return f"it knows no bias by offset; got rel_pos_bias {list(rel_pos_bias.shape)}."
    return None


class _Call:
    def __init__(self, core: Core):
        self.core = core

    def fwd(self, q, k, v, rel_pos_bias, extra_k, extra_v, key_mask, *, scale, **pattern):
        """See `reference.fwd`."""
        out, highest, total = self._forward(self._tiles(q, k, v, key_mask, pattern), q, k, v, extra_k, extra_v, scale)
        return out, highest + jnp.log(total)

    def bwd(self, residuals, cotangents, *, scale, **pattern):
        """Takes the forward again for its sums, from which the kernels compute weights anew."""
        q, k, v, _, extra_k, extra_v, key_mask = residuals
        dout, dlse = cotangents
        wide = accumulator(q, k, v)
        tiles = self._tiles(q, k, v, key_mask, pattern)
        out, highest, total = self._forward(tiles, q, k, v, extra_k, extra_v, scale)
        sees = total != 0  # no interval of the others holds a key
        mean = (out.astype(wide) * dout.astype(wide)).sum(-1) - dlse.astype(wide)
        mean, highest = jnp.where(sees, mean, 0), jnp.where(sees, highest, 0)
        inverse = jnp.where(sees, 1 / jnp.where(sees, total, 1), 0)
        given = [layout.to_tiles(x, tiles.sides) for x in (q, k, v, dout.astype(q.dtype), highest, inverse, mean)]
        grads = self.core.gradients(*given, tiles, scale)
        dq, dk, dv = (layout.from_tiles(x, tiles.sides) for x in grads)
        dextra_k = dextra_v = None
        if extra_k is not None:
            rows, given = _by_group(q, extra_k, wide), _by_group(dout, extra_k, wide)
            highest, inverse, mean = (_by_group(x[..., None], extra_k, wide) for x in (highest, inverse, mean))
            weights = jnp.exp(_scores(rows, extra_k, scale) - highest) * inverse
            slopes = jnp.einsum("bngrv,begv->bngre", given, extra_v.astype(wide))
            dscores = weights * (slopes - mean) * scale
            dq = dq + jnp.einsum("bngre,begk->bngrk", dscores, extra_k.astype(wide)).reshape(q.shape)
            dextra_k = jnp.einsum("bngre,bngrk->begk", dscores, rows).astype(extra_k.dtype)
            dextra_v = jnp.einsum("bngre,bngrv->begv", weights, given).astype(extra_v.dtype)
        return dq.astype(q.dtype), dk, dv, None, dextra_k, dextra_v, None

    def _tiles(self, q, k, v, key_mask, pattern) -> Tiles:
        sides = self.core.cut(tables.axes(q.shape[1:-2], **pattern), q, k, v)
        places, pairs = layout.places(sides), layout.pairs(sides)
        if key_mask is not None:
            _, columns = layout.rows(sides)
            seen = layout.to_tiles(key_mask, sides)
            seen = seen.reshape(seen.shape[0], -1, 1, columns)
            places = jnp.where(seen, places, layout.NOWHERE)
            pairs = pairs._replace(full=pairs.full & False)
        return Tiles(sides, pairs, layout.intervals(sides), places)

    def _forward(self, tiles: Tiles, q, k, v, extra_k, extra_v, scale):
        found = self.core.attend(*(layout.to_tiles(x, tiles.sides) for x in (q, k, v)), tiles, scale)
        out, high, sums = (layout.from_tiles(x, tiles.sides) for x in found)
        if extra_k is None:
            return out, high, sums
        wide = accumulator(q, k, v)
        scores = _scores(_by_group(q, extra_k, wide), extra_k, scale)
        first, kept = (_by_group(x[..., None], extra_k, wide) for x in (high, sums))
        highest = jnp.maximum(first, scores.max(-1, keepdims=True, initial=-jnp.inf))
        above = jnp.where(highest == -jnp.inf, 0, highest)
        kept, weights = kept * jnp.exp(first - above), jnp.exp(scores - above)
        total = kept + weights.sum(-1, keepdims=True)
        more = jnp.einsum("bngre,begv->bngrv", weights, extra_v.astype(wide))
        out = (_by_group(out, extra_k, wide) * kept + more) / jnp.where(total == 0, 1, total)
        return out.reshape(*q.shape[:-1], -1).astype(q.dtype), highest.reshape(high.shape), total.reshape(high.shape)


def _by_group(x, extra, dtype):
    """[b, *space, h, k] -> [b, n, g, r, k], with the g of extra [b, e, g, k]."""
    b, g = extra.shape[0], extra.shape[2]
    return x.astype(dtype).reshape(b, -1, g, x.shape[-2] // g, x.shape[-1])


def _scores(rows, extra_k, scale):
    return jnp.einsum("bngrk,begk->bngre", rows, extra_k.astype(rows.dtype)) * scale

"""The XLA form: a loop over steps of a few tiles; a tile's rows see all their keys at once, so a softmax is one pass.

The backward computes a tile's weights again from q and k; nothing of the size of the scores outlives a step. See
`tiles` for the letters.
"""

import functools
import math

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator, vary_together
from portable.ops._neighborhood_attention import tables, tiles
from portable.selection import Impl


def form(setting: tables.Setting) -> Impl:
    """Returns the form with a platform's setting."""
    return Impl(functools.partial(fwd, setting=setting), functools.partial(bwd, setting=setting))


def plan(shape, setting: tables.Setting, *, g: int, v: int, itemsize: int, tile=None, **pattern):
    """Returns the axes' cuts, and how many rows of the batch and key heads a step takes.

    Args:
      shape: of q.
      setting: of the platform.
      g, v, itemsize: key heads, width of values, bytes of a number.
      tile: queries of a tile for each axis; the setting's choice unless given.
      **pattern: window, stride, dilation and is_causal, for each axis.
    """
    b, *space, h, width = shape
    axes = tables.axes(space, **pattern)
    groups = math.prod(a.dilation for a in axes)
    key, pair = groups * (width + v) * itemsize, groups * 2 * (h // g) * max(4, itemsize)
    if tile is None:
        cut = tables.choose(axes, h // g, key, pair, setting)
    else:
        cut = tuple(tables.tiling(a, min(t, a.size)) for a, t in zip(axes, tile, strict=True))
    keys, rows = (math.prod(getattr(t, name) for t in cut) for name in ("width", "tile"))
    each = keys * (key + pair * rows)
    heads = _divisor(g, setting.budget // each)
    batch = _divisor(b, setting.budget // (heads * each)) if heads == g else 1
    taken = tables.steps(cut, batch * heads * each, setting)
    return [tiles.Cut(t, n) for t, n in zip(cut, taken, strict=True)], (batch, heads)


def _divisor(n: int, most: int) -> int:
    return next(i for i in range(max(1, min(n, most)), 0, -1) if n % i == 0)


def _dot(spec: str, x, y, dtype):
    wide = jnp.promote_types(jnp.float32, dtype)
    return jnp.einsum(spec, x.astype(dtype), y.astype(dtype), preferred_element_type=wide)


def _total(x):
    """Returns the sum over the last axis but one, as a product with ones."""
    ones = jnp.ones((1, x.shape[-2]), x.dtype)
    return jnp.einsum("ok,...kr->...or", ones, x, precision=jax.lax.Precision.HIGHEST)


def _steps(body, cuts, carry):
    """Runs body(carry, steps) -> (carry, y) over all steps; a single one needs no loop. Returns (carry, ys).

    Every y [b, G, h, queries.., k] is a part of space; the parts are put together.
    """
    trips = [c.trips for c in cuts]

    def unravel(i):
        steps = []
        for n in reversed(trips):
            steps.append(0 if n == 1 else i % n)
            i = i if n == 1 else i // n
        return tuple(reversed(steps))

    if math.prod(trips) == 1:
        return body(carry, (0,) * len(trips))
    carry, ys = jax.lax.scan(lambda c, i: body(c, unravel(i)), carry, jnp.arange(math.prod(trips)))

    def whole(y):
        rank = len(trips)
        y = y.reshape(*trips, *y.shape[1:])
        pairs = [i for j in range(rank) for i in (j, rank + 3 + j)]
        y = y.transpose(rank, rank + 1, rank + 2, *pairs, 2 * rank + 3)
        return y.reshape(*y.shape[:3], *(c.padded for c in cuts), y.shape[-1])

    return carry, jax.tree.map(whole, ys)


def _bias(table, cuts, steps, g: int):
    """Returns the bias of each pair of a step's tiles, [1, 1, g, M, R, K], from its table by offset."""
    x = table
    for cut, step in zip(cuts, steps, strict=True):
        ones = tiles.bias_tables(cut, step).astype(x.dtype)
        x = jnp.tensordot(x, ones, ((1,), (2,)), precision=jax.lax.Precision.HIGHEST)
    h, rank = x.shape[0], len(cuts)
    sizes = [s for c in cuts for s in (c.taken, c.tiles.tile, c.tiles.width)]
    x = x.reshape(g, h // g, *sizes)
    order = [2 + 3 * i + j for j in range(3) for i in range(rank)]
    x = x.transpose(0, *order[:rank], 1, *order[rank:])
    return x.reshape(1, 1, g, math.prod(c.taken for c in cuts), -1, math.prod(c.tiles.width for c in cuts))


class _Call:
    """What forward and backward share: the arrays, grouped and padded, and the weights of a step."""

    def __init__(self, arrays, cuts, scale: float) -> None:
        q, k, v, self.extra_k, self.extra_v, self.bias, key_mask = arrays
        self.axes, self.cuts, self.scale = [c.tiles.axis for c in cuts], cuts, scale
        self.h, self.g, self.dtype = q.shape[-2], k.shape[-2], q.dtype
        self.q = self.rows(q)
        self.k, self.v = tiles.grouped(k, self.axes), tiles.grouped(v, self.axes)
        self.seen = None if key_mask is None else tiles.grouped(key_mask[..., None, None], self.axes)

    def rows(self, x):
        """[b, *space, h, k] -> [b, G, h, n1, .., k], with queries for whole steps."""
        x = tiles.grouped(x, self.axes)
        more = [(0, c.padded - c.tiles.axis.size) for c in self.cuts]
        return jnp.pad(x, [(0, 0)] * 3 + more + [(0, 0)])

    def queries(self, x, steps):
        return tiles.queries(x, self.cuts, steps, self.g)

    def keys(self, x, steps):
        return tiles.keys(x, self.cuts, steps)

    def weights(self, q, k, bias, steps, *, flip: bool = False):
        """Returns exp(scores - highest) [b, G, g, M, R, K], those of extra keys (or None), their sum and the highest.

        A row that sees nothing has sum 0 and highest 0. With `flip` keys stand before rows.
        """
        axis, order = (-2, "KR") if flip else (-1, "RK")

        def dot(k, keys):
            pair = (k, q) if flip else (q, k)
            spec = f"{keys},bGgMRk" if flip else f"bGgMRk,{keys}"
            return _dot(f"{spec}->bGgM{order}", *pair, self.dtype) * self.scale

        scores = dot(k, "bGgMKk")
        if bias is not None:
            scores = scores + (jnp.swapaxes(bias, -1, -2) if flip else bias)
        mask = tiles.mask(self.cuts, steps, self.h // self.g, scores.dtype, flip=flip)
        if mask is not None:
            scores = scores + mask
        if self.seen is not None:
            shown = self.keys(self.seen, steps)
            scores = jnp.where(shown if flip else jnp.swapaxes(shown, -1, -2), scores, -jnp.inf)
        highest = scores.max(axis, keepdims=True)
        more = None
        if self.extra_k is not None:
            more = dot(self.extra_k, "bKgk")
            highest = jnp.maximum(highest, more.max(axis, keepdims=True, initial=-jnp.inf))
        highest = jax.lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))  # it cancels
        weights = jnp.exp(scores - highest)
        total = weights.sum(axis, keepdims=True)
        if more is not None:
            more = jnp.exp(more - highest)
            total = total + more.sum(axis, keepdims=True)
        return weights, more, total, highest


def fwd(q, k, v, rel_pos_bias, extra_k, extra_v, key_mask, *, setting, scale, **pattern):
    """See `reference.fwd`."""
    if not q.size:
        return jnp.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), jnp.zeros(q.shape[:-1], accumulator(q, k, v))
    cuts, share = plan(q.shape, setting, **_sizes(k, v), **pattern)

    def some(heads, bias, key_mask):
        call = _Call((*heads, bias, key_mask), cuts, scale)

        def step(carry, steps):
            rows = call.queries(call.q, steps)
            bias = None if call.bias is None else _bias(call.bias, cuts, steps, call.g)
            weights, more, total, highest = call.weights(rows, call.keys(call.k, steps), bias, steps)
            out = _dot("bGgMRK,bGgMKv->bGgMRv", weights, call.keys(call.v, steps), call.dtype)
            if more is not None:
                out = out + _dot("bGgMRe,begv->bGgMRv", more, call.extra_v, call.dtype)
            out = (out / jnp.where(total == 0, 1, total)).astype(q.dtype)
            lse = highest + jnp.log(total)
            return carry, tuple(tiles.unqueries(x, cuts, call.h) for x in (out, lse))

        _, found = _steps(step, cuts, None)
        return tuple(tiles.ungrouped(x, call.axes) for x in found), None

    (out, lse), _ = _batches(some, share, k.shape[-2], (q, k, v, extra_k, extra_v), rel_pos_bias, key_mask)
    return out, lse[..., 0]


def bwd(residuals, cotangents, *, setting, scale, **pattern):
    """Recomputes the weights of each step's tiles; the cotangents of keys are added up where tiles overlap."""
    q, k, v, rel_pos_bias, extra_k, extra_v, key_mask = residuals
    if not q.size:
        return tuple(None if x is None or x.dtype == bool else jnp.zeros_like(x) for x in residuals)
    cuts, share = plan(q.shape, setting, **_sizes(k, v), **pattern)
    wide = accumulator(q, k, v)

    def some(heads, bias, key_mask):
        *heads, dout, dlse = heads
        call = _Call((*heads, bias, key_mask), cuts, scale)
        dtype = call.dtype
        dout, dlse = call.rows(dout), call.rows(dlse)

        def step(carry, steps):
            dk, dv, dbias, dextra_k, dextra_v = carry
            rows, keys, values = call.queries(call.q, steps), call.keys(call.k, steps), call.keys(call.v, steps)
            given, given_lse = call.queries(dout, steps), jnp.swapaxes(call.queries(dlse, steps), -1, -2)
            bias, pull = None, None
            if call.bias is not None:
                bias, pull = jax.vjp(lambda table: _bias(table, cuts, steps, call.g), call.bias)
            # Keys before rows: of the five products, four then are plain ones, as the keys' cotangents are.
            weights, more, total, _ = call.weights(rows, keys, bias, steps, flip=True)
            alive, inverse = total > 0, 1 / jnp.where(total == 0, 1, total)
            weights = weights * inverse
            slopes = _dot("bGgMKv,bGgMRv->bGgMKR", values, given, dtype)
            mean = _total(weights * slopes)
            if more is not None:
                more = more * inverse
                more_slopes = _dot("begv,bGgMRv->bGgMeR", call.extra_v, given, dtype)
                mean = mean + (more * more_slopes).sum(-2, keepdims=True)
            mean = jnp.where(alive, mean - given_lse, 0)
            dscores = weights * (slopes - mean)
            drows = _dot("bGgMKR,bGgMKk->bGgMRk", dscores, keys, dtype)
            dkeys = _dot("bGgMKR,bGgMRk->bGgMKk", dscores, rows, dtype) * scale
            dvalues = _dot("bGgMKR,bGgMRv->bGgMKv", weights, given, dtype)
            if more is not None:
                dmore = more * (more_slopes - mean)
                drows = drows + _dot("bGgMeR,begk->bGgMRk", dmore, call.extra_k, dtype)
                dextra_k = dextra_k + _dot("bGgMeR,bGgMRk->begk", dmore, rows, dtype) * scale
                dextra_v = dextra_v + _dot("bGgMeR,bGgMRv->begv", more, given, dtype)
            if pull is not None:
                dbias = dbias + pull(jnp.swapaxes(dscores.sum((0, 1), keepdims=True), -1, -2))[0]
            dk, dv = tiles.add_keys(dk, dkeys, cuts, steps), tiles.add_keys(dv, dvalues, cuts, steps)
            return (dk, dv, dbias, dextra_k, dextra_v), tiles.unqueries(drows * scale, cuts, call.h)

        sums = (call.k, call.v, call.bias, call.extra_k, call.extra_v)
        sums = [None if x is None else jnp.zeros(x.shape, wide) for x in sums]
        sums = vary_together(call.q, *sums)[1:]
        (dk, dv, dbias, dextra_k, dextra_v), dq = _steps(step, cuts, tuple(sums))
        dq, dk, dv = (tiles.ungrouped(x, call.axes) for x in (dq, dk, dv))
        return (dq, dk, dv, dextra_k, dextra_v), dbias

    dout, dlse = cotangents
    heads = (q, k, v, extra_k, extra_v, dout, dlse[..., None])
    grads, dbias = _batches(some, share, k.shape[-2], heads, rel_pos_bias, key_mask)
    dq, dk, dv, dextra_k, dextra_v = (
        None if d is None else d.astype(x.dtype) for d, x in zip(grads, heads[:5], strict=True)
    )
    dbias = None if dbias is None else dbias.astype(rel_pos_bias.dtype)
    return dq, dk, dv, dbias, dextra_k, dextra_v, None


def _sizes(k, v) -> dict:
    return {"g": k.shape[-2], "v": v.shape[-1], "itemsize": k.dtype.itemsize}


def _batches(some, share: tuple[int, int], g: int, heads: tuple, bias, key_mask):
    """Runs `some` on a few rows of the batch and key heads at a time; its results are then put together.

    Args:
      some: (heads, bias, key_mask) -> (arrays like heads, the bias's gradient or None).
      share: rows of the batch and key heads at a time.
      g: key heads.
      heads: arrays [b, .., a multiple of g, k], or None.
      bias: [h, ..] or None.
      key_mask: [b, *space] or None.
    """
    batch, few = share
    b = heads[0].shape[0]
    if (batch, few) == (b, g):
        return some(heads, bias, key_mask)
    outer = (b // batch, g // few)

    def split(x):
        x = x.reshape(outer[0], batch, *x.shape[1:-2], outer[1], x.shape[-2] // outer[1], x.shape[-1])
        return jnp.moveaxis(x, -3, 1).reshape(-1, batch, *x.shape[2:-3], *x.shape[-2:])

    def join(x):
        x = jnp.moveaxis(x.reshape(*outer, *x.shape[1:]), 1, -3)
        return x.reshape(b, *x.shape[2:-3], -1, x.shape[-1])

    def spread(x, axis):  # what does not depend on the rows (0), or on the heads (1)
        x = jnp.expand_dims(x, axis)
        return jnp.broadcast_to(x, (*outer, *x.shape[2:])).reshape(-1, *x.shape[2:])

    cut = [None if x is None else split(x) for x in heads]
    bias = None if bias is None else spread(bias.reshape(outer[1], -1, *bias.shape[1:]), 0)
    key_mask = None if key_mask is None else spread(key_mask.reshape(outer[0], batch, *key_mask.shape[1:]), 1)
    found, dbias = jax.lax.map(lambda parts: some(*parts), (tuple(cut), bias, key_mask))
    if dbias is not None:
        dbias = dbias.reshape(*outer, *dbias.shape[1:]).sum(0).reshape(-1, *dbias.shape[2:])
    return jax.tree.map(join, found), dbias

"""Tiles of rows through the whole network of their expert: what lies between its products never leaves the tile."""

import functools

import jax
import jax.numpy as jnp

from portable.ops._grouped_matmul import tiles
from portable.ops._moe_ffn import compose
from portable.ops._moe_ffn.activations import activate
from portable.ops._moe_ffn.arguments import Arguments
from portable.selection import Impl


def implementation(tiling: tiles.Tiling) -> Impl:
    """Returns the implementation that walks a device's tiles."""

    def matmul(rows, w, group_sizes, transposed):
        return tiles.matmul(rows, w, group_sizes, tiling, transposed)

    def outer(rows, slopes, group_sizes, dtype, i):
        return tiles.outer(rows, slopes, group_sizes, dtype, i, tiling)

    engine = compose.Engine(matmul, outer)
    return Impl(
        fwd=lambda *arrays, **options: _forward(tiling, False, *arrays, **options)[0],
        save=functools.partial(_forward, tiling, True),
        bwd=functools.partial(_backward, engine, tiling),
    )


def _networks(a: Arguments):
    """Returns the experts' matrices that there are, and the position of each by name."""
    given = {name: w for name in ("w_gate", "w_up", "w_down") if (w := getattr(a, name)) is not None}
    return tuple(given.values()), {name: i for i, name in enumerate(given)}


def _forward(tiling: tiles.Tiling, keep: bool, *arrays, activation, capacity):
    """Returns the result, and the products with w_gate and w_up where `keep` is set."""
    del capacity
    a = Arguments(*arrays)
    plan = compose.make_plan(a)
    weights, at = _networks(a)
    tokens, rows = a.x.shape[0], plan.order.size
    # An expert stands once in a token's choices.
    tiling = tiling.for_rows(tokens)
    token = tiles.padded(plan.token, tiling.sizes[0])
    width, last = a.w_up[0].shape[1], token.size
    count = 2 if keep and a.w_gate is not None else 1 if keep else 0
    # Of unequal values: equal ones would be made once, and copied.
    empty = [jnp.full((last, width), i, a.x.dtype) for i in range(count)]
    empty = [jnp.zeros((last, a.x.shape[1]), a.x.dtype), *empty]
    carry = tiles.vary_together_like(a.x, *empty)

    def body(carry, tile):
        out, *kept = carry
        x = a.x[tile.read(token)]

        def product(name, bias, x):
            if name not in at:
                return None
            y = tile.product(at[name], x)
            return y if bias is None else y + bias[tile.e]

        gate, up = product("w_gate", a.b_gate, x), product("w_up", a.b_up, x)
        out = tile.write(out, product("w_down", a.b_down, activate(activation, gate, up).astype(a.x.dtype)))
        made = [s for s in (gate, up) if s is not None]
        return (out, *[tile.write(k, s) for k, s in zip(kept, made, strict=False)])

    out, *kept = tiles.walk(body, carry, weights, plan.group_sizes, tiling, last, rows)
    kept = [k[:rows] for k in kept]
    return compose.finish(a, plan, out[:rows]), (kept[0] if count == 2 else None, kept[-1] if kept else None)


def _backward(engine: compose.Engine, tiling: tiles.Tiling, residuals, cotangents, *, activation, capacity):
    """Returns the cotangents of `Arguments`; residuals are those arguments and what `_forward` kept."""
    del capacity
    *arrays, saved = residuals
    a, (dout,) = Arguments(*arrays), cotangents
    plan = compose.make_plan(a)
    weights, at = _networks(a)
    rows, dtype, wide = plan.order.size, a.x.dtype, a.weights.dtype
    tiling = tiling.for_rows(a.x.shape[0])
    token, weight = (tiles.padded(s, tiling.sizes[0]) for s in (plan.token, a.weights.reshape(-1)[plan.order]))
    kept = [tiles.padded(s, tiling.sizes[0]) for s in saved if s is not None]
    # Not in the place of what was kept: XLA would copy it whole at every tile. Of unequal values: equal ones would be
    # made once, and copied.
    rooms = [jnp.full_like(k, i) for i, k in enumerate((kept[0], *kept))]
    carry = tiles.vary_together_like(a.x, jnp.zeros((token.size, a.x.shape[1]), wide), jnp.zeros_like(weight), *rooms)

    def body(carry, tile):
        dx, dweight, hidden, *slopes = carry
        read = [tile.read(s).astype(wide) for s in kept]
        h, pull = jax.vjp(lambda *s: activate(activation, *([None] * (len(s) == 1)), *s), *read)
        dy = dout[tile.read(token)].astype(wide)
        dh = tile.product(at["w_down"], dy.astype(dtype), True)
        slope = jnp.sum(dh * h, axis=1)
        if a.b_down is not None:
            slope = slope + jnp.sum(dy * a.b_down[tile.e], axis=1)
        made = [s.astype(dtype) for s in pull(dh * tile.read(weight)[:, None])]
        names = [name for name in ("w_gate", "w_up") if name in at]
        dx_tile = sum(tile.product(at[name], s, True) for name, s in zip(names, made, strict=True))
        written = [tile.write(k, s) for k, s in zip(slopes, made, strict=True)]
        return (tile.write(dx, dx_tile), tile.write(dweight, slope), tile.write(hidden, h), *written)

    dx, dweight, hidden, *slopes = tiles.walk(body, carry, weights, plan.group_sizes, tiling, token.size, rows)
    real = (jnp.arange(rows) < plan.group_sizes.sum())[:, None]
    dy = jnp.where(real, dout[plan.token].astype(wide) * weight[:rows, None], 0).astype(dtype)
    dgate, dup = (None, *slopes) if len(slopes) == 1 else slopes
    hidden, dgate, dup = (None if s is None else s[:rows] for s in (hidden, dgate, dup))
    return compose.finish_bwd(engine, a, plan, hidden, dgate, dup, dy, dweight[:rows], dx[:rows])

"""`neighborhood_attention` on a TPU: tiles of queries walk along the tiles of keys that their windows touch.

The heads that share keys are rows of one tile. Runs by name: nothing here has been measured on a device.
"""

import math

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from portable.ops._neighborhood_attention import blocked, layout, tables
from portable.pallas_kernels import block_lists
from portable.pallas_kernels.tpu import _block_attention
from portable.selection import Impl

# By datasheets, not by measurement: scores pass through exponentials and sums at about a tenth of the rate of their
# products, so that a byte of a v6e's memory takes as long as a quarter of one; a step of the grid takes about 0.35 us.
COSTS = layout.Costs(keys=(128, 256), queries=512, fetch=128, visit=2048, mask=0.5)
SCORES = 1 << 19  # that a step holds
FAN = 8
STEP = 1 << 17  # what a step costs, in scores
SCALARS = 65_536  # pairs of tiles: their lists lie in a TPU's scalar memory, of 1 MiB


def _cut(axes, q, k, v):
    return layout.choose(axes, q.shape[-2] // k.shape[-2], COSTS)


def lists(sides, pairs: layout.Pairs, shared: int) -> list[block_lists.Steps]:
    """Returns the queries' and the keys' lists in steps; `shared` query heads read the same keys."""
    rows, columns = layout.rows(sides)
    queries, keys, full = pairs
    most = max(1, min(FAN, SCORES // (shared * rows * columns)))
    tiles = math.prod(s.count for s in sides)
    by_queries = block_lists.known(queries, keys, full, tiles)
    by_keys = block_lists.known(keys, queries, full, tiles * (rows // columns))
    return [
        block_lists.steps(x, block_lists.best_fan(x, most, STEP / (shared * rows * columns)))
        for x in (by_queries, by_keys)
    ]


class _Heads:
    """Arrays [N, tokens, heads, k] as blocks: [N, g, T, r * R, k] of queries, whose rows are the heads' tiles."""

    def __init__(self, q, k, tiles: blocked.Tiles):
        self.h, self.g = q.shape[2], k.shape[2]
        self.rows, self.columns = layout.rows(tiles.sides)
        intervals = jnp.tile(tiles.intervals, (1, 1, 1, self.h // self.g))
        self.sees = intervals, tiles.places

    def queries(self, x):
        """[N, tokens, h, k] -> [N, g, T, r * R, k]."""
        n, _, h, k = x.shape
        x = x.reshape(n, -1, self.rows, self.g, h // self.g, k).transpose(0, 3, 1, 4, 2, 5)
        return x.reshape(n, self.g, x.shape[2], -1, k)

    def tokens(self, x):
        """The inverse of `queries`."""
        n, g, count, _, k = x.shape
        x = x.reshape(n, g, count, self.h // g, self.rows, k).transpose(0, 2, 4, 1, 3, 5)
        return x.reshape(n, count * self.rows, self.h, k)

    def keys(self, x):
        """[N, tokens, g, k] -> [N, g, S, C, k]."""
        x = x.swapaxes(1, 2)
        return x.reshape(*x.shape[:2], -1, self.columns, x.shape[-1])

    def key_tokens(self, x):
        """The inverse of `keys`."""
        return x.reshape(*x.shape[:2], -1, x.shape[-1]).swapaxes(1, 2)


def _attend(q, k, v, tiles, scale):
    heads = _Heads(q, k, tiles)
    steps, _ = lists(tiles.sides, tiles.pairs, heads.h // heads.g)
    given = heads.queries(q), heads.keys(k), heads.keys(v)
    out, *sums = _block_attention.attend(*given, *heads.sees, steps, scale=scale)
    return heads.tokens(out), *(heads.tokens(x[..., None])[..., 0] for x in sums)


def _gradients(q, k, v, dout, highest, inverse, mean, tiles, scale):
    heads = _Heads(q, k, tiles)
    by_queries, by_keys = lists(tiles.sides, tiles.pairs, heads.h // heads.g)
    highest, inverse, mean = (heads.queries(x[..., None])[..., 0] for x in (highest, inverse, mean))
    given = heads.queries(q), heads.keys(k), heads.keys(v), heads.queries(dout), highest, inverse, mean
    dq = _block_attention.query_gradients(*given, *heads.sees, by_queries, scale=scale)
    dk, dv = _block_attention.key_gradients(*given, *heads.sees, by_keys, scale=scale)
    return heads.tokens(dq), heads.key_tokens(dk), heads.key_tokens(dv)


def why_not(q, k, v, *rest, scale, **pattern) -> str | None:
    """Says in a sentence why the kernel cannot take a call."""
    if reason := blocked.refuses(q, k, v, *rest, dtypes=(jnp.float32, jnp.bfloat16)):
        return reason
    sides = _cut(tables.axes(q.shape[1:-2], **pattern), q, k, v)
    numbers = math.prod(layout.count(s).pairs for s in sides)
    if numbers > SCALARS:
        return f"the lists of its tiles must fit into a TPU's scalar memory, {SCALARS} pairs; got {numbers}."
    return None


def interpret(part: str, *args, **options) -> tuple:
    """Runs `fwd` or `bwd` in Pallas' interpreter of a TPU; memory that nothing wrote is NaN."""
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
        return getattr(IMPL, part)(*args, **options)


IMPL: Impl = blocked.form(blocked.Core(_attend, _gradients, _cut), why_not, interpret)

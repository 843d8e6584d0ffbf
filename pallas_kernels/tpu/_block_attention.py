"""Attention over selected blocks on a TPU: what the kernels of neighborhood and block-sparse attention share.

The grid is (batch row, head, step), and a step is `fan` blocks of one own block's list (`block_lists`), whose numbers
are prefetched scalars: the pipeline fetches the blocks that they name. What a query sees is data: every key has a place
on each of a few axes, every query an interval of places on each, and it sees the keys inside all of its intervals. So
windows, causality by position, segments and masked keys are one comparison, which blocks that are listed as full skip.

Letters: N batch rows, H heads of queries, G of keys, T blocks of R queries, S blocks of C keys, A axes.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from portable.pallas_kernels.block_lists import FIRST, FULL, LAST, MASKED, Steps

LANES = 128
NOWHERE = jnp.iinfo(jnp.int32).max  # a place in no interval
# Below all scores, and finite, so that differences of it are no NaN. A row whose highest score it is sees nothing.
NEVER = -(2.0**126)
VMEM_BYTES = 48 << 20


class Sizes(NamedTuple):
    """Sizes of a call: heads of queries, rows of its lists and heads and steps of each, blocks a step, axes."""

    n: int
    heads: int
    lists: int
    list_heads: int
    steps: int
    fan: int
    axes: int
    scale: float

    def at(self, n, h, j):
        """Returns the number of a step of the grid in the flat lists."""
        row = (n if self.lists > 1 else 0) * self.list_heads + _shared(h, self.heads, self.list_heads)
        return row * self.steps + j


def attend(q, k, v, intervals, places, steps: Steps, *, scale: float):
    """Softmax attention of blocks of queries to the blocks of keys that their lists name.

    Args:
      q: [N, H, T, R, k]. k: [N, G, S, C, k]. v: [N, G, S, C, v]; H % G == 0.
      intervals: [N or fewer, T, 2 * A, R] int32, first places and ends; row i takes number i % their number.
      places: [N or fewer, S, A, C] int32, likewise.
      steps: the queries' lists, [N or 1, a divisor of H, ...].
      scale: of the scores.

    Returns:
      [N, H, T, R, v] in the dtype of q; and in float32 [N, H, T, R] the highest score of each query, and the sum of
      the exponentials of its scores less that one. For queries that see nothing they are 0, -inf and 0.
    """
    s = _sizes(q, steps, intervals, scale)
    n, heads, blocks, rows, _ = q.shape
    wide = v.shape[-1]
    out = [((n, heads, blocks, rows, wide), q.dtype), ((n, heads, blocks, 2, rows), jnp.float32)]
    scratch = [
        ((rows, 1), jnp.float32),
        ((rows, 1), jnp.float32),
        ((rows, wide), jnp.float32),
        ((rows, LANES), jnp.int32),
    ]
    out, sums = _call(s, _attend, steps, [q, intervals], [k, v, places], out, scratch, "block_attention")
    return out, sums[:, :, :, 0], sums[:, :, :, 1]


def query_gradients(q, k, v, dout, highest, inverse, mean, intervals, places, steps: Steps, *, scale: float):
    """Returns the cotangent of q in its dtype.

    Args:
      q, k, v, intervals, places, steps, scale: of `attend`.
      dout: [N, H, T, R, v], the cotangent of its result.
      highest, inverse: [N, H, T, R] float32, such that weights are exp(score - highest) * inverse. The log-sum-exp
        would do in place of both, were it not rounded: of scores in the thousands it keeps four digits.
      mean: [N, H, T, R] float32, the sum of result * dout, less the cotangent of the log-sum-exp.
    """
    s = _sizes(q, steps, intervals, scale)
    rows, wide = q.shape[3:]
    scratch = [((rows, wide), jnp.float32), ((rows, LANES), jnp.int32), ((rows, LANES), jnp.float32)]
    own, other = [q, dout, intervals, jnp.stack([highest, inverse, mean], 3)], [k, v, places]
    return _call(s, _query_gradients, steps, own, other, [(q.shape, q.dtype)], scratch, "block_attention_dq")[0]


def key_gradients(q, k, v, dout, highest, inverse, mean, intervals, places, steps: Steps, *, scale: float):
    """Returns the cotangents of k and v in their dtypes; `steps` are the keys' lists, the rest as `query_gradients`."""
    s = _sizes(q, steps, intervals, scale)
    share = q.shape[1] // k.shape[1]  # what heads that share keys give is added up outside
    kinds = [((q.shape[0], q.shape[1], *x.shape[2:]), x.dtype if share == 1 else jnp.float32) for x in (k, v)]
    scratch = [(x.shape[3:], jnp.float32) for x in (k, v)]
    own, other = [k, v, places], [q, dout, jnp.stack([highest, inverse, mean], 3), intervals]
    found = _call(s, _key_gradients, steps, own, other, kinds, scratch, "block_attention_dkv")
    if share == 1:
        return found
    return [
        x.reshape(x.shape[0], -1, share, *x.shape[2:]).sum(2).astype(y.dtype)
        for x, y in zip(found, (k, v), strict=True)
    ]


def _sizes(q, steps: Steps, intervals, scale: float) -> Sizes:
    lists, heads, count, fan = steps.other.shape
    return Sizes(q.shape[0], q.shape[1], lists, heads, count, fan, intervals.shape[2] // 2, scale)


def _call(s: Sizes, body, steps: Steps, own: list, other: list, outputs: list, scratch: list, name: str):
    """Runs a kernel body along its lists: `own` are the arrays that they belong to, `other` those that they name."""

    def spec(shape, number) -> pl.BlockSpec:
        if len(shape) == 5:  # [N, heads, blocks, rows, width]

            def of_head(n, h, j, *lists):
                return n, _shared(h, s.heads, shape[1]), number(s.at(n, h, j), *lists), 0, 0

            return pl.BlockSpec((1, 1, 1, *shape[3:]), of_head)

        def index(n, h, j, *lists):
            return 0 if shape[0] == 1 else jax.lax.rem(n, shape[0]), number(s.at(n, h, j), *lists), 0, 0

        return pl.BlockSpec((1, 1, *shape[2:]), index)

    def mine(at, own, other, kind):
        return own[at]

    def theirs(i: int):
        def number(at, own, other, kind):
            found = other[at * s.fan + i]
            return jnp.where(found < 0, ~found, found)

        return number

    specs = [spec(x.shape, mine) for x in own] + [spec(x.shape, theirs(i)) for x in other for i in range(s.fan)]
    return pl.pallas_call(
        functools.partial(body, s),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(s.n, s.heads, s.steps),
            in_specs=specs,
            out_specs=[spec(shape, mine) for shape, _ in outputs],
            scratch_shapes=[pltpu.VMEM(*one) for one in scratch],
        ),
        out_shape=[jax.ShapeDtypeStruct(*one) for one in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name=name,
    )(*[jnp.asarray(x).reshape(-1) for x in steps], *own, *[x for x in other for _ in range(s.fan)])


def _attend(s: Sizes, own, other, kind, q, intervals, *refs):
    """One step of the forward: an online softmax over its blocks at once."""
    keys, values, places = (refs[i * s.fan : i * s.fan + s.fan] for i in range(3))
    out, sums, highest, total, acc, seen_by = refs[3 * s.fan :]
    at, what = _step(s, kind)

    @pl.when(what & FIRST != 0)
    def _():
        highest[...] = jnp.full_like(highest, NEVER)
        total[...], acc[...] = jnp.zeros_like(total), jnp.zeros_like(acc)
        seen_by[...] = _columns(intervals[0, 0])

    def work(masked: bool):
        scores = [_dot(q[0, 0, 0], k[0, 0, 0], 1, 1) * s.scale for k in keys]
        if masked:
            shown = [_shown(p, other[at * s.fan + i]) for i, p in enumerate(places)]
            scores = [jnp.where(_rows_see(s, seen_by, p), x, NEVER) for x, p in zip(scores, shown, strict=True)]
        before = highest[...]
        new = functools.reduce(jnp.maximum, [x.max(1, keepdims=True) for x in scores], before)
        fade = jnp.exp(before - new)
        weights = [jnp.exp(x - new) for x in scores]
        total[...] = total[...] * fade + sum(w.sum(1, keepdims=True) for w in weights)
        found = [_dot(w.astype(v.dtype), v[0, 0, 0], 1, 0) for w, v in zip(weights, values, strict=True)]
        acc[...] = acc[...] * fade + sum(found)
        highest[...] = new

    pl.when(what & MASKED != 0)(lambda: work(True))
    pl.when(what & FULL != 0)(lambda: work(False))

    @pl.when(what & LAST != 0)
    def _():
        sees = highest[...] != NEVER  # so that NaN is passed on
        out[0, 0, 0] = jnp.where(sees, acc[...] / total[...], 0).astype(out.dtype)
        found = _as_row(jnp.where(sees, highest[...], -jnp.inf)), _as_row(jnp.where(sees, total[...], 0))
        sums[0, 0, 0] = jnp.concatenate(found)


def _query_gradients(s: Sizes, own, other, kind, q, dout, intervals, sums, *refs):
    """One step of the walk by queries: the weights again, and what they pass to the queries."""
    keys, values, places = (refs[i * s.fan : i * s.fan + s.fan] for i in range(3))
    dq, acc, seen_by, columns = refs[3 * s.fan :]
    at, what = _step(s, kind)

    @pl.when(what & FIRST != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        seen_by[...], columns[...] = _columns(intervals[0, 0]), _columns(sums[0, 0, 0])

    def work(masked: bool):
        found = acc[...]
        for i in range(s.fan):
            k, v = keys[i][0, 0, 0], values[i][0, 0, 0]
            seen = _rows_see(s, seen_by, _shown(places[i], other[at * s.fan + i])) if masked else None
            weights = _weights(s, q[0, 0, 0], k, columns, seen)
            dscores = weights * (_dot(dout[0, 0, 0], v, 1, 1) - columns[:, 2:3])
            found += _dot(dscores.astype(k.dtype), k, 1, 0)
        acc[...] = found

    pl.when(what & MASKED != 0)(lambda: work(True))
    pl.when(what & FULL != 0)(lambda: work(False))

    @pl.when(what & LAST != 0)
    def _():
        dq[0, 0, 0] = (acc[...] * s.scale).astype(dq.dtype)


def _key_gradients(s: Sizes, own, other, kind, k, v, places, *refs):
    """One step of the walk by keys. Scores are [R, C] as in the forward, so that they are the same to the last bit."""
    queries, douts, sums, intervals = (refs[i * s.fan : i * s.fan + s.fan] for i in range(4))
    dk, dv, k_acc, v_acc = refs[4 * s.fan :]
    at, what = _step(s, kind)

    @pl.when(what & FIRST != 0)
    def _():
        k_acc[...], v_acc[...] = jnp.zeros_like(k_acc), jnp.zeros_like(v_acc)

    def work(masked: bool):
        for i in range(s.fan):
            q, dout, columns = queries[i][0, 0, 0], douts[i][0, 0, 0], _columns(sums[i][0, 0, 0])
            seen = None
            if masked:
                seen = _rows_see(s, _columns(intervals[i][0, 0]), _shown(places, other[at * s.fan + i]))
            weights = _weights(s, q, k[0, 0, 0], columns, seen)
            v_acc[...] += _dot(weights.astype(dout.dtype), dout, 0, 0)
            dscores = weights * (_dot(dout, v[0, 0, 0], 1, 1) - columns[:, 2:3])
            k_acc[...] += _dot(dscores.astype(q.dtype), q, 0, 0)

    pl.when(what & MASKED != 0)(lambda: work(True))
    pl.when(what & FULL != 0)(lambda: work(False))

    @pl.when(what & LAST != 0)
    def _():
        dk[0, 0, 0] = (k_acc[...] * s.scale).astype(dk.dtype)
        dv[0, 0, 0] = v_acc[...].astype(dv.dtype)


def _step(s: Sizes, kind):
    """Returns the number of the grid's step in the flat lists, and its kind."""
    at = s.at(*map(pl.program_id, range(3)))
    return at, kind[at]


def _shared(h, heads: int, few: int):
    """Returns which of a few heads serves head h of `heads`."""
    return h if few == heads else jax.lax.div(h, heads // few)  # unlike //, known to kernels for a TPU that is not here


def _shown(places, number):
    """Returns the places [A, C] of a block's keys: nowhere, if the block is only read."""
    return jnp.where(number >= 0, places[0, 0], NOWHERE)


def _rows_see(s: Sizes, seen_by, places):
    """Returns which keys the queries see, [R, C], from their intervals as columns."""
    found = [
        (places[i : i + 1] >= seen_by[:, i : i + 1]) & (places[i : i + 1] < seen_by[:, s.axes + i : s.axes + i + 1])
        for i in range(s.axes)
    ]
    return functools.reduce(jnp.logical_and, found)


def _weights(s: Sizes, q, k, columns, seen):
    """Returns the weights of a block [R, C]; columns hold the highest score and the inverse of the sum."""
    scores = _dot(q, k, 1, 1) * s.scale
    scores = scores if seen is None else jnp.where(seen, scores, -jnp.inf)
    return jnp.exp(scores - columns[:, :1]) * columns[:, 1:2]


def _dot(x, y, i: int, j: int):
    """Contracts axis i of x with axis j of y, summed in float32."""
    return jax.lax.dot_general(x, y, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


def _columns(rows):
    """[few, size] -> [size, 128]; whole tiles are transposed."""
    few, size = rows.shape
    rows = jnp.concatenate([rows, jnp.zeros((LANES - few, size), rows.dtype)])
    if rest := -size % LANES:
        rows = jnp.concatenate([rows, jnp.zeros((LANES, rest), rows.dtype)], 1)
    return rows.T[:size]


def _as_row(column):
    """[size, 1] -> [1, size]."""
    size = column.shape[0]
    if rest := -size % LANES:
        column = jnp.concatenate([column, jnp.zeros((rest, 1), column.dtype)])
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1, :size]

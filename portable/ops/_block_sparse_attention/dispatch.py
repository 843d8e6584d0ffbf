"""A walk over blocks of keys: the queries that select a block are gathered, in tiles, and what they find is combined.

Pairs (block of queries, slot of its list) are sorted by the block of keys that they name, and each such group is filled
up to tiles of `size` pairs, as in a mixture's dispatch. A tile is one product with one block of keys. Letters: a lanes
at once, c blocks of queries, x pairs of a tile, z rows of a tile (pairs times rows of a pair), K keys of a block.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator, vary_together
from portable.ops._block_sparse_attention.arguments import Arrays, Blocks, Saved, as_sets, for_backward
from portable.selection import Impl

LANES = 8  # at once: they share the cost of a step


class Setting(NamedTuple):
    """rows: queries of a tile. room: numbers that the results of pairs may take until they are combined.

    few: the most queries sharing a list, and crowd: the fewest of them for a block of keys, for which the form pays.
    """

    rows: int
    room: int
    few: int
    crowd: int


class Plan(NamedTuple):
    """Where pairs are worked on.

    Attributes:
      unit: [tiles, a, x] the block of queries of each place in a tile, c where it is empty.
      block: [tiles, a] the block of keys of a tile.
      slot: [a, c, n] the place (tile * x + number) of each pair; what is not selected has one behind all.
      tiles: scalar, how many there are.
    """

    unit: Any
    block: Any
    slot: Any
    tiles: Any


def plan(sets, blocks: int, size: int) -> Plan:
    """Returns the plan of lists [a, c, n] without repetitions, in tiles of so many pairs."""
    lanes, c, n = sets.shape
    pairs = c * n
    most = pairs // size + min(blocks, pairs)
    flat = jnp.where(sets < 0, blocks, sets).reshape(lanes, pairs)
    if (blocks + 1) * pairs < 2**31:  # one array is sorted quicker than two
        packed = jnp.sort(flat * pairs + jnp.arange(pairs, dtype=jnp.int32))
        key, order = packed // pairs, packed % pairs
    else:
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        key = jnp.take_along_axis(flat, order, -1)
    search = jax.vmap(jnp.searchsorted, (0, None))
    starts = search(key, jnp.arange(blocks + 1, dtype=jnp.int32)).astype(jnp.int32)
    count = -(-(starts[:, 1:] - starts[:, :-1]) // size)
    ends = jnp.cumsum(count, -1, dtype=jnp.int32)
    first = jnp.pad(ends - count, ((0, 0), (0, 1)))
    at = jnp.take_along_axis(first * size - starts, key, -1) + jnp.arange(pairs, dtype=jnp.int32)
    at = jnp.where(key < blocks, at, most * size)
    lane = jnp.arange(lanes)[:, None]
    slot = jnp.zeros_like(at).at[lane, order].set(at, unique_indices=True)
    (unit,) = vary_together(sets, jnp.full((lanes, most * size), c, jnp.int32))[1:]
    unit = unit.at[lane, at].set(order // max(1, n), mode="drop")
    block = jax.vmap(functools.partial(jnp.searchsorted, side="right"), (0, None))(ends, jnp.arange(most))
    block = jnp.minimum(block, blocks - 1).astype(jnp.int32)
    unit = unit.reshape(lanes, most, size)
    return Plan(jnp.swapaxes(unit, 0, 1), block.T, slot.reshape(sets.shape), ends[:, -1].max())


def form(setting: Setting) -> Impl:
    """Returns the form with a platform's setting."""
    forward = functools.partial(_forward, setting)
    return Impl(
        fwd=lambda *arrays, **options: forward(*arrays, **options)[0],
        save=forward,
        bwd=functools.partial(_backward, setting),
        why_not=functools.partial(_why_not, setting),
    )


def _why_not(setting: Setting, *arrays, block_q: int, block_k: int, **options) -> str | None:
    a = Arrays(*arrays)
    s = Blocks.of(a, block_q, block_k)
    if min(s.b, s.t, s.s, s.h, s.n) == 0:
        return f"it needs a block and a query for it; got q {list(a.q.shape)}, k {list(a.k.shape)}, room for {s.n}."
    if s.rows > setting.few:
        return f"it pays where at most {setting.few} queries share a list; got {s.rows}."
    crowd = s.t * s.rows // s.block_q * s.n // s.nk
    if crowd < setting.crowd or block_k < 16:
        return (
            f"it pays where a block of at least 16 keys is selected by at least {setting.crowd} queries; got "
            f"{crowd} for each {block_k}."
        )
    return None


class _Call:
    """The arrays in lanes, and how many lanes and blocks of queries are worked on at once."""

    def __init__(self, setting: Setting, arrays, block_q: int, block_k: int, is_causal: bool, scale: float):
        a = self.a = Arrays(*arrays)
        s = self.s = Blocks.of(a, block_q, block_k)
        self.scale, self.wide, self.is_causal = scale, accumulator(a.q, a.k, a.v), is_causal
        count = s.b * s.m
        self.lanes = next(i for i in range(min(LANES, count), 0, -1) if count % i == 0)
        each = self.lanes * s.n * s.rows * (a.v.shape[-1] + a.q.shape[-1])
        trips = -(-s.nq // max(1, min(s.nq, setting.room // each)))
        self.units = -(-s.nq // trips)
        self.trips = -(-s.nq // self.units)
        pairs = self.units * s.n
        # A tile is no larger than a block's share of the pairs.
        self.size = max(1, min(setting.rows, pairs * s.rows // s.nk) // s.rows)
        self.k, self.v = (s.keys(x).reshape(s.b * s.g * s.nk, block_k, -1) for x in (a.k, a.v))
        own = jnp.arange(s.t, dtype=jnp.int32)[None] if a.q_positions is None else a.q_positions
        keys = jnp.arange(s.s, dtype=jnp.int32)[None] if a.kv_positions is None else a.kv_positions
        full = lambda x: jnp.broadcast_to(x, (s.b, x.shape[1]))  # noqa: E731
        self.q_position, self.k_position = s.by_query(full(own)), s.by_key(full(keys))
        self.segments = None if a.q_segments is None else (s.by_query(a.q_segments), s.by_key(a.kv_segments))

    def lists(self, sets):
        """[b, lists, nq, n] -> [b * m, nq, n]."""
        return self.s.lanes(sets)

    def rows(self, x):
        """[b, t, h, d] -> [b * m, nq, rows, d]."""
        x = self.s.queries(x)
        return x.reshape(-1, *x.shape[2:])

    def numbers(self, x):
        """[b, h, t] -> [b * m, nq, rows]."""
        x = self.s.numbers(x)
        return x.reshape(-1, *x.shape[2:])

    def over(self, body, carry, *arrays):
        """Runs body(carry, lanes [a], *parts [a, c, ...]) -> (carry, results [a, c, ...]) over all parts.

        Args:
          body: of a carry, the numbers of the lanes and the parts of arrays.
          carry: any.
          *arrays: [b * m, nq, ...]; lists are filled up with -1, the others with zeros.
        """
        outer = self.s.b * self.s.m // self.lanes
        spare = self.trips * self.units - self.s.nq

        def split(x):
            fill = -1 if x.dtype == jnp.int32 else 0
            x = jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
            x = x.reshape(outer, self.lanes, self.trips, self.units, *x.shape[2:])
            return jnp.swapaxes(x, 1, 2).reshape(-1, self.lanes, self.units, *x.shape[4:])

        def join(x):
            x = jnp.swapaxes(x.reshape(outer, self.trips, *x.shape[1:]), 1, 2)
            return x.reshape(outer * self.lanes, -1, *x.shape[4:])[:, : self.s.nq]

        number = jnp.arange(outer * self.trips, dtype=jnp.int32)

        def one(carry, given):
            i, *parts = given
            lanes = i // self.trips * self.lanes + jnp.arange(self.lanes, dtype=jnp.int32)
            return body(carry, (lanes, i % self.trips * self.units), *parts)

        carry, found = jax.lax.scan(one, carry, (number, *map(split, arrays)))
        return carry, tuple(map(join, found))

    def tile(self, where, p: Plan, i, rows):
        """Returns (flat blocks of keys [a], rows' parts [a, z, ...], k, what is seen [a, z, K]) of tile i."""
        s, (lanes, first) = self.s, where
        unit, block = (jax.lax.dynamic_index_in_dim(x, i, keepdims=False) for x in (p.unit, p.block))
        there = unit < self.units
        unit = jnp.minimum(unit, self.units - 1)
        lane = jnp.arange(self.lanes)[:, None]
        taken = [x[lane, unit].reshape(self.lanes, -1, *x.shape[3:]) for x in rows]
        at = lanes * s.g // s.m * s.nk + block
        batch, whole = lanes // s.m, jnp.minimum(first + unit, s.nq - 1)
        number = block[:, None] * s.block_k + jnp.arange(s.block_k, dtype=jnp.int32)
        by_row = lambda x: self.spread(x[batch[:, None], whole])  # noqa: E731
        seen = (number < s.s)[:, None] & self.spread(there[..., None])
        if self.is_causal:
            keys = number if self.a.kv_positions is None else self.k_position[batch, block]
            seen &= keys[:, None] <= by_row(self.q_position)
        if self.segments is not None:
            seen &= self.segments[1][batch, block][:, None] == by_row(self.segments[0])
        return at, taken, seen

    def spread(self, x):
        """[a, x, i or 1] -> [a, z, 1]."""
        s = self.s
        x = jnp.broadcast_to(x[:, :, None], (*x.shape[:2], s.h // s.m, s.block_q))
        return x.reshape(x.shape[0], -1, 1)

    def scores(self, q, k, seen):
        """Returns [a, z, K], -inf where a key is not seen."""
        return jnp.where(seen, self.dot("azk,aKk->azK", q, k) * self.scale, -jnp.inf)

    def dot(self, spec, x, y):
        """A product accumulated in float32."""
        return jnp.einsum(spec, x.astype(self.a.q.dtype), y.astype(self.a.q.dtype), preferred_element_type=self.wide)

    def zeros(self, *shape):
        """An accumulator; inside a `shard_map` it varies over the axes that the arguments vary over."""
        return vary_together(self.a.q, jnp.zeros(shape, self.wide))[1]

    def places(self, p: Plan):
        """Returns where each pair stands in flat results of tiles [a, c, n]; anywhere if it is not selected."""
        tiles, lanes = p.unit.shape[:2]
        slot = jnp.minimum(p.slot, tiles * self.size - 1)
        return (slot // self.size * lanes + jnp.arange(lanes)[:, None, None]) * self.size + slot % self.size

    def flat(self, x):
        """[tiles, a, z, ...] -> [tiles * a * x, rows, ...], by pairs."""
        return x.reshape(-1, self.s.rows, *x.shape[3:])

    def combined(self, x, p: Plan, share):
        """Returns the sum of share [a, c, n, rows] times what pairs found [tiles, a, z, d], over n: [a, c, rows, d]."""
        x = self.flat(x)

        # Slot by slot: XLA would compute a share again for each of the d numbers that it multiplies.
        def add(total, slot):
            at, share = slot
            share = share[..., None]
            return total + jnp.where(share != 0, share * x[at], 0), None

        slots = jnp.moveaxis(self.places(p), 2, 0), jnp.moveaxis(share, 2, 0)
        return jax.lax.scan(add, self.zeros(*share.shape[:2], *x.shape[1:]), slots)[0]


def _put(x, i, value):
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, 0)


def _forward(setting: Setting, *arrays, **options):
    """See `reference.fwd`; returns its results, and `Saved`."""
    c = _Call(setting, arrays, **options)
    s, a = c.s, c.a
    sets = as_sets(a.block_indices, s.nk)

    def part(carry, where, sets, q):
        p = plan(sets, s.nk, c.size)
        shape = p.unit.shape[0], c.lanes, c.size * s.rows

        def body(i, carry):
            out, sums = carry
            at, (rows,), seen = c.tile(where, p, i, (q,))
            scores = c.scores(rows, c.k[at], seen)
            highest = scores.max(-1)
            weights = jnp.exp(scores - jnp.where(highest == -jnp.inf, 0, highest)[..., None])
            found = c.dot("azK,aKv->azv", weights, c.v[at])
            return _put(out, i, found), _put(sums, i, jnp.stack([highest, weights.sum(-1)], -1))

        out, sums = jax.lax.fori_loop(0, p.tiles, body, (c.zeros(*shape, a.v.shape[-1]), c.zeros(*shape, 2)))
        chosen, of = (sets >= 0)[..., None], c.flat(sums)[c.places(p)]
        highest, total = (jnp.where(chosen, of[..., i], x) for i, x in enumerate((-jnp.inf, 0)))
        top = highest.max(2)
        share = jnp.exp(highest - jnp.where(top == -jnp.inf, 0, top)[:, :, None])
        total = (share * total).sum(2)
        out = c.combined(out, p, share) / jnp.where(total == 0, 1, total)[..., None]
        return carry, (out.astype(a.q.dtype), top, total)

    _, (out, highest, total) = c.over(part, None, c.lists(sets), c.rows(a.q))
    saved = Saved(s.tokens(out), s.token_numbers(highest), s.token_numbers(total))
    return saved.results, saved


def _backward(setting: Setting, residuals, cotangents, **options):
    """The weights of each tile again; the queries' cotangents are combined as the results were."""
    *arrays, saved = residuals
    c = _Call(setting, arrays, **options)
    s, a = c.s, c.a
    dout, *numbers = for_backward(a, saved, cotangents)
    numbers = jnp.stack([c.numbers(x) for x in numbers], -1)
    sets = as_sets(a.block_indices, s.nk)

    def part(carry, where, sets, *rows):
        p = plan(sets, s.nk, c.size)

        def body(i, carry):
            dk, dv, dq = carry
            at, (q, dout, numbers), seen = c.tile(where, p, i, rows)
            highest, inverse, mean = (numbers[..., j, None] for j in range(3))
            k, v = c.k[at], c.v[at]
            weights = jnp.exp(c.scores(q, k, seen) - highest) * inverse
            slopes = c.dot("azv,aKv->azK", dout, v)
            dscores = weights * (slopes - mean) * c.scale
            dk = dk.at[at].add(c.dot("azK,azk->aKk", dscores, q))
            dv = dv.at[at].add(c.dot("azK,azv->aKv", weights, dout))
            return dk, dv, _put(dq, i, c.dot("azK,aKk->azk", dscores, k))

        dq = c.zeros(p.unit.shape[0], c.lanes, c.size * s.rows, a.q.shape[-1])
        *carry, dq = jax.lax.fori_loop(0, p.tiles, body, (*carry, dq))
        chosen = jnp.broadcast_to((sets >= 0)[..., None], (*sets.shape, s.rows)).astype(dq.dtype)
        dq = c.combined(dq, p, chosen)
        return tuple(carry), (dq.astype(a.q.dtype),)

    zeros = c.zeros(*c.k.shape), c.zeros(*c.v.shape)
    (dk, dv), (dq,) = c.over(part, zeros, c.lists(sets), c.rows(a.q), c.rows(dout), numbers)
    found: dict[str, Any] = dict.fromkeys(Arrays._fields)
    found |= {"q": s.tokens(dq), "k": s.key_tokens(dk).astype(a.k.dtype), "v": s.key_tokens(dv).astype(a.v.dtype)}
    return tuple(found.values())

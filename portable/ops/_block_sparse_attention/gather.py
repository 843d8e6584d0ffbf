"""A loop over steps of a few blocks of queries, whose selected keys are gathered: a softmax is one pass.

The backward computes a step's weights again from q and k; nothing of the size of the scores outlives a step.
Letters of einsums: a lanes, u blocks of queries, q rows (queries of the heads of a lane), K gathered keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from portable.ops._arguments import accumulator, vary_together
from portable.ops._block_sparse_attention.arguments import Arrays, Blocks, Saved, as_sets, for_backward
from portable.selection import Impl


def form(scores: int) -> Impl:
    """Returns the form whose steps hold about so many scores."""
    forward = functools.partial(_forward, scores)
    return Impl(
        fwd=lambda *arrays, **options: forward(*arrays, **options)[0],
        save=forward,
        bwd=functools.partial(_backward, scores),
    )


class _Step(NamedTuple):
    """What a step reads.

    Attributes:
      at: [a, u, n] of flat blocks of keys.
      seen: [a, u, 1, i or 1, K].
      k, v: [a, u, K, d].
    """

    at: Any
    seen: Any
    k: Any
    v: Any


class _Call:
    def __init__(self, scores: int, arrays, block_q: int, block_k: int, is_causal: bool, scale: float):
        a = self.a = Arrays(*arrays)
        s = self.s = Blocks.of(a, block_q, block_k)
        self.is_causal, self.scale, self.wide = is_causal, scale, accumulator(a.q, a.k, a.v)
        self.each = s.rows * s.n * s.block_k
        count = s.b * s.m
        self.units = max(1, min(s.nq, scores // max(1, self.each)))
        self.trips = -(-s.nq // self.units)
        self.units = -(-s.nq // self.trips)
        most = scores // max(1, self.each * self.units) if self.trips == 1 else 1
        self.lanes = next(i for i in range(max(1, min(count, most)), 0, -1) if count % i == 0)
        self.sets = as_sets(a.block_indices, s.nk).reshape(s.b * s.lists, s.nq, s.n)
        self.k, self.v = (s.keys(x).reshape(s.b * s.g * s.nk, block_k, -1) for x in (a.k, a.v))
        # Queries see keys whose number in their row is below a limit; where keys have positions, those are compared.
        limit = jnp.full((s.b, s.t), s.s, jnp.int32)
        if is_causal and a.kv_positions is None:
            own = jnp.arange(s.t, dtype=jnp.int32) if a.q_positions is None else a.q_positions
            limit = jnp.minimum(limit, jnp.minimum(own, s.s - 1) + 1)  # own + 1 may be too large for int32
        by_query = {"limit": limit, "segment": a.q_segments}
        by_key: dict[str, Any] = {"segment": a.kv_segments}
        if is_causal and a.kv_positions is not None:
            own = jnp.broadcast_to(jnp.arange(s.t, dtype=jnp.int32), (s.b, s.t))
            by_query["position"] = own if a.q_positions is None else a.q_positions
            by_key["position"] = a.kv_positions
        self.by_query = {name: s.by_query(x) for name, x in by_query.items() if x is not None}
        self.by_key = {name: s.by_key(x).reshape(s.b * s.nk, block_k) for name, x in by_key.items() if x is not None}

    def rows(self, x):
        """[b, t, h, d] -> [b * m, nq, r * i, d]."""
        x = self.s.queries(x)
        return x.reshape(-1, *x.shape[2:])

    def numbers(self, x):
        """[b, h, t] -> [b * m, nq, r * i]."""
        x = self.s.numbers(x)
        return x.reshape(-1, *x.shape[2:])

    def over(self, body, carry, *by_rows):
        """Runs body(carry, step, *rows) -> (carry, [a, u, ...] each) over all steps; returns (carry, [b * m, nq, ...]).

        Args:
          body: of a carry, a `_Step` and the step's part of each of `by_rows`.
          carry: any.
          *by_rows: [b * m, nq, ...].
        """
        s, count = self.s, self.s.b * self.s.m
        spare = self.trips * self.units - s.nq

        def whole(x):
            return jnp.pad(x, ((0, 0), (0, spare), *[(0, 0)] * (x.ndim - 2)))

        by_rows = [whole(x) for x in by_rows]
        sets = jnp.pad(self.sets, ((0, 0), (0, spare), (0, 0)), constant_values=-1)
        by_query = {name: whole(x) for name, x in self.by_query.items()}
        lane_of = lambda x, few, i: (i * self.lanes + jnp.arange(self.lanes)) * few // s.m  # noqa: E731

        def one(carry, i):
            lane, first = i // self.trips, i % self.trips * self.units
            cut = lambda x, lanes: jax.lax.dynamic_slice_in_dim(x, first, self.units, 1)[lanes]  # noqa: E731
            given = [
                jax.lax.dynamic_slice(
                    x, (lane * self.lanes, first, *[0] * (x.ndim - 2)), (self.lanes, self.units, *x.shape[2:])
                )
                for x in by_rows
            ]
            batch = lane_of(sets, 1, lane)
            chosen = cut(sets, lane_of(sets, s.lists, lane))
            seen_by = {name: cut(x, batch) for name, x in by_query.items()}
            step = self.step(chosen, batch, lane_of(sets, s.g, lane), seen_by)
            return body(carry, step, *given)

        steps = count // self.lanes * self.trips
        if steps == 1:
            carry, found = one(carry, 0)
        else:
            carry, found = jax.lax.scan(one, carry, jnp.arange(steps, dtype=jnp.int32))

        def joined(x):
            x = x.reshape(count // self.lanes, self.trips, self.lanes, self.units, *x.shape[(3 if steps > 1 else 2) :])
            return jnp.swapaxes(x, 1, 2).reshape(count, self.trips * self.units, *x.shape[4:])[:, : s.nq]

        return carry, tuple(map(joined, found))

    def step(self, chosen, batch, heads, seen_by) -> _Step:
        """Returns the step of lists [a, u, n], of these rows of the batch and of b * g heads of keys [a]."""
        s, (lanes, units) = self.s, chosen.shape[:2]
        block = jnp.maximum(chosen, 0)
        at = heads[:, None, None] * s.nk + block
        k, v = (x[at].reshape(lanes, units, s.n * s.block_k, x.shape[-1]) for x in (self.k, self.v))
        number = jnp.where(chosen >= 0, chosen * s.block_k, s.s)[..., None] + jnp.arange(s.block_k, dtype=jnp.int32)
        rows = lambda name: seen_by[name][:, :, None, :, None]  # noqa: E731
        keys = lambda x: x.reshape(lanes, units, 1, 1, -1)  # noqa: E731
        seen = keys(number) < (rows("limit") if self.is_causal else s.s)
        at_keys = batch[:, None, None] * s.nk + block
        if "position" in self.by_key:
            seen &= keys(self.by_key["position"][at_keys]) <= rows("position")
        if "segment" in self.by_key:
            seen &= keys(self.by_key["segment"][at_keys]) == rows("segment")
        return _Step(at, seen, k, v)

    def scores(self, q, step: _Step):
        """Returns [a, u, r, i, K], -inf where a key is not seen."""
        s = self.s
        found = self.dot("auqk,auKk->auqK", q, step.k) * self.scale
        found = found.reshape(*q.shape[:2], -1, s.block_q, found.shape[-1])
        return jnp.where(step.seen, found, -jnp.inf).reshape(*q.shape[:3], -1)

    def dot(self, spec, x, y):
        """A product accumulated in float32."""
        return jnp.einsum(spec, x.astype(self.a.q.dtype), y.astype(self.a.q.dtype), preferred_element_type=self.wide)


def _some(arrays, block_q: int, block_k: int, **options) -> bool:
    """Whether there is a pair of a query and a key that could be selected."""
    s = Blocks.of(Arrays(*arrays), block_q, block_k)
    return min(s.b, s.t, s.s, s.h, s.n) > 0


def _forward(scores: int, *arrays, **options):
    """See `reference.fwd`; returns its results, and `Saved`."""
    if not _some(arrays, **options):
        a = Arrays(*arrays)
        (b, t, h, _), width = a.q.shape, a.v.shape[-1]
        highest = jnp.full((b, h, t), -jnp.inf, accumulator(a.q, a.k, a.v))
        out, highest = vary_together(a.q, jnp.zeros((b, t, h, width), a.q.dtype), highest)[1:]
        saved = Saved(out, highest, jnp.zeros_like(highest))
        return saved.results, saved
    c = _Call(scores, arrays, **options)
    s, a = c.s, c.a

    def body(carry, step, q):
        found = c.scores(q, step)
        highest = found.max(-1, keepdims=True)
        weights = jnp.exp(found - jnp.where(highest == -jnp.inf, 0, highest))
        total = weights.sum(-1, keepdims=True)
        out = c.dot("auqK,auKv->auqv", weights, step.v) / jnp.where(total == 0, 1, total)
        return carry, (out.astype(a.q.dtype), highest[..., 0], total[..., 0])

    _, (out, highest, total) = c.over(body, None, c.rows(a.q))
    saved = Saved(s.tokens(out), s.token_numbers(highest), s.token_numbers(total))
    return saved.results, saved


def _backward(scores: int, residuals, cotangents, **options):
    """The weights of each step again; Dao et al. 2022 (arXiv 2205.14135), algorithm 4, with a cotangent of lse."""
    *arrays, saved = residuals
    found: dict[str, Any] = dict.fromkeys(Arrays._fields)
    if not _some(arrays, **options):
        return tuple((found | {name: jnp.zeros_like(getattr(Arrays(*arrays), name)) for name in "qkv"}).values())
    c = _Call(scores, arrays, **options)
    s, a = c.s, c.a
    dout, *numbers = for_backward(a, saved, cotangents)

    def body(carry, step, q, dout, highest, inverse, mean):
        dk, dv = carry
        weights = jnp.exp(c.scores(q, step) - highest[..., None]) * inverse[..., None]
        slopes = c.dot("auqv,auKv->auqK", dout, step.v)
        dscores = weights * (slopes - mean[..., None]) * c.scale
        dq = c.dot("auqK,auKk->auqk", dscores, step.k)
        blocks = lambda x: x.reshape(*step.at.shape, s.block_k, -1)  # noqa: E731
        dk = dk.at[step.at].add(blocks(c.dot("auqK,auqk->auKk", dscores, q)))
        dv = dv.at[step.at].add(blocks(c.dot("auqK,auqv->auKv", weights, dout)))
        return (dk, dv), (dq.astype(a.q.dtype),)

    zeros = vary_together(a.q, *(jnp.zeros(x.shape, c.wide) for x in (c.k, c.v)))[1:]
    given = c.rows(a.q), c.rows(dout), *map(c.numbers, numbers)
    (dk, dv), (dq,) = c.over(body, zeros, *given)
    found["q"] = s.tokens(dq)
    found["k"], found["v"] = s.key_tokens(dk).astype(a.k.dtype), s.key_tokens(dv).astype(a.v.dtype)
    return tuple(found.values())

"""Online softmax over pairs of blocks: scores of one pair at a time, forwards and backwards."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from portable.ops._arguments import accumulator, vary_together
from portable.ops._attention.arguments import Arrays, Rules
from portable.ops._attention.blocks import Axis, blocks, pairs
from portable.selection import Impl


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A call in blocks: arrays lead with the number of a block, and head h is (g, r) of its group."""

    rules: Rules
    queries: Axis
    keys: Axis
    every: np.ndarray  # pairs without a mask
    some: np.ndarray  # pairs with one
    wide: Any
    q: Any  # [i, b, g, r, q, k]
    k: Any  # [j, b, g, s, k]
    v: Any  # [j, b, g, s, v]
    per_query: dict[str, Any]  # [i, b, q]
    per_key: dict[str, Any]  # [j, b, s]
    mask_arrays: tuple
    score_arrays: tuple

    def grouped(self, x):
        """[b, t, h, d] -> [i, b, g, r, q, d]."""
        b, t, h, d = x.shape
        groups = self.k.shape[2]
        return jnp.transpose(self.queries.split(x.reshape(b, t, groups, h // groups, d)), (0, 1, 3, 4, 2, 5))

    def flat(self, x):
        """[i, b, g, r, q, d] -> [b, t, h, d]."""
        x = self.queries.join(jnp.transpose(x, (0, 1, 4, 2, 3, 5)))
        return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])

    def rows(self, x, fill: float = 0):
        """[b, h, t] -> [i, b, g, r, q]."""
        b, h, t = x.shape
        groups = self.k.shape[2]
        return self.queries.split(x.reshape(b, groups, h // groups, t), 3, fill)

    def over(self, body: Callable, carry: Any) -> Any:
        """Runs `body(carry, i, j, masked)` for every pair of blocks that see each other."""
        for which, masked in ((self.every, False), (self.some, True)):
            if len(which) == 1:
                carry = body(carry, int(which[0, 0]), int(which[0, 1]), masked)
            elif len(which):
                step = lambda c, ij, masked=masked: (body(c, ij[0], ij[1], masked), None)  # noqa: E731
                carry, _ = jax.lax.scan(step, carry, jnp.asarray(which))
        return carry

    def positions(self, i, j):
        """Returns positions of a block's queries and keys, [b, q] and [b, s], without b where all rows agree."""
        q, k = self.per_query.get("position"), self.per_key.get("position")
        q = i * self.queries.size + jnp.arange(self.queries.size, dtype=jnp.int32) if q is None else _at(q, i)
        k = j * self.keys.size + jnp.arange(self.keys.size, dtype=jnp.int32) if k is None else _at(k, j)
        return q, k

    def indices(self, i, j) -> tuple:
        """Returns what a mod takes beside the score."""
        b, g, r = self.q.shape[1:4]
        rows, heads = jnp.arange(b, dtype=jnp.int32), jnp.arange(g * r, dtype=jnp.int32).reshape(g, r)
        return vary_together(self.q, rows, heads, *self.positions(i, j))[1:]

    def modified(self, i, j) -> Callable | None:
        """Returns the function (what score_mod closes over, scores) -> scores of a pair; None for the identity."""
        rules = self.rules
        if rules.score_mod is None and rules.soft_cap is None:
            return None

        def modify(arrays, scores):
            if rules.score_mod is not None:
                scores = rules.score_mod.on_block(arrays, scores, *self.indices(i, j)).astype(self.wide)
            return scores if rules.soft_cap is None else rules.soft_cap * jnp.tanh(scores / rules.soft_cap)

        return modify

    def masked(self, scores, i, j):
        """Returns the scores with -inf where a query does not see a key."""
        rules, parts = self.rules, []
        q, k = self.positions(i, j)
        if rules.left is not None or rules.right is not None:
            apart = (k[..., None, :] - q[..., :, None])[..., None, None, :, :]
            parts += [] if rules.left is None else [apart >= -rules.left]
            parts += [] if rules.right is None else [apart <= rules.right]
        if self.keys.count * self.keys.size != self.keys.length:
            parts.append(j * self.keys.size + jnp.arange(self.keys.size) < self.keys.length)
        if "mask" in self.per_key:
            parts.append(_at(self.per_key["mask"], j)[:, None, None, None, :])
        if "segment" in self.per_key:
            same = _at(self.per_query["segment"], i)[:, :, None] == _at(self.per_key["segment"], j)[:, None, :]
            parts.append(same[:, None, None])
        if rules.mask_mod is not None:
            parts.append(rules.mask_mod.on_block(self.mask_arrays, None, *self.indices(i, j)))
        for part in parts:
            scores = jnp.where(part, scores, -jnp.inf)
        return scores

    def product(self, i, j):
        """Returns the scaled products of a pair's queries and keys, [b, g, r, q, s]."""
        return self.einsum("bgrqk,bgsk->bgrqs", _at(self.q, i), _at(self.k, j)) * self.rules.scale

    def einsum(self, spec, *operands):
        """A product accumulated in float32."""
        return jnp.einsum(spec, *operands, preferred_element_type=self.wide)

    def full(self, shape, value):
        """An accumulator; inside a `shard_map` it varies over the axes that the arguments vary over."""
        return vary_together(self.q, jnp.full(shape, value, self.wide))[1]


def _walk(limits: tuple[int, int], a: Arrays, rules: Rules) -> _Walk:
    (b, t, h, width), (s, g) = a.q.shape, a.k.shape[1:3]
    queries, keys = blocks(t, limits[0]), blocks(s, limits[1])
    wide = accumulator(a.q, a.k, a.v, a.sinks)
    counted = a.q_positions is None and a.kv_positions is None
    every, some = pairs(queries, keys, rules.left, rules.right) if counted else pairs(queries, keys, None, None)
    limited = rules.left is not None or rules.right is not None
    everywhere = a.key_mask is not None or a.q_segments is not None or rules.mask_mod is not None
    if everywhere or (limited and not counted):
        every, some = every[:0], np.concatenate([every, some])
        some = some[np.lexsort((some[:, 1], some[:, 0]))]
    per_query = {"position": a.q_positions, "segment": a.q_segments}
    per_key = {"position": a.kv_positions, "segment": a.kv_segments, "mask": a.key_mask}
    return _Walk(
        rules=rules,
        queries=queries,
        keys=keys,
        every=every,
        some=some,
        wide=wide,
        q=jnp.transpose(queries.split(a.q.reshape(b, t, g, h // g, width)), (0, 1, 3, 4, 2, 5)),
        k=jnp.swapaxes(keys.split(a.k), 2, 3),
        v=jnp.swapaxes(keys.split(a.v), 2, 3),
        per_query={name: queries.split(x) for name, x in per_query.items() if x is not None},
        per_key={name: keys.split(x) for name, x in per_key.items() if x is not None},
        mask_arrays=a.mask_arrays,
        score_arrays=a.score_arrays,
    )


def _at(x, i):
    return x[i] if isinstance(i, int) else jax.lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x, i, value):
    return jax.lax.dynamic_update_index_in_dim(x, value, i, 0)


def _fwd(limits: tuple[int, int], *arrays, **options):
    """See `reference.fwd`. Milakov and Gimelshein 2018 (arXiv 1805.02867), algorithm 3, a block at a time."""
    a, rules = Arrays(*arrays), Rules(**options)
    if a.out is not None:
        return _known(limits, tuple(options.items()), *a)
    w = _walk(limits, a, rules)
    rows, width = w.q.shape[:-1], w.v.shape[-1]

    def body(carry, i, j, masked):
        out, top, total = carry
        scores, modify = w.product(i, j), w.modified(i, j)
        scores = scores if modify is None else modify(w.score_arrays, scores)
        scores = w.masked(scores, i, j) if masked else scores
        before = _at(top, i)
        new = jnp.maximum(before, scores.max(-1))
        level = jnp.where(new == -jnp.inf, 0, new)  # a row that has seen no key yet
        weights, fade = jnp.exp(scores - level[..., None]), jnp.exp(before - level)
        values = w.einsum("bgrqs,bgsv->bgrqv", weights.astype(w.v.dtype), _at(w.v, j))
        out = _put(out, i, _at(out, i) * fade[..., None] + values)
        return out, _put(top, i, new), _put(total, i, _at(total, i) * fade + weights.sum(-1))

    # A sink is a key without a value that comes first.
    top, total = w.full(rows, -jnp.inf), w.full(rows, 0)
    if a.sinks is not None:
        top, total = jnp.maximum(top, a.sinks.astype(w.wide).reshape(*rows[2:4], 1)), w.full(rows, 1)
    out, top, total = w.over(body, (w.full((*rows, width), 0), top, total))
    some = total > 0
    total = jnp.where(some, total, 1)
    lse = jnp.where(some, top + jnp.log(total), -jnp.inf)
    out = w.flat((out / total[..., None]).astype(a.q.dtype))
    return out, w.queries.join(lse, 3).reshape(a.q.shape[0], a.q.shape[2], a.q.shape[1])


def _bwd(limits: tuple[int, int], residuals, cotangents, **options):
    """Makes the scores of each pair again: Dao et al. 2022 (arXiv 2205.14135), algorithm 4, with a cotangent of lse."""
    a, rules = Arrays(*residuals), Rules(**options)
    dout, dlse = cotangents
    out, lse = _fwd(limits, *a, **options)
    w = _walk(limits, a, rules)
    delta = jnp.einsum("bthv,bthv->bht", dout, out, preferred_element_type=w.wide) - dlse
    # Every weight of a row that sees no key is 0, and of one that fills up a block.
    delta, lse = jnp.where(lse == -jnp.inf, 0, delta), jnp.where(lse == -jnp.inf, jnp.inf, lse)
    dout, delta, lse = w.grouped(dout.astype(w.v.dtype)), w.rows(delta), w.rows(lse, jnp.inf)
    floats = [jnp.issubdtype(x.dtype, jnp.floating) for x in w.score_arrays]

    def scores_of(i, j):
        product, modify = w.product(i, j), w.modified(i, j)
        if modify is None:
            return product, lambda d: ([], d)
        given = [x for x, is_float in zip(w.score_arrays, floats, strict=True) if is_float]

        def differentiable(given, product):
            left = iter(given)
            arrays = tuple(next(left) if f else x for x, f in zip(w.score_arrays, floats, strict=True))
            return modify(arrays, product)

        return jax.vjp(differentiable, given, product)

    def body(carry, i, j, masked):
        dq, dk, dv, dgiven = carry
        scores, pull = scores_of(i, j)
        scores = w.masked(scores, i, j) if masked else scores
        weights = jnp.exp(scores - _at(lse, i)[..., None])
        dv = _put(dv, j, _at(dv, j) + w.einsum("bgrqs,bgrqv->bgsv", weights.astype(w.v.dtype), _at(dout, i)))
        dweights = w.einsum("bgrqv,bgsv->bgrqs", _at(dout, i), _at(w.v, j))
        dgiven_here, dproduct = pull(weights * (dweights - _at(delta, i)[..., None]))
        dproduct = (dproduct * rules.scale).astype(w.k.dtype)
        dq = _put(dq, i, _at(dq, i) + w.einsum("bgrqs,bgsk->bgrqk", dproduct, _at(w.k, j)))
        dk = _put(dk, j, _at(dk, j) + w.einsum("bgrqs,bgrqk->bgsk", dproduct, _at(w.q, i)))
        return dq, dk, dv, [x + y for x, y in zip(dgiven, dgiven_here, strict=True)]

    dgiven = [jnp.zeros_like(x) for x, is_float in zip(w.score_arrays, floats, strict=True) if is_float]
    dq, dk, dv, dgiven = w.over(body, (*(w.full(x.shape, 0) for x in (w.q, w.k, w.v)), dgiven))
    dsinks = None
    if a.sinks is not None:
        sinks = a.sinks.astype(w.wide).reshape(*w.q.shape[2:4], 1)
        dsinks = -(jnp.exp(sinks - lse) * delta).sum((0, 1, 4)).reshape(a.sinks.shape).astype(a.sinks.dtype)
    given = iter(dgiven)
    dq, dk, dv = w.flat(dq), *(w.keys.join(jnp.swapaxes(x, 2, 3)) for x in (dk, dv))
    found: dict[str, Any] = dict.fromkeys(Arrays._fields)
    found |= {"q": dq.astype(a.q.dtype), "k": dk.astype(a.k.dtype), "v": dv.astype(a.v.dtype), "sinks": dsinks}
    found["mask_arrays"] = (None,) * len(a.mask_arrays)
    found["score_arrays"] = tuple(next(given) if is_float else None for is_float in floats)
    return tuple(found.values())


# The results among the arguments, with the derivative that making them has.
_known = jax.custom_vjp(lambda limits, options, *arrays: Arrays(*arrays)[-2:], nondiff_argnums=(0, 1))
_known.defvjp(
    lambda limits, options, *arrays: (Arrays(*arrays)[-2:], arrays),
    lambda limits, options, residuals, cotangents: _bwd(limits, residuals, cotangents, **dict(options)),
)


def form(queries: int, keys: int) -> Impl:
    """Returns the implementation whose blocks hold so many queries and keys at most."""
    limits = (queries, keys)
    return Impl(fwd=functools.partial(_fwd, limits), bwd=functools.partial(_bwd, limits))

"""Selections that permute or cluster: PBS-Attn, Squeezed Attention, SVG2 and SVG-EAR, by their rules in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable import ops
from portable.ops import block_sparse_attention
from portable.parity.numbers import relative
from tests.ops.sparse_definition import sets


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def dense(q, k, v, mask, weight=None):
    """Returns out and lse with mask [b, h, t, s]; a key counts `weight` times ([b, h, t, s])."""
    r = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, r, 2), jnp.repeat(v, r, 2)
    x = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") * q.shape[-1] ** -0.5
    x = jnp.where(mask, x, -jnp.inf) + (0 if weight is None else jnp.log(weight))
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(x, -1), v, precision="highest"), jax.nn.logsumexp(x, -1)


def with_gradients(fn):
    def both(q, k, v):
        (out, lse), pull = jax.vjp(fn, q, k, v)
        return out, lse, *pull((jnp.cos(out), jnp.sin(lse)))

    return jax.jit(both)


def close(found, wanted, bar=1e-5):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert relative(a, b) <= bar, name


def orders(seed, *shape):
    rng = np.random.default_rng(seed)
    return rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1).astype(np.int32)


@pytest.mark.parametrize("is_causal, lists, moved", [(True, 4, True), (True, 2, False), (False, 1, True)])
def test_permuted_attention_is_attention_of_what_the_blocks_hold(is_causal, lists, moved, seed):
    b, t, h, g, block = 2, 22, 4, 2, 4
    q, k, v = map(jnp.asarray, drawn(seed, (b, t, h, 8), (b, t, g, 8), (b, t, g, 8)))
    kv_order = orders(seed, b, g, t)
    q_order = orders(seed + 1, b, h, t) if moved else None
    chosen = np.random.default_rng(seed).integers(-1, 6, (b, lists, 6, 3)).astype(np.int32)
    chosen[..., 0] = 2
    mask = np.zeros((b, h, t, t), bool)
    for row, head, i, j in np.ndindex(mask.shape):
        here = i if q_order is None else q_order[row, head].tolist().index(i)
        there = kv_order[row, head * g // h].tolist().index(j)
        mask[row, head, i, j] = there // block in chosen[row, head * lists // h, here // block]
    if is_causal:
        mask &= np.tril(np.ones((t, t), bool))
        mask[..., 0] |= ~mask.any(-1)  # of a query that sees nothing, the softmax of the definition is none
    fn = functools.partial(
        ops.permuted_attention, block_indices=chosen, kv_order=kv_order, q_order=q_order, block_q=block, block_k=block,
        is_causal=is_causal, return_lse=True,
    )  # fmt: skip
    found, wanted = with_gradients(fn)(q, k, v), with_gradients(lambda q, k, v: dense(q, k, v, mask))(q, k, v)
    if not is_causal:
        close(found, wanted)
    else:
        some = np.isfinite(np.asarray(found[1]))
        assert some.mean() > 0.5
        np.testing.assert_allclose(np.asarray(found[1])[some], np.asarray(wanted[1])[some], atol=1e-5)
        np.testing.assert_allclose(np.asarray(found[0])[some.swapaxes(1, 2)],
                                   np.asarray(wanted[0])[some.swapaxes(1, 2)], atol=1e-5)  # fmt: skip


def pbs(q, k, block, segment, threshold):
    """The order of keys and the sets of blocks, by the paper's rule, for as many heads of keys as of queries."""
    (t, h, d), found, order = q.shape, np.empty((q.shape[1], -(-q.shape[0] // block)), object), []
    for head in range(h):
        x = q[-block:, head].astype(np.float64) @ k[:, head].T * d**-0.5
        x[np.arange(t) > np.arange(t)[-block:, None]] = -np.inf
        w = np.exp(x - x.max(1, keepdims=True))
        w = (w / w.sum(1, keepdims=True)).mean(0)
        parts = [sorted(range(i, min(i + segment, t)), key=lambda j: -w[j]) for i in range(0, t, segment)]
        order.append([j for part in parts for j in part])
        moved = k[order[-1], head].astype(np.float64)
        means = [moved[i : i + block].mean(0) for i in range(0, t, block)]
        for i in range(found.shape[1]):
            own, per = i * block // segment, segment // block
            x = np.array([q[i * block : (i + 1) * block, head].mean(0) @ m * d**-0.5 for m in means[: own * per]])
            p = np.exp(x) / np.exp(x).sum() if len(x) else x
            kept, total = set(), 0.0
            for n in np.argsort(-p):
                if total >= threshold:
                    break
                kept, total = kept | {int(n)}, total + p[n]
            mine = {n for n in range(own * per, (own + 1) * per) if n < len(means)}
            found[head, i] = kept | mine | {order[-1].index(0) // block}
    return np.array(order), found


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_pbs_chooses_what_its_paper_says(threshold, seed):
    q, k = drawn(seed, (1, 58, 2, 8), (1, 58, 2, 8))
    select = jax.jit(functools.partial(ops.select_pbs, block_q=4, block_k=4, segment=8, threshold=threshold))
    found = select(3 * q, k)
    order, chosen = pbs(3 * q[0], k[0], 4, 8, threshold)
    np.testing.assert_array_equal(found.kv_order[0], order)
    got = sets(found.block_indices)[0]
    for at in np.ndindex(chosen.shape):
        assert got[at] == chosen[at], at
    fewer = ops.select_pbs(3 * q, k, block_q=4, block_k=4, segment=8, threshold=threshold, budget=5).block_indices
    assert fewer.shape[-1] == 5
    for at in np.ndindex(chosen.shape):
        assert sets(fewer)[0][at] <= chosen[at]
        assert len(sets(fewer)[0][at]) == min(5, len(chosen[at]))


def test_pbs_with_a_threshold_of_one_is_dense(seed):
    q, k, v = map(jnp.asarray, drawn(seed, (2, 45, 4, 8), (2, 45, 2, 8), (2, 45, 2, 8)))
    options = {"block_q": 8, "block_k": 4}

    def whole(q, k, v):
        found = ops.select_pbs(q, k, segment=16, threshold=1, **options)
        return ops.permuted_attention(q, k, v, *found, is_causal=True, return_lse=True, **options)

    causal = jnp.tril(jnp.ones((45, 45), bool))
    close(with_gradients(whole)(q, k, v), with_gradients(lambda q, k, v: dense(q, k, v, causal))(q, k, v), 5e-6)


def test_pbs_looks_at_a_block_with_nan(seed):
    q, k = drawn(seed, (1, 32, 1, 8), (1, 32, 1, 8))
    k[0, 5] = np.nan
    found = ops.select_pbs(q, k, block_q=4, block_k=4, segment=8, threshold=0.1)
    np.testing.assert_array_equal(np.sort(found.kv_order[0, 0]), np.arange(32))
    bad = found.kv_order[0, 0].tolist().index(5) // 4
    assert all(bad in chosen for chosen in sets(found.block_indices)[0, 0][2:])


def squeezed(seed, clusters=6, **options):
    q, k, v = drawn(seed, (2, 5, 4, 8), (2, 40, 2, 8), (2, 40, 2, 8))
    return (*map(jnp.asarray, (2 * q, k, v)), ops.squeeze(jnp.asarray(k), clusters, **options))


def test_a_text_is_squeezed_into_clusters(seed):
    _, k, _, found = squeezed(seed, coarse=3)
    k = np.asarray(k)
    assert found.counts.sum(-1).tolist() == [[40, 40], [40, 40]]
    for row, head in np.ndindex(2, 2):
        np.testing.assert_array_equal(np.sort(found.order[row, head]), np.arange(40))
        of = np.full(40, -1)
        for c, (first, n) in enumerate(zip(found.first[row, head], found.counts[row, head], strict=True)):
            tokens = np.asarray(found.order[row, head])[int(first) : int(first) + int(n)]
            of[tokens] = c
            assert relative(found.centroids[row, head, c], k[row, tokens, head].mean(0)) <= 1e-5
        unit = k[row, :, head] / np.linalg.norm(k[row, :, head], axis=-1, keepdims=True)
        centres = np.stack([unit[of == c].mean(0) for c in range(6)])
        assert (((unit[:, None] - centres) ** 2).sum(-1).argmin(1) == of).mean() > 0.9  # Lloyd's has nearly ended
        for c in range(3):
            tokens = [j for j in range(40) if found.parents[row, head, of[j]] == c]
            assert found.coarse_counts[row, head, c] == len(tokens)
            assert relative(found.coarse_centroids[row, head, c], k[row, tokens, head].mean(0)) <= 1e-5


@pytest.mark.parametrize("coarse_threshold", [None, 0.02])
def test_squeezed_attention_chooses_what_its_paper_says(coarse_threshold, seed):
    q, _, _, context = squeezed(seed, coarse=3)
    found = ops.select_squeezed(q, context, threshold=0.03, budget=30, coarse_threshold=coarse_threshold)
    assert found.shape == (2, 4, 5, 30)
    some = False
    for row, head, i in np.ndindex(2, 4, 5):
        group, x = head // 2, np.asarray(q, np.float64)[row, i, head] * 8**-0.5
        n, centres = np.asarray(context.counts)[row, group], np.asarray(context.centroids, np.float64)[row, group]
        looked = np.ones(6, bool)
        if coarse_threshold is not None:
            e = np.exp(np.asarray(context.coarse_centroids)[row, group] @ x)
            share = e / (np.asarray(context.coarse_counts)[row, group] * e).sum()
            looked = (share > coarse_threshold)[np.asarray(context.parents)[row, group]]
        e = np.where(looked, np.exp(centres @ x), 0)
        share = e / max((n * e).sum(), 1e-30)
        tokens = []
        for c in np.argsort(-share):
            if share[c] > 0.03:
                first = int(context.first[row, group, c])
                tokens += np.asarray(context.order)[row, group, first : first + n[c]].tolist()
        some |= 0 < len(tokens) < 30
        assert found[row, head, i].tolist() == (tokens + [-1] * 30)[:30]
    assert some


def test_squeezed_attention_of_all_joined_with_what_came_after_is_dense(seed):
    q, k, v, context = squeezed(seed)
    more_k, more_v = map(jnp.asarray, drawn(seed + 1, (2, 5, 2, 8), (2, 5, 2, 8)))
    for options in ({}, {"block_q": 2}):
        chosen = ops.select_squeezed(q, context, threshold=0, budget=99, **options)
        assert chosen.shape[-1] == 40
        sparse = {"block_q": 1, "block_k": 1, "is_causal": False, "return_lse": True} | options
        text = block_sparse_attention(q, k, v, chosen, **sparse)
        after = ops.attention(q, more_k, more_v, is_causal=True, return_lse=True)
        out, _ = ops.merge_attentions(*zip(text, after, strict=True))
        mask = jnp.arange(45) < jnp.arange(41, 46)[:, None]
        want, _ = dense(q, jnp.concatenate([k, more_k], 1), jnp.concatenate([v, more_v], 1), mask)
        assert relative(out, want) <= 5e-6
    scores = ops.squeezed_scores(q, context)
    np.testing.assert_allclose((scores * jnp.repeat(context.counts, 2, 1)[:, :, None]).sum(-1), 1, rtol=1e-5)


def clusters(seed, t=30, s=41, m=5, n=7, empty=True):
    """Returns q, k, v and clusters of both, one of them empty."""
    q, k, v = map(jnp.asarray, drawn(seed, (2, t, 4, 8), (2, s, 2, 8), (2, s, 2, 8)))
    q = 2 * q
    start = jnp.swapaxes(k, 1, 2)[..., :n, :]
    start = start.at[..., 3, :].set(1e3) if empty else start
    return q, k, v, ops.kmeans(jnp.swapaxes(q, 1, 2), m), ops.kmeans(jnp.swapaxes(k, 1, 2), n, centroids=start)


def shares(queries, keys, row, head):
    x = np.asarray(queries.centroids, np.float64)[row, head] @ np.asarray(keys.centroids)[row, head // 2].T * 8**-0.5
    counts = np.asarray(keys.counts)[row, head // 2]
    x = np.where(counts > 0, x, -np.inf)
    e = counts * np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_svg2_chooses_what_its_paper_says(seed):
    _, _, _, queries, keys = clusters(seed)
    for top_p, ratio in ((0.6, 0.0), (0.3, 0.5)):
        found = ops.select_svg2(queries, keys, top_p=top_p, min_ratio=ratio)
        for row, head in np.ndindex(2, 4):
            for p, chosen in zip(shares(queries, keys, row, head), found[row, head].tolist(), strict=True):
                falling, wanted = np.argsort(-p, kind="stable").tolist(), []
                while not wanted or sum(p[wanted]) < top_p or len(wanted) < ratio * 7:
                    wanted.append(falling[len(wanted)])
                wanted = [c for c in wanted if keys.counts[row, head // 2, c]]
                assert chosen == (wanted + [-1] * 7)[:7]
    assert 3 not in np.asarray(ops.select_svg2(queries, keys, top_p=1.0))


def seen(queries, keys, chosen):
    """Returns the mask of clusters that are chosen, by tokens."""
    of_q, of_k = np.asarray(queries.assignments), np.repeat(np.asarray(keys.assignments), 2, 1)
    mask = np.zeros((2, 4, of_q.shape[2], of_k.shape[2]), bool)
    for row, head, i, j in np.ndindex(mask.shape):
        mask[row, head, i, j] = of_k[row, head, j] in np.asarray(chosen)[row, head, of_q[row, head, i]]
    return mask


@pytest.mark.parametrize("compensate", [False, True])
def test_clustered_attention_is_attention_of_the_chosen_clusters(compensate, seed):
    q, k, v, queries, keys = clusters(seed)
    chosen = ops.select_svg2(queries, keys, top_p=0.5)
    mask = seen(queries, keys, chosen)
    assert 0.1 < mask.mean() < 0.9
    of = jax.nn.one_hot(keys.assignments, 7)  # [b, g, s, c]
    count = jnp.maximum(of.sum(2), 1)

    def want(q, k, v):
        if not compensate:
            return dense(q, k, v, mask)
        kc, vc = (jnp.einsum("bgsc,bsgd->bcgd", of / count[:, :, None], x) for x in (k, v))
        skipped = jnp.einsum("bhts,bhsc->bhtc", ~mask, jnp.repeat(of, 2, 1)) > 0
        weight = jnp.where(skipped, jnp.repeat(of.sum(2), 2, 1)[:, :, None], 1)
        weight = jnp.concatenate([jnp.ones(mask.shape), weight], -1)
        both = jnp.concatenate([mask, skipped], -1)
        return dense(q, jnp.concatenate([k, kc], 1), jnp.concatenate([v, vc], 1), both, weight)

    def found(q, k, v):
        options = {"compensate": compensate, "block_q": 4, "block_k": 4, "return_lse": True}
        return ops.clustered_attention(q, k, v, queries, keys, chosen, **options)

    close(with_gradients(found)(q, k, v), with_gradients(want)(q, k, v))


def test_all_clusters_and_single_keys_are_dense(seed):
    q, k, v, queries, keys = clusters(seed)
    everything = np.ones((30, 41), bool)
    want = with_gradients(lambda q, k, v: dense(q, k, v, everything))(q, k, v)
    whole = ops.select_svg2(queries, keys, top_p=1.0)
    options = {"block_q": 4, "block_k": 8, "return_lse": True}
    fn = lambda q, k, v: ops.clustered_attention(q, k, v, queries, keys, whole, **options)  # noqa: E731
    close(with_gradients(fn)(q, k, v), want, 5e-6)
    # Clusters of one key each, of which some are computed, some compensated, and none would need it.
    single = ops.kmeans(jnp.swapaxes(k, 1, 2), 41, iterations=0, centroids=jnp.swapaxes(k, 1, 2))
    assert (single.counts == 1).all()
    assert (ops.select_svg_ear(queries, single, k, v, density=0.5) == -1).all()
    some = ops.select_svg2(queries, single, top_p=0.5)
    fn = lambda q, k, v: ops.clustered_attention(q, k, v, queries, single, some, compensate=True, **options)  # noqa: E731
    close(with_gradients(fn)(q, k, v), want, 5e-6)


def test_clusters_beyond_the_budget_are_compensated(seed):
    q, k, v, queries, keys = clusters(seed)
    whole = ops.select_svg2(queries, keys, top_p=1.0)
    attend = jax.jit(
        lambda chosen, **most: ops.clustered_attention(
            q, k, v, queries, keys, chosen, block_q=4, block_k=4, compensate=True, **most
        ),
        static_argnames="max_blocks",
    )
    found = attend(whole, max_blocks=4)
    blocks = -(-np.asarray(keys.counts) // 4)
    fitting = np.asarray(whole).copy()
    for row, head, i in np.ndindex(whole.shape[:3]):
        ends = np.cumsum([blocks[row, head // 2, c] if c >= 0 else 0 for c in fitting[row, head, i]])
        fitting[row, head, i, ends > 4] = -1
    assert relative(found, attend(fitting)) <= 2e-6
    assert (fitting >= 0).any()


def test_svg_ear_chooses_by_error_for_its_cost(seed):
    q, k, v, queries, keys = clusters(seed)
    found = ops.select_svg_ear(queries, keys, k, v, density=0.4)
    for row, head in np.ndindex(2, 4):
        group, p = head // 2, shares(queries, keys, row, head)
        of, n = np.asarray(keys.assignments)[row, group], np.asarray(keys.counts)[row, group]
        worth = np.zeros_like(p)
        for i, c in np.ndindex(p.shape):
            if n[c]:
                ks, vs = (np.asarray(z, np.float64)[row, of == c, group] for z in (k, v))
                x, y = (np.sqrt(((z - z.mean(0)) ** 2).sum(1).mean()) for z in (ks, vs))
                a = np.linalg.norm(np.asarray(queries.centroids)[row, head, i]) * 8**-0.5
                worth[i, c] = p[i, c] * ((a * x) ** 2 / 2 * np.linalg.norm(vs.mean(0)) + a * x * y) / n[c]
        for i in range(5):
            wanted, total = [], 0
            for c in np.argsort(-worth[i]):
                total += n[c]
                if total > 0.4 * 41 or worth[i, c] <= 0:
                    break
                wanted.append(int(c))
            assert found[row, head, i].tolist() == (wanted + [-1] * 7)[:7]
    # What is computed exactly and what is not are judged by the whole: more is nearer.
    everything = np.ones((30, 41), bool)
    want, options = dense(q, k, v, everything)[0], {"compensate": True, "block_q": 4, "block_k": 4}
    apart = []
    for density in (0.0, 0.4, 1.0):
        chosen = ops.select_svg_ear(queries, keys, k, v, density=density)
        apart.append(float(relative(ops.clustered_attention(q, k, v, queries, keys, chosen, **options), want)))
    assert apart[0] > apart[1] > apart[2]


Q, K = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8))
ORDER, LISTS = jnp.tile(jnp.arange(8), (1, 2, 1)), jnp.zeros((1, 4, 2, 1), int)
BLOCKS = {"block_q": 4, "block_k": 4, "is_causal": True}
CONTEXT = ops.squeeze(jax.random.normal(jax.random.key(0), (1, 8, 2, 8)), 2)
FOUND = ops.kmeans(jax.random.normal(jax.random.key(0), (1, 4, 8, 8)), 2)
FAULTS = {
    "no permutation": (
        ops.permuted_attention, (Q, K, K, LISTS, ORDER.at[0, 1, 3].set(4)), BLOCKS,
        ValueError, "kv_order must be a permutation of 0 to 7"),
    "no permutation of queries": (
        ops.permuted_attention, (Q, K, K, LISTS, ORDER), BLOCKS | {"q_order": jnp.zeros((1, 4, 8), int)},
        ValueError, "q_order must be a permutation"),
    "an order for too many": (
        ops.permuted_attention, (Q, K, K, LISTS, ORDER[:, :, :4]), BLOCKS, ValueError, r"kv_order must be \[b, g, s\]"),
    "lists": (ops.permuted_attention, (Q, K, K, LISTS[:, :3], ORDER), BLOCKS, ValueError, "lists of 1, g=2 or h=4"),
    "no budget": (ops.select_pbs, (Q, K), {"budget": 0}, ValueError, "budget must be at least 1; got 0"),
    "a budget too small": (
        ops.select_pbs, (Q, K), {"budget": 1, "block_q": 2, "block_k": 2, "segment": 4}, ValueError,
        "budget must hold the blocks that are always chosen"),
    "segments": (ops.select_pbs, (Q, K), {"segment": 100}, ValueError, "block_q and block_k must divide segment"),
    "no threshold": (ops.select_pbs, (Q, K), {"threshold": 0.0}, ValueError, "threshold must be above 0; got 0.0"),
    "no tokens": (
        ops.select_squeezed, (Q, CONTEXT), {"threshold": 0.1, "budget": 0}, ValueError, "budget must be at least 1"),
    "no coarse clusters": (
        ops.select_squeezed, (Q, CONTEXT), {"threshold": 0.1, "budget": 1, "coarse_threshold": 0.1},
        ValueError, "the text has no coarse clusters"),
    "nan keys": (ops.squeeze, (K.at[0, 0].set(jnp.nan), 2), {}, ValueError, "points must be finite"),
    "clusters of clusters": (ops.squeeze, (K, 2), {"coarse": 3}, ValueError, "coarse must be at most clusters"),
    "top_p": (ops.select_svg2, (FOUND, FOUND), {"top_p": 0}, ValueError, "top_p must be above 0"),
    "density": (ops.select_svg_ear, (FOUND, FOUND, Q, Q), {"density": 2}, ValueError, "density must be from 0 to 1"),
    "blocks": (
        ops.clustered_attention, (Q, Q, Q, FOUND, FOUND, LISTS), {"max_blocks": 0}, ValueError,
        "max_blocks must be at least 1"),
    "other clusters": (
        ops.clustered_attention, (Q, Q, Q, FOUND, FOUND, LISTS[:, :, :1]), {}, ValueError,
        "a list for each of 2 clusters; got 1"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_say_what_is_wrong(fault):
    call, args, options, kind, sentence = FAULTS[fault]
    with pytest.raises(kind, match=sentence) as caught:
        call(*args, **options)
    assert str(caught.value).startswith("kmeans: " if fault == "nan keys" else f"{call.__name__}: ")


def test_budgets_above_the_text_take_what_there_is():
    q, k = jnp.zeros((1, 10, 2, 8)), jnp.zeros((1, 10, 1, 8))
    chosen = {
        3: lambda q, k: ops.select_pbs(q, k, block_q=4, block_k=4, segment=8, budget=99).block_indices,
        2: lambda q, k: ops.select_moba(q, k, block_k=5, top_k=99),
        10: lambda q, k: ops.select_squeezed(q, ops.squeeze(k, 3), threshold=0, budget=99),
    }
    for count, select in chosen.items():
        assert jax.eval_shape(select, q, k).shape[-1] == count

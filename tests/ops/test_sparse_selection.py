"""Facts of the selectors and of k-means: the papers' rules in numpy, code by others, exact properties, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable import ops, parity
from portable.ops import block_means, block_sparse_attention
from portable.ops._sparse_selection import common
from portable.parity import hlo
from portable.parity.numbers import relative
from tests.ops import sparse_definition as definition
from tests.oracles import need


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def same(found, wanted):
    assert found.shape == wanted.shape
    for at in np.ndindex(wanted.shape):
        assert found[at] == wanted[at], at


def each_once(indices):
    kept = np.sort(np.asarray(indices), -1)
    assert not ((kept[..., 1:] == kept[..., :-1]) & (kept[..., 1:] >= 0)).any()


def test_block_means(seed):
    (k,) = drawn(seed, (2, 23, 2, 3))
    for size, stride in ((5, None), (8, 4), (4, 4), (6, 4), (23, None), (30, 10)):
        starts = range(0, 23, size) if stride is None else range(0, 23 - size + 1, stride)
        want = np.array([k[:, i : i + size].mean(1) for i in starts]).reshape(-1, 2, 2, 3).swapaxes(0, 1)
        np.testing.assert_allclose(block_means(jnp.asarray(k), size, stride=stride), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [common.SCORES, 300])
def test_moba_chooses_what_its_paper_says(chunk, monkeypatch, seed):
    monkeypatch.setattr(common, "SCORES", chunk)  # a few queries at a time
    q, k = drawn(seed, (2, 45, 4, 8), (2, 45, 2, 8))
    found = jax.jit(functools.partial(ops.select_moba, block_k=8, top_k=3))(q, k)
    assert found.shape == (2, 4, 45, 3)
    each_once(found)
    same(definition.sets(found), definition.moba(q, k, 8, 3))
    means = block_means(jnp.asarray(k), 8)
    at = np.array([44, 17])[:, None]
    last = ops.select_moba(np.take_along_axis(q, at[..., None, None], 1), None, block_k=8, top_k=3, means=means,
                           q_positions=jnp.asarray(at))  # fmt: skip
    for row in range(2):
        np.testing.assert_array_equal(last[row, :, 0], found[row, :, at[row, 0]])


def test_moba_by_blocks_of_queries(seed):
    q, k = drawn(seed, (1, 30, 2, 8), (1, 30, 1, 8))
    found = ops.select_moba(q, k, block_k=8, block_q=4, top_k=2)
    pooled = np.stack([q[:, i : i + 4].mean(1) for i in range(0, 30, 4)], 1)
    wanted = definition.moba(pooled, k, 8, 2, at=np.arange(3, 35, 4)[None])
    same(definition.sets(found), wanted)


def test_moba_with_all_blocks_is_dense(seed):
    q, k, v = map(jnp.asarray, drawn(seed, (1, 40, 2, 8), (1, 40, 2, 8), (1, 40, 2, 8)))
    chosen = ops.select_moba(q, k, block_k=16, top_k=9)
    assert chosen.shape[-1] == 3
    got = block_sparse_attention(q, k, v, chosen, block_q=1, block_k=16, is_causal=True)
    assert relative(got, ops.attention(q, k, v, is_causal=True)) <= 2e-6


def test_moba_equals_naive_torch(seed):
    torch = need("torch")
    q, k, v = drawn(seed, (1, 50, 2, 8), (1, 50, 2, 8), (1, 50, 2, 8))
    chosen = ops.select_moba(q, k, block_k=8, top_k=3)
    got = block_sparse_attention(*map(jnp.asarray, (q, k, v)), chosen, block_q=1, block_k=8, is_causal=True)
    q, k, v = (torch.from_numpy(x[0]).transpose(0, 1) for x in (q, k, v))  # [h, t, d]
    gate = torch.stack([q @ part.mean(1, keepdim=True).transpose(1, 2) for part in k.split(8, 1)], -1)[:, :, 0]
    block, own = torch.arange(7), torch.arange(50) // 8
    gate = gate.masked_fill(block > own[:, None], -torch.inf).masked_fill(block == own[:, None], torch.inf)
    kept = torch.zeros_like(gate, dtype=bool).scatter(2, gate.topk(3).indices, True) & (block <= own[:, None])
    mask = kept.repeat_interleave(8, 2)[:, :, :50] & torch.ones(50, 50, dtype=bool).tril()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert relative(got[0], want.transpose(0, 1).numpy()) <= 1e-5


def test_the_model_of_mobas_noise_is_what_random_keys_show():
    rng = np.random.default_rng(0)
    d, block = 64, 8
    snr, missed = ops.moba_snr(d, block, gap=0.5)
    assert snr == pytest.approx(0.5 * np.sqrt(d / (2 * block)))
    # Products with a query have variance 1 / d; the sought key's is higher by the gap.
    sought, other = (rng.normal(size=(40000, block)) * d**-0.5 for _ in range(2))
    sought[:, 0] += 0.5
    assert np.mean(sought.mean(1) < other.mean(1)) == pytest.approx(missed, abs=0.01)
    assert ops.moba_snr(d, block, gap=0.5, clustered=3, cluster_gap=0.25)[0] == pytest.approx(2 * snr)


SIZES = {
    "kernels are blocks": {"kernel": 8, "stride": 8, "block": 8, "top_k": 4, "initial": 1, "local": 2},
    "kernels overlap": {"kernel": 8, "stride": 4, "block": 16, "top_k": 2, "initial": 0, "local": 1},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("method", ["nsa", "infllm"])
def test_choices_by_compressed_keys(method, sizes, seed):
    sizes = SIZES[sizes]
    q, k = drawn(seed, (1, 61, 4, 8), (1, 61, 2, 8))
    kernel, stride, block, local = (sizes[n] for n in ("kernel", "stride", "block", "local"))
    options = {"kernel": kernel, "stride": stride, "block_k": block, "top_k": sizes["top_k"]}
    options["initial"] = sizes["initial"]
    if method == "nsa":
        means = block_means(jnp.asarray(k), kernel, stride=stride)
        found = ops.select_nsa(q, means, **options, local=local, s=61)
    else:
        found = ops.select_infllm(q, k, **options, window=local * block)
    each_once(found)
    wanted = definition.compressed(q, k, **sizes, pool="share" if method == "nsa" else "max")
    same(definition.sets(found), wanted)


@pytest.mark.full
def test_nsa_equals_flash_linear_attention(seed):
    torch, _, naive = need("torch", "triton", "fla.ops.nsa.naive")
    q, k, v = drawn(seed, (1, 256, 32, 16), (1, 256, 2, 16), (1, 256, 2, 16))
    gates = torch.rand(2, 1, 256, 32)
    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    means, values = (block_means(jnp.asarray(x), 16) for x in (k, v))
    given = {"block_size": 16, "scale": 0.25}
    compressed, _ = naive.naive_nsa_compression(tensors[0], *map(torch.tensor, map(np.array, (means, values))), **given)
    indices = naive.naive_nsa_topk(tensors[0], torch.tensor(np.array(means)), 5, **given)
    chosen = ops.select_nsa(q, means, kernel=16, stride=16, block_k=16, top_k=5)
    same(definition.sets(chosen), definition.sets(indices.permute(0, 2, 1, 3).numpy()))
    selected = naive.naive_nsa_selection(*tensors, indices, 16, 0.25)
    want = compressed * gates[0][..., None] + selected * gates[1][..., None]
    q, k, v = map(jnp.asarray, (q, k, v))
    ends = jnp.arange(16) * 16 + 15
    got = ops.attention(q, means, values, is_causal=True, q_positions=jnp.arange(256), kv_positions=ends)
    got = got * gates[0].numpy()[..., None]
    rest = block_sparse_attention(q, k, v, chosen, block_q=1, block_k=16, is_causal=True)
    assert relative(got + rest * gates[1].numpy()[..., None], want.numpy()) <= 1e-5


@pytest.mark.full
def test_dsa_equals_flash_linear_attention(seed):
    torch, _, naive = need("torch", "triton", "fla.ops.dsa.naive")
    q, k, w = drawn(seed, (2, 100, 4, 16), (2, 100, 16), (2, 100, 4))
    found = ops.select_dsa(q, k, w, top_k=9)
    want = naive.naive_dsa_indexer(*map(torch.from_numpy, (q, k, w)), topk=9, activation="relu")
    same(definition.sets(found[:, 0]), definition.sets(want.numpy()))


def test_dsa_chooses_the_highest_tokens(seed):
    q, k, w = drawn(seed, (2, 30, 3, 8), (2, 30, 8), (2, 30, 3))
    found = ops.select_dsa(q, k, w, top_k=7)
    assert found.shape == (2, 1, 30, 7)
    each_once(found)
    same(definition.sets(found[:, 0]), definition.index(q, k, w, 7))
    everything = ops.select_dsa(q, k, w, top_k=99)
    v, heads = jnp.ones((2, 30, 1, 4)), jnp.asarray(np.random.default_rng(seed).normal(size=(2, 30, 2, 8)), jnp.float32)
    keys = jnp.asarray(k)[:, :, None]
    v = jnp.cumsum(v, 1)
    got = block_sparse_attention(heads, keys, v, everything, block_q=1, block_k=1, is_causal=True)
    assert relative(got, ops.attention(heads, keys, v, is_causal=True)) <= 2e-6


def test_nothing_before_the_start_of_a_text_is_chosen(seed):
    q, k = map(jnp.asarray, drawn(seed, (1, 48, 2, 8), (1, 48, 1, 8)))
    starts = jnp.where(jnp.arange(48) < 16, 0, 16)
    calls = {
        "moba": lambda q, k, **more: ops.select_moba(q, k, block_k=8, top_k=3, **more),
        "nsa": lambda q, k, **more: ops.select_nsa(
            q, block_means(k, 8, stride=4), s=k.shape[1], kernel=8, stride=4, block_k=8, top_k=3, local=1, **more
        ),
        "infllm": lambda q, k, **more: ops.select_infllm(
            q, k, kernel=8, stride=4, block_k=8, top_k=3, window=8, **more
        ),
    }
    for name, select in calls.items():
        together = definition.sets(select(q, k, starts=starts))
        alone = definition.sets(select(q[:, 16:], k[:, 16:]))
        for at in np.ndindex(alone.shape):
            assert {n + 2 for n in alone[at]} == together[*at[:2], at[2] + 16], (name, at)
    with pytest.raises(ValueError, match="starts must be positions where a block begins, multiples of block_k=8"):
        calls["moba"](q, k, starts=starts + 1)


def test_hisa_is_dsa_where_it_keeps_all_blocks(seed):
    q, k, w = drawn(seed, (1, 45, 3, 8), (1, 45, 8), (1, 45, 3))
    q[:, 20:30], w = -np.abs(q[:, 20:30]), np.abs(w)
    k[:, ::3] = np.abs(k[:, ::3])  # scores of 0, which tie
    want = ops.select_dsa(q, k, w, top_k=6)
    same(definition.sets(ops.select_hisa(q, k, w, block_k=8, blocks=6, top_k=6)), definition.sets(want))
    fewer = ops.select_hisa(q, k, w, block_k=8, blocks=3, top_k=6)
    each_once(fewer)
    means = np.stack([k[:, i : i + 8].mean(1) for i in range(0, 45, 8)], 1)
    for i in range(45):
        coarse = np.einsum("js,j->s", np.maximum(0, q[0, i] @ means[0].T), w[0, i])
        own = i // 8
        others = sorted(range(1, own), key=lambda n: (-coarse[n], n))
        blocks = [0, own, *others][: 3 + (own == 0)]
        fine = np.einsum("js,j->s", np.maximum(0, q[0, i] @ k[0].T), w[0, i])
        tokens = [s for s in range(i + 1) if s // 8 in blocks]
        wanted = set(sorted(tokens, key=lambda s: (-fine[s], s))[:6])
        if len(set(np.round(sorted(fine[tokens])[-7:], 5))) == min(7, len(tokens)):  # no ties
            assert definition.sets(fewer)[0, 0, i] == wanted, i


def test_a_block_with_nan_is_looked_at_and_no_other_suffers(seed):
    q, k = drawn(seed, (1, 40, 1, 8), (1, 40, 1, 8))
    want = definition.sets(ops.select_moba(q, k, block_k=8, top_k=3))
    k[0, 9] = np.nan
    found = definition.sets(ops.select_moba(q, k, block_k=8, top_k=3))
    for i in range(40):
        assert found[0, 0, i] == want[0, 0, i] if i < 16 else {1, i // 8} <= found[0, 0, i]


def test_choices_have_no_gradient(seed):
    q, k = map(jnp.asarray, drawn(seed, (1, 24, 2, 8), (1, 24, 2, 8)))

    def loss(q, k):
        chosen = ops.select_moba(q, k, block_k=8, top_k=2)
        return (block_sparse_attention(q, k, k, chosen, block_q=1, block_k=8, is_causal=True) ** 2).sum()

    def given(q, k, chosen):
        return (block_sparse_attention(q, k, k, chosen, block_q=1, block_k=8, is_causal=True) ** 2).sum()

    chosen = ops.select_moba(q, k, block_k=8, top_k=2)
    jax.tree.map(np.testing.assert_array_equal, jax.grad(loss, (0, 1))(q, k), jax.grad(given, (0, 1))(q, k, chosen))


Q, K = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8))
MANY, FEW = (
    ops.KMeans(jnp.zeros((1, h, 2, 8)), jnp.zeros((1, h, 8), int), jnp.full((1, h, 2), 4), None) for h in (4, 2)
)
LISTS = jnp.zeros((1, 4, 2, 1), int)
FAULTS = {
    "no blocks": (ops.select_moba, (Q, K), {"block_k": 4, "top_k": 0}, ValueError, "top_k must be at least 1; got 0"),
    "half a block": (ops.select_moba, (Q, K), {"block_k": 2.5, "top_k": 1}, TypeError, "block_k must be an integer"),
    "groups": (ops.select_moba, (Q[:, :, :3], K), {"block_k": 4, "top_k": 1}, ValueError, "got h=3, g=2"),
    "no keys": (ops.select_moba, (Q, None), {"block_k": 4, "top_k": 1}, ValueError, "give k or the means .* neither"),
    "two blocks of its own": (
        ops.select_moba, (Q, K), {"block_k": 4, "top_k": 1, "block_q": 3}, ValueError, "block_q must divide block_k"),
    "strides": (ops.select_nsa, (Q, K), {"kernel": 6, "stride": 4}, ValueError, "stride must divide kernel"),
    "no room": (ops.select_nsa, (Q, K), {"top_k": 2}, ValueError, "top_k=2 for 1 at the start and 2 up to the query"),
    "window": (ops.select_infllm, (Q, K), {"window": 100}, ValueError, "window must be a multiple of block_k"),
    "integers": (ops.select_infllm, (Q.astype(int), K), {}, TypeError, "q must be floating point"),
    "heads": (ops.select_dsa, (Q, Q[:, :, 0], Q[:, :, 1]), {}, ValueError, r"w must be \[b, t, j\] with j=4"),
    "one block": (
        ops.select_hisa, (Q, Q[:, :, 0], Q[..., 0]), {"blocks": 1}, ValueError, "blocks must be at least 2; got 1"),
    "too many clusters": (ops.kmeans, (Q[0, :, 0], 9), {}, ValueError, "at most the number of points; got 9 for n=8"),
    "no cluster": (ops.kmeans, (Q[0, :, 0], 0), {}, ValueError, "clusters must be at least 1; got 0"),
    "other centroids": (ops.kmeans, (Q[0, :, 0], 2), {"centroids": Q[0, :3, 0]}, ValueError, "clusters=2"),
    "width": (ops.kmeans_assign, (Q[0, :, 0], Q[0, :2, 0, :5]), {}, ValueError, "rows and d of x"),
    "no points": (ops.kmeans_assign, (Q[0, :0, 0], Q[0, :2, 0]), {}, ValueError, "x must have a point and a channel"),
    "no channels": (ops.kmeans, (Q[0, :, 0, :0], 2), {}, ValueError, r"a channel at least; got shape \[8, 0\]"),
    "no kernel": (ops.select_infllm, (Q, K), {"kernel": 0}, ValueError, "kernel must be at least 1; got 0"),
    "no stride": (ops.select_infllm, (Q, K), {"stride": 0}, ValueError, "stride must be at least 1; got 0"),
    "no keys of a block": (ops.select_infllm, (Q, K), {"block_k": 0}, ValueError, "block_k must be at least 1; got 0"),
    "window behind": (ops.select_infllm, (Q, K), {"window": -64}, ValueError, "window must be at least 0; got -64"),
    "float window": (ops.select_infllm, (Q, K), {"window": 64.0}, TypeError, "window must be an integer; got float"),
    "a list": (ops.select_infllm, ([[1.0]], K), {}, TypeError, "q must be an array; got list"),
    "other keys": (ops.select_infllm, (Q, K[..., :5]), {}, ValueError, r"k must be \[b, s, g, d\] with d=8"),
    "more clusters than keys": (ops.squeeze, (K, 9), {}, ValueError, "clusters must be at most the .*; got 9 for s=8"),
    "k": (ops.select_svg_ear, (MANY, FEW, K[..., :5], K), {}, ValueError, r"k must be \[b, s, g, d\] with d=8"),
    "v": (ops.select_svg_ear, (MANY, FEW, K, K[:, :5]), {}, ValueError, r"v must be \[b, s, g, v\] with s=8"),
    "no scale": (
        ops.clustered_attention, (Q, K, K, MANY, FEW, LISTS), {"scale": 0.0, "compensate": True}, ValueError,
        "scale must not be 0 with compensate; got 0.0"),
    "float lists": (
        ops.clustered_attention, (Q, K, K, MANY, FEW, LISTS / 1), {}, TypeError, "chosen must be integers"),
    "nan": (ops.kmeans, (Q[0, :, 0].at[1].set(np.nan), 2), {}, ValueError, "points must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_say_what_is_wrong(fault):
    call, args, options, kind, sentence = FAULTS[fault]
    with pytest.raises(kind, match=sentence) as caught:
        call(*args, **options)
    assert str(caught.value).startswith(f"{call.__name__}: ")


def lloyd(x, centroids, iterations):
    """k-means in float64."""
    x, c = x.astype(np.float64), centroids.astype(np.float64)
    nearest = lambda: ((x[:, None] - c) ** 2).sum(-1).argmin(1)  # noqa: E731
    for _ in range(iterations):
        of = nearest()
        c = np.stack([x[of == i].mean(0) if (of == i).any() else c[i] for i in range(len(c))])
    of = nearest()
    return c, of, ((x - c[of]) ** 2).sum()


@pytest.mark.parametrize("rows", [(), (2, 1)])
def test_kmeans_is_lloyds(rows, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(*rows, 400, 5)) + 3 * rng.integers(0, 4, (*rows, 400, 1)) + 50).astype(np.float32)
    start = x[..., :9, :].copy()
    start[..., 8, :] = 1e3  # no point comes near
    found = ops.kmeans(jnp.asarray(x), 9, iterations=4, centroids=jnp.asarray(start))
    for at in np.ndindex(rows):
        c, of, inertia = lloyd(x[at], start[at], 4)
        assert relative(found.centroids[at], c) <= 1e-6
        np.testing.assert_array_equal(found.assignments[at], of)
        np.testing.assert_array_equal(found.counts[at], np.bincount(of, minlength=9))
        assert found.inertia[at] == pytest.approx(inertia, rel=1e-4)
        assert found.counts[at][8] == 0
        nearest, distance = ops.kmeans_assign(x[at], found.centroids[at])
        np.testing.assert_array_equal(nearest, of)
        assert distance.sum() == pytest.approx(inertia, rel=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_point_that_is_not_finite_spoils_no_other(value, seed):
    (x,) = drawn(seed, (50, 3))
    call = jax.jit(lambda x, c: ops.kmeans(x, 4, centroids=c))
    want, found = call(x[1:], x[1:5]), call(jnp.asarray(x).at[0].set(value), x[1:5])
    assert relative(found.centroids, want.centroids) <= 1e-5
    np.testing.assert_array_equal(found.assignments[1:], want.assignments)
    assert 0 <= found.assignments[0] < 4
    nearest, _ = jax.jit(ops.kmeans_assign)(jnp.asarray(x).at[0].set(value), want.centroids)
    np.testing.assert_array_equal(nearest[1:], want.assignments)
    assert 0 <= nearest[0] < 4


def test_kmeans_equals_scikit_learn(seed):
    cluster = need("sklearn.cluster")
    (x,) = drawn(seed, (3000, 16))
    theirs = cluster.KMeans(12, init=x[:12], n_init=1, max_iter=6, tol=0, algorithm="lloyd").fit(x)
    ours = ops.kmeans(x, 12, iterations=6, centroids=x[:12])
    assert relative(ours.centroids, theirs.cluster_centers_) <= 1e-4
    assert np.mean(np.asarray(ours.assignments) != theirs.labels_) <= 1e-3
    assert float(ours.inertia) == pytest.approx(theirs.inertia_, rel=1e-4)


def test_points_drawn_are_points_and_a_row_of_zero_iterations_assigns(seed):
    (x,) = drawn(seed, (50, 3))
    found = ops.kmeans(x, 50, iterations=0, key=jax.random.key(seed))
    assert found.inertia == pytest.approx(0, abs=1e-3)
    np.testing.assert_array_equal(np.sort(found.assignments), np.arange(50))
    assert (np.asarray(found.counts) == 1).all()


def test_kmeans_holds_no_distances_of_all():
    n, d, clusters = 65536, 16, 256
    x, c = jax.ShapeDtypeStruct((n, d), jnp.float32), jax.ShapeDtypeStruct((clusters, d), jnp.float32)
    done = parity.compile_for("cpu", lambda x, c: ops.kmeans(x, clusters, centroids=c), x, c)
    assert hlo.memory(done)["temp"] <= 4 * n * clusters / 6
    assert max(b.bytes for b in hlo.buffers(hlo.text(done))) <= 4 * n * d * 1.1

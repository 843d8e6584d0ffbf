"""Statistical top-k (Spark), chunks of changing length (DHSA), order of importance (S2O), pooled shares (Rectified)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from portable import ops
from portable.ops import block_sparse_attention
from portable.parity.numbers import relative
from tests.ops.sparse_definition import sets


def drawn(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def upper(share):
    """The number that a share of normally distributed ones exceed, by bisection of erfc."""
    low, high = -10.0, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 * math.erfc(middle / math.sqrt(2)) > share else (low, middle)
    return low


def test_a_statistical_threshold_lets_about_as_many_pass(seed):
    (x,) = drawn(seed, (4, 3000))
    x = 3 * x + 7
    theta = jax.jit(functools.partial(ops.statistical_threshold, top_k=240))(x)
    np.testing.assert_allclose(theta, x.mean(1) + x.std(1, ddof=1) * upper(0.08), rtol=1e-4)
    assert np.abs((x > np.asarray(theta)[:, None]).sum(1) - 240).max() < 60
    some = np.arange(3000) < np.array([[3000], [50], [240], [0]])
    theta = ops.statistical_threshold(jnp.asarray(x), 30, where=jnp.asarray(some))
    np.testing.assert_allclose(theta[1], x[1, :50].mean() + x[1, :50].std(ddof=1) * upper(0.6), rtol=1e-4)
    assert theta[3] == -np.inf
    assert ops.statistical_threshold(jnp.asarray(x[:, :30]), 30).tolist() == [-np.inf] * 4


def test_a_sparse_feed_forward_layer_is_the_papers(seed):
    x, gate, up, down = drawn(seed, (3, 8), (3, 200), (5, 200), (200, 6))
    judged = x[:, :3].astype(np.float64) @ gate
    theta = judged.mean(1, keepdims=True) + judged.std(1, ddof=1, keepdims=True) * upper(0.1)
    active = np.maximum(judged - theta, 0)
    units = active * 0.5 * (1 + np.vectorize(math.erf)(active / math.sqrt(2))) * (x[:, 3:].astype(np.float64) @ up)
    layer = jax.jit(ops.spark_ffn, static_argnames="top_k")
    assert relative(layer(x, gate, up, down, top_k=20), units @ down) <= 1e-5
    assert 0 < (active > 0).mean() < 0.2
    plain = judged * 0.5 * (1 + np.vectorize(math.erf)(judged / math.sqrt(2))) * (x[:, 3:].astype(np.float64) @ up)
    assert relative(layer(x, gate, up, down, top_k=200), plain @ down) <= 1e-5
    with jax.enable_x64(True):
        wide = [jnp.asarray(a[..., :12] if a.shape[-1] == 200 else a[:12], jnp.float64) for a in (gate, up, down)]
        fn = lambda *args: ops.spark_ffn(*args, top_k=4)  # noqa: E731
        check_grads(fn, (jnp.asarray(x, jnp.float64), *wide), order=1, modes=["rev"], rtol=1e-5)


def test_spark_chooses_what_is_above_its_threshold(seed):
    q, k = drawn(seed, (1, 60, 4, 8), (1, 60, 2, 8))
    select = jax.jit(functools.partial(ops.select_spark, top_k=10, channels=5))
    found = select(q, k)
    assert found.shape == (1, 4, 60, 20)
    sizes = []
    for head, i in np.ndindex(4, 60):
        x = k[0, : i + 1, head // 2, :5].astype(np.float64) @ q[0, i, head, :5]
        theta = x.mean() + x.std(ddof=1) * upper(10 / (i + 1)) if i >= 10 else -np.inf
        wanted = [j for j in np.argsort(-x) if x[j] >= theta][:20]
        assert sets(found)[0, head, i] == set(map(int, wanted)), (head, i)
        sizes.append(len(wanted))
    assert 7 < np.mean(sizes[40:60]) < 13


def test_dhsa_chooses_by_chunks(seed):
    q, k = drawn(seed, (2, 40, 4, 8), (2, 40, 2, 8))
    of = np.sort(np.random.default_rng(seed).integers(0, 9, (2, 40)), 1)
    of[of == 4] = 5  # an empty one
    found = jax.jit(functools.partial(ops.select_dhsa, chunks=9, top_k=7))(q, k, of)
    assert found.shape == (2, 4, 40, 7)
    for row, head, i in np.ndindex(2, 4, 40):
        mine = of[row] == of[row, i]
        one = q[row, mine, head].astype(np.float64).mean(0) * mine.sum() ** 0.5
        score = []
        for j in range(i):
            theirs = of[row] == of[row, j]
            score.append(one @ k[row, theirs, head // 2].astype(np.float64).mean(0) * theirs.sum() ** 0.5)
        # Tokens of a chunk have one score, and the earlier comes first.
        wanted = {i, *sorted(range(i), key=lambda j: (-round(score[j], 4), j))[:6]}
        assert sets(found)[row, head, i] == wanted, (row, head, i)


def test_dhsa_of_single_tokens_is_the_exact_top_k(seed):
    q, k = drawn(seed, (1, 30, 2, 8), (1, 30, 2, 8))
    found = sets(ops.select_dhsa(q, k, np.arange(30)[None], chunks=30, top_k=5))
    for head, i in np.ndindex(2, 30):
        x = k[0, :i, head].astype(np.float64) @ q[0, i, head]
        assert found[0, head, i] == {i, *map(int, np.argsort(-x)[:4])}


def test_s2o_stops_when_little_is_added(seed):
    q, k = drawn(seed, (1, 50, 4, 8), (1, 50, 2, 8))
    q = 2 * q
    select = jax.jit(functools.partial(ops.select_s2o, block_q=8, block_k=4, tau=0.2))
    found = select(q, k)
    cut = 0
    for head, n in np.ndindex(4, 7):
        first, last = n * 8, min(n * 8 + 8, 50) - 1
        one = q[0, first : last + 1, head].astype(np.float64).mean(0)
        means = [k[0, i : i + 4, head // 2].astype(np.float64).mean(0) for i in range(0, last + 1, 4)]
        p = np.exp(np.array(means) @ one * 8**-0.5)
        own = [b for b in range(len(p)) if b >= first // 4]
        wanted, total = list(own), p[own].sum()
        for b in sorted(range(first // 4), key=lambda b: -p[b]):
            if p[b] < 0.2 * total:
                cut += 1
                break
            wanted, total = [*wanted, b], total + p[b]
        assert sets(found)[0, head, n] == set(wanted)
    assert cut


def test_s2o_that_never_stops_is_dense(seed):
    q, k, v = map(jnp.asarray, drawn(seed, (2, 45, 4, 8), (2, 45, 2, 8), (2, 45, 2, 8)))
    q = q.at[0].multiply(1e4)  # most shares underflow to 0

    @jax.jit
    def attend(q, k, v):
        chosen = ops.select_s2o(q, k, block_q=8, block_k=4, tau=0.0)
        return block_sparse_attention(q, k, v, chosen, block_q=8, block_k=4, is_causal=True)

    assert relative(attend(q, k, v), ops.attention(q, k, v, is_causal=True)) <= 2e-6


@pytest.mark.parametrize("lists", [1, 4])
def test_rectified_attention_is_the_papers(lists, seed):
    q, k, v = drawn(seed, (2, 22, 4, 8), (2, 26, 2, 8), (2, 26, 2, 8))
    chosen = np.random.default_rng(seed).integers(-1, 7, (2, lists, 6, 3)).astype(np.int32)
    chosen[0, 0, 2] = -1
    attend = jax.jit(functools.partial(ops.rectified_attention, block_q=4, block_k=4))
    want = np.zeros((2, 22, 4, 8))
    for row, i, head in np.ndindex(2, 22, 4):
        keys, values = (x[row, :, head // 2].astype(np.float64) for x in (k, v))
        block = slice(i // 4 * 4, i // 4 * 4 + 4)
        parts = [slice(n * 4, min(n * 4 + 4, 26)) for n in range(7)]
        p = np.array(
            [(x.stop - x.start) * np.exp(q[row, block, head].mean(0) @ keys[x].mean(0) * 8**-0.5) for x in parts]
        )
        p, mine = p / p.sum(), set(chosen[row, head * lists // 4, i // 4].tolist()) - {-1}
        tokens = [j for n in mine for j in range(parts[n].start, parts[n].stop)]
        if tokens:
            e = np.exp(keys[tokens] @ q[row, i, head] * 8**-0.5)
            want[row, i, head] = p[list(mine)].sum() * (e @ values[tokens]) / e.sum()
        for n in set(range(7)) - mine:
            want[row, i, head] += p[n] * values[parts[n]].mean(0)
    assert relative(attend(q, k, v, chosen), want) <= 1e-5


def test_rectified_attention_of_blocks_of_one_vector_each_is_dense(seed):
    q, k, v = drawn(seed, (1, 6, 4, 8), (1, 5, 2, 8), (1, 20, 2, 8))
    q, k = map(jnp.asarray, (q.repeat(4, 1), k.repeat(4, 1)))
    chosen = np.random.default_rng(seed).integers(-1, 5, (1, 4, 6, 2))
    fn = jax.jit(functools.partial(ops.rectified_attention, block_q=4, block_k=4))
    assert relative(fn(q, k, jnp.asarray(v), chosen), ops.attention(q, k, jnp.asarray(v))) <= 5e-6
    everything = np.broadcast_to(np.arange(5), (1, 1, 6, 5))
    q = q + jnp.asarray(drawn(seed + 1, (1, 24, 4, 8))[0])
    both = (lambda q, k, v: fn(q, k, v, everything)), ops.attention
    (out, slopes), (want, wanted) = (
        (f(q, k, v), jax.grad(lambda *x, f=f: jnp.cos(f(*x)).sum(), (0, 1, 2))(q, k, v)) for f in both
    )
    assert relative(out, want) <= 5e-6
    for a, b in zip(slopes, wanted, strict=True):
        assert relative(a, b) <= 1e-5


Q, K = jnp.zeros((1, 8, 4, 8)), jnp.zeros((1, 8, 2, 8))
IDS = jnp.zeros((1, 8), int)
FAULTS = {
    "nothing": (ops.statistical_threshold, (Q, 0), {}, ValueError, "top_k must be at least 1; got 0"),
    "integers": (ops.statistical_threshold, (IDS, 1), {}, TypeError, "x must be floating point"),
    "rows": (
        ops.spark_ffn, (Q, Q[0, :3, 0], Q[0, :4, 0], Q[0, :, 0]), {"top_k": 1}, ValueError,
        "d=7, the rows of gate and up together"),
    "channels": (ops.select_spark, (Q, K), {"channels": 9}, ValueError, "channels must be at most d=8; got 9"),
    "no tokens": (ops.select_spark, (Q, K), {"budget": 0}, ValueError, "budget must be at least 1; got 0"),
    "a chunk too many": (
        ops.select_dhsa, (Q, K, IDS + 2), {"chunks": 2, "top_k": 1}, ValueError, "chunk_ids must lie from 0 to chunks"),
    "chunks of floats": (
        ops.select_dhsa, (Q, K, IDS + 0.5), {"chunks": 2, "top_k": 1}, TypeError, "chunk_ids must be integers"),
    "tau": (ops.select_s2o, (Q, K), {"tau": -0.1}, ValueError, "tau must not be negative; got -0.1"),
    "no blocks": (ops.select_s2o, (Q, K), {"budget": 0}, ValueError, "budget must be at least 1; got 0"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_errors_say_what_is_wrong(fault):
    call, args, options, kind, sentence = FAULTS[fault]
    with pytest.raises(kind, match=sentence) as caught:
        call(*args, **options)
    assert str(caught.value).startswith(f"{call.__name__}: ")

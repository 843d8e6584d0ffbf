"""Layers of sparse attention: dense where they select all, and token by token equal to the whole sequence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn, ops
from portable.parity.numbers import relative
from tests.ops.sparse_definition import sets

HEADS = {"num_heads": 4, "num_kv_heads": 2}
LAYERS = {
    "MoBA": (nn.MoBA, {"block_size": 4, "top_k": 3}),
    "InfLLMv2Attention": (
        nn.InfLLMv2Attention,
        {"block_size": 4, "top_k": 4, "kernel": 4, "stride": 2, "local_window": 8, "dense_below": 9},
    ),
    "NSA": (nn.NSA, {"block_size": 4, "top_k": 4, "kernel": 4, "stride": 2, "last": 5}),
    "MoBA, keys mixed": (nn.MoBA, {"block_size": 4, "top_k": 3, "key_taps": 3}),
    "NSA, learned": (
        nn.NSA,
        {"block_size": 4, "top_k": 4, "kernel": 4, "stride": 2, "last": 5, "compression": "mlp"},
    ),
}
PLAIN = ("MoBA", "InfLLMv2Attention", "NSA")


def made(name, **options):
    layer, sizes = LAYERS[name]
    layer = layer(16, **HEADS, **sizes | options, rngs=nnx.Rngs(0))
    if getattr(layer, "key_conv", None) is not None:  # its filters start at zero
        layer.key_conv.kernel[...] = jax.random.normal(jax.random.key(5), layer.key_conv.kernel.shape)
    return layer


def inputs(seed, b=2, t=23):
    return jax.random.normal(jax.random.key(seed), (b, t, 16))


@pytest.mark.parametrize("name", LAYERS)
def test_token_by_token_equals_the_whole(name, seed):
    layer, u = made(name), inputs(seed)
    graphdef, weights = nnx.split(layer)
    want = jax.jit(lambda w, u: nnx.merge(graphdef, w)(u))(weights, u)
    step = jax.jit(lambda w, u, state: nnx.merge(graphdef, w).step(u, state))
    state, found = layer.init_state(2, 30), []
    for i in range(u.shape[1]):
        y, state = step(weights, u[:, i], state)
        found.append(y)
    assert relative(jnp.stack(found, 1), want) <= 1e-5
    # Rows of unequal length are read at once, and go on from where each ended.
    lengths = jnp.array([17, 6])
    y, state = layer(u, state=layer.init_state(2, 30), lengths=lengths, return_state=True)
    for row, length in enumerate(lengths.tolist()):
        assert relative(y[row, :length], want[row, :length]) <= 1e-5
    more, state = step(weights, u[jnp.arange(2), lengths], state)
    assert relative(more, want[jnp.arange(2), lengths]) <= 1e-5
    np.testing.assert_array_equal(state.length, lengths + 1)


@pytest.mark.parametrize("name", ["MoBA", "InfLLMv2Attention"])
def test_dense_weights_serve_both(name, seed):
    u = inputs(seed)
    dense = nn.Attention(16, **HEADS, rngs=nnx.Rngs(0))
    layer = made(name)
    assert jax.tree.structure(nnx.state(layer)) == jax.tree.structure(nnx.state(dense))
    nnx.update(layer, nnx.state(dense))
    want = dense(u)
    assert relative(layer(u), want) > 1e-3
    layer.is_sparse = False
    np.testing.assert_array_equal(layer(u), want)


def test_infllm_below_its_length_is_dense_bit_for_bit(seed):
    u = inputs(seed)
    layer, dense = made("InfLLMv2Attention"), nn.Attention(16, **HEADS, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(dense))
    np.testing.assert_array_equal(layer(u[:, :9]), dense(u[:, :9]))
    assert relative(layer(u[:, :10])[:, :9], dense(u[:, :9])) <= 1e-6


def test_moba_that_selects_all_is_dense(seed):
    u = inputs(seed)
    layer, dense = made("MoBA", top_k=6), nn.Attention(16, **HEADS, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(dense))
    assert relative(layer(u), dense(u)) <= 2e-6


def test_nsa_is_the_sum_of_its_branches(seed):
    layer, u = made("NSA", rope=None), inputs(seed, b=1)
    q, k, v = layer._split(u)
    gates = jax.nn.sigmoid(u @ layer.gate.kernel[...]).reshape(1, 23, 4, 3)
    means, values = (ops.block_means(x, 4, stride=2) for x in (k, v))
    chosen = np.asarray(ops.select_nsa(q, means, s=23, kernel=4, stride=2, block_k=4, top_k=4))
    want = np.zeros((1, 23, 4, 4))
    for i, head in np.ndindex(23, 4):
        group = head // 2
        softmax = lambda keys, vs, at=(i, head): jax.nn.softmax(keys @ q[0, at[0], at[1]] / 2) @ vs  # noqa: E731
        seen = [c for c in range(means.shape[1]) if 2 * c + 3 <= i]
        if seen:
            want[0, i, head] += gates[0, i, head, 0] * softmax(means[0, seen, group], values[0, seen, group])
        blocks = set(chosen[0, group, i].tolist())
        for number, tokens in ((1, [s for s in range(i + 1) if s // 4 in blocks]), (2, range(max(0, i - 4), i + 1))):
            at = np.array(tokens)
            want[0, i, head] += gates[0, i, head, number] * softmax(k[0, at, group], v[0, at, group])
    assert relative(layer(u), layer.out(jnp.asarray(want, jnp.float32).reshape(1, 23, -1))) <= 1e-5


@pytest.mark.parametrize("name", PLAIN)
def test_what_has_no_meaning_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: window is not an option"):
        made(name, window=4)
    layer = made(name)
    with pytest.raises(ValueError, match=f"{name}: return_state needs a state"):
        layer(inputs(0), return_state=True)
    with pytest.raises(ValueError, match=f"{name}: the state holds 3 positions"):
        layer(inputs(0), state=layer.init_state(2, 3))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_documents_never_mix(name, seed):
    layer, u = made(name), inputs(seed, t=40)
    lengths = ((13, 1, 20, 6), (4, 2, 5, 29))
    ids = jnp.array([[i for i, n in enumerate(row) for _ in range(n)] for row in lengths])
    graphdef, weights = nnx.split(layer)

    @jax.jit
    def packed(w, u):
        y, pull = jax.vjp(lambda u: nnx.merge(graphdef, w)(u, segment_ids=ids), u)
        return y, pull(jnp.cos(y))[0]

    alone = jax.jit(lambda w, u: nnx.merge(graphdef, w)(u))
    found, slopes = packed(weights, u)
    changed, _ = packed(weights, u.at[:, 14:34].add(1))
    for row, counts in enumerate(lengths):
        for start, n in zip(np.cumsum((0, *counts)), counts, strict=False):
            part = slice(int(start), int(start) + n)
            # What follows a document adds nothing to it, so that all are of one length here.
            cut = jnp.zeros_like(u[:1]).at[:, :n].set(u[row, part])
            assert relative(found[row, part], alone(weights, cut)[0, :n]) <= 1e-5
            if start < 14 or (row == 0 and start >= 34):
                before = slice(int(start), min(part.stop, 14)) if row else part
                np.testing.assert_array_equal(found[row, before], changed[row, before])
    assert np.isfinite(slopes).all()
    assert float(jnp.abs(slopes).max()) > 0
    # Padding behind the last document changes nothing.
    short = layer(u[:, :34], segment_ids=ids[:, :34])
    padded = layer(u, segment_ids=ids.at[:, 34:].set(99), lengths=jnp.array([34, 34]))
    assert relative(padded[:, :34], short) <= 1e-5


def test_documents_beyond_the_layout_are_refused_or_nan(seed):
    layer, u, ids = made("MoBA", max_segments=2), inputs(seed), jnp.arange(23)[None].repeat(2, 0) // 5
    with pytest.raises(ValueError, match=r"MoBA: documents must fit a layout of 7 blocks of 4.*max_segments"):
        layer(u, segment_ids=ids)
    ids = ids.at[1].set(0)
    y = jax.jit(lambda u: layer(u, segment_ids=ids + 0 * u[..., 0].astype(int)))(u)
    assert np.isnan(y[0, 19:]).all()  # 7 blocks end within the fourth document
    assert np.isfinite(y[0, :19]).all()
    assert np.isfinite(y[1]).all()
    with pytest.raises(ValueError, match="MoBA: max_segments must be at least 1; got 0"):
        made("MoBA", max_segments=0)
    with pytest.raises(ValueError, match="MoBA: a state is of one text; got segment_ids too"):
        layer(u, segment_ids=ids, state=layer.init_state(2, 30))


def test_mixed_keys_are_the_ones_of_the_paper_and_begin_as_none(seed):
    u, dense = inputs(seed, b=1), nn.Attention(16, **HEADS, rngs=nnx.Rngs(0))
    layer = nn.MoBA(16, **HEADS, block_size=4, top_k=9, key_taps=3, rngs=nnx.Rngs(0))
    nnx.update(layer, nnx.state(dense))
    assert relative(layer(u), dense(u)) <= 2e-6
    kernel = np.random.default_rng(seed).normal(size=(3, 8)).astype(np.float32)
    layer.key_conv.kernel[...] = jnp.asarray(kernel)
    q, k, v = layer._split(u)
    k = np.asarray(k, np.float64).reshape(23, 8)
    mixed = np.array([sum(kernel[i] * (k[t - 2 + i] if t + i >= 2 else 0) for i in range(3)) for t in range(23)])
    k = jnp.asarray(k + mixed / (1 + np.exp(-mixed)), jnp.float32).reshape(1, 23, 2, 4)
    q, k, v = dense._turned(q, k, v, jnp.arange(23), jnp.array([23]))
    want = dense.out(ops.attention(q, k, v, is_causal=True).reshape(1, 23, -1))
    assert relative(layer(u), want) <= 1e-5


def test_a_learned_compression_that_is_the_mean_gives_means(seed):
    u, plain, layer = inputs(seed), made("NSA"), made("NSA, learned")
    nnx.update(plain, nnx.state(layer, lambda path, _: not path[0].startswith("compress_")))
    assert relative(layer(u), plain(u)) > 1e-2
    one = jnp.tile(jnp.eye(4) / 4, (4, 1))  # the mean, and less it: silu(x) - silu(-x) = x
    for map in (layer.compress_key, layer.compress_value):
        map.position[...] = jnp.zeros_like(map.position[...])
        map.up[...] = jnp.broadcast_to(jnp.concatenate([one, -one], 1), map.up.shape)
        map.down[...] = jnp.broadcast_to(jnp.concatenate([jnp.eye(4), -jnp.eye(4)]), map.down.shape)
    assert relative(layer(u), plain(u)) <= 1e-5


def test_a_kernel_is_compressed_by_a_network_with_positions(seed):
    rng = np.random.default_rng(seed)
    map = nn.Compression(3, 2, 4, 5, rngs=nnx.Rngs(seed))
    x = rng.normal(size=(1, 2, 3, 2, 4))
    got, want = map(jnp.asarray(x, jnp.float32)), np.zeros((1, 2, 2, 4))
    for n, head in np.ndindex(2, 2):
        flat = (x[0, n, :, head] + np.asarray(map.position[...])[:, head]).reshape(-1)
        hidden = flat @ np.asarray(map.up[...])[head]
        want[0, n, head] = hidden / (1 + np.exp(-hidden)) @ np.asarray(map.down[...])[head]
    assert relative(got, want) <= 1e-5


def test_the_indexer_keeps_documents_apart(seed):
    options = {"num_heads": 2, "head_dim": 8, "top_k": 5, "rope": nn.Rotary(dims=4)}
    indexer, u = nn.SparseIndexer(16, **options, rngs=nnx.Rngs(0)), inputs(seed, b=1)
    found = sets(indexer(u, segment_ids=jnp.array([[7] * 9 + [3] * 14])))[0, 0]
    for start, stop in ((0, 9), (9, 23)):
        alone = sets(indexer(u[:, start:stop]))[0, 0]
        assert [{s - start for s in one} for one in found[start:stop]] == list(alone)
    hisa = nn.SparseIndexer(16, **options, block_size=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"SparseIndexer: segment_ids go without .* got blocks of 4 keys too"):
        hisa(u, segment_ids=jnp.zeros((1, 23), int))


@pytest.mark.parametrize("blocks", [None, 2])
def test_the_indexer_chooses_token_by_token_what_it_chooses_at_once(blocks, seed):
    options = {"num_heads": 2, "head_dim": 8, "top_k": 5, "rope": nn.Rotary(dims=4)}
    options |= {} if blocks is None else {"block_size": 4, "blocks": blocks}
    indexer, u = nn.SparseIndexer(16, **options, rngs=nnx.Rngs(0)), inputs(seed)
    graphdef, weights = nnx.split(indexer)
    want = sets(jax.jit(lambda w, u: nnx.merge(graphdef, w)(u))(weights, u))
    assert len(want[0, 0, 22]) == 5
    step = jax.jit(lambda w, u, state: nnx.merge(graphdef, w)(u, state=state))
    state = indexer.init_state(2, 26)
    for i in range(u.shape[1]):
        found, state = step(weights, u[:, i : i + 1], state)
        for row in range(2):
            assert sets(found)[row, 0, 0] == want[row, 0, i]
    found, state = indexer(u[:, :9], state=indexer.init_state(2, 26), lengths=jnp.array([9, 4]))
    found, state = step(weights, jnp.stack([u[:1, 9], u[1:, 4]])[:, 0][:, None], state)
    assert [sets(found)[row, 0, 0] for row in range(2)] == [want[0, 0, 9], want[1, 0, 4]]
    np.testing.assert_array_equal(state.length, [10, 5])

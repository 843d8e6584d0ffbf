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
}


def made(name, **options):
    layer, sizes = LAYERS[name]
    return layer(16, **HEADS, **sizes | options, rngs=nnx.Rngs(0))


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


@pytest.mark.parametrize("name", LAYERS)
def test_what_has_no_meaning_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}: window is not an option"):
        made(name, window=4)
    layer = made(name)
    with pytest.raises(ValueError, match=f"{name}: return_state needs a state"):
        layer(inputs(0), return_state=True)
    with pytest.raises(ValueError, match=f"{name}: the state holds 3 positions"):
        layer(inputs(0), state=layer.init_state(2, 3))


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

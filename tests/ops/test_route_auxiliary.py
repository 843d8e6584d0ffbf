"""Facts of the values beside a routing: definitions in numpy and torch, and the sum over devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from portable import ops
from portable.ops import Routing, route
from tests.oracles import child, need


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def softmax(x):
    p = np.exp(np.asarray(x, np.float64))
    return p / p.sum(-1, keepdims=True)


@pytest.mark.oracle
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_is_transformers(masked):
    """Over the logits of three layers, as they join them; theirs counts choices a token."""
    torch, mixtral = need("torch", "transformers.models.mixtral.modeling_mixtral")
    layers = [normal(2 * 17, 8, seed=i) for i in range(3)]
    mask = np.ones((2, 17), int)
    if masked:
        mask[1, 9:] = 0
    want = mixtral.load_balancing_loss_func(
        tuple(torch.tensor(np.asarray(x)) for x in layers), 8, 2, torch.tensor(mask) if masked else None
    )
    routing = route(jnp.concatenate(layers), top_k=2, renormalize=True)
    real = jnp.asarray(np.tile(mask.reshape(-1), 3) > 0) if masked else None
    got = ops.load_balance_loss(routing, share_of="tokens", mask=real)
    np.testing.assert_allclose(got, float(want), rtol=1e-6)
    np.testing.assert_allclose(ops.load_balance_loss(routing, mask=real), float(want) / 2, rtol=1e-6)


def sequence_loss(scores, indices, real):
    """DeepSeek-V3, equations 17 to 20, one sequence at a time."""
    b, _, e = scores.shape
    k, losses = indices.shape[-1], []
    for i in range(b):
        t = real[i].sum()
        f = np.array([(indices[i][real[i]] == j).sum() * e / (k * t) for j in range(e)])
        shares = scores[i] / scores[i].sum(-1, keepdims=True)
        losses.append((f * shares[real[i]].mean(0)).sum())
    return np.mean(losses)


@pytest.mark.parametrize("recount", [False, True])
def test_sequence_wise_balance(recount):
    logits, bias = normal(3, 11, 6), normal(6, seed=1)
    mask = jnp.ones((3, 11), bool).at[0, 4:].set(False)
    routing = route(logits, top_k=2, score="sigmoid", bias=bias)
    scores = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    indices = np.argsort(-scores, -1)[..., :2] if recount else np.asarray(routing.indices)
    assert recount or (np.argsort(-scores, -1)[..., :2] != indices).any()
    got = ops.load_balance_loss(routing, per_sequence=True, recount=recount, mask=mask)
    np.testing.assert_allclose(got, sequence_loss(scores, indices, np.asarray(mask)), rtol=1e-6)


def test_balance_of_a_varying_number_of_experts_and_weighted_terms():
    """BlockFFN's load is a share of the choices made; MoE++ weighs its experts' terms."""
    logits = normal(40, 8)
    routing = route(logits, top_k=8, score="relu_rms", score_scale=1 + normal(8, seed=1))
    r = np.maximum(np.asarray(logits, np.float64), 0)
    load, shares = (r > 0).sum(0) / (r > 0).sum(), (r / np.maximum(r.sum(-1, keepdims=True), 1e-9)).mean(0)
    np.testing.assert_allclose(ops.load_balance_loss(routing), 8 * (load * shares).sum(), rtol=1e-5)
    factor = np.linspace(0.2, 1, 8)
    got = ops.load_balance_loss(routing, expert_weights=jnp.asarray(factor, jnp.float32))
    np.testing.assert_allclose(got, 8 * (factor * load * shares).sum(), rtol=1e-5)


def test_gradients_of_the_balance_pass_through_the_scores_alone():
    logits = normal(12, 5)
    slope = jax.grad(lambda x: ops.load_balance_loss(route(x, top_k=2)))(logits)
    p = softmax(logits)
    f = np.bincount(np.asarray(route(logits, top_k=2).indices).reshape(-1), minlength=5) / 24
    want = 5 / 12 * p * (f - (p * f).sum(-1, keepdims=True))
    np.testing.assert_allclose(slope, want, atol=1e-7)


def test_z_loss():
    logits, mask = normal(3, 5, 6), jnp.ones((3, 5), bool).at[1, 2:].set(False)
    squares = np.log(np.exp(np.asarray(logits, np.float64)).sum(-1)) ** 2
    np.testing.assert_allclose(ops.z_loss(route(logits, top_k=1)), squares.mean(), rtol=1e-6)
    padded = jnp.where(mask[..., None], logits, jnp.nan)  # whatever stands at a pad must not matter
    routing = Routing(jnp.zeros((3, 5, 1), jnp.int32), jnp.ones((3, 5, 1)), 6, padded, padded)
    got, slope = jax.value_and_grad(lambda x: ops.z_loss(Routing(*[routing.indices] * 2, 6, x), mask=mask))(padded)
    np.testing.assert_allclose(got, squares[np.asarray(mask)].mean(), rtol=1e-6)
    assert np.isfinite(slope).all()


def test_load_and_the_bias_that_follows_it():
    routing = route(normal(50, 4), top_k=2, mask=jnp.arange(50) < 40)
    load = ops.expert_load(routing)
    want = np.bincount(np.asarray(routing.indices[:40]).reshape(-1), minlength=4)
    np.testing.assert_array_equal(load, want)
    assert load.dtype == jnp.int32
    moved = ops.updated_bias(jnp.zeros(4), jnp.array([10, 20, 30, 20]), rate=0.5)
    assert moved.tolist() == [0.5, 0.0, -0.5, 0.0]


def test_the_bias_balances_a_skewed_router():
    """Two experts that everyone prefers; only the selection changes, until loads differ little."""
    logits, bias = normal(512, 8).at[:, :2].add(2.0), jnp.zeros(8)
    run = jax.jit(lambda bias: ops.expert_load(route(logits, top_k=2, score="sigmoid", bias=bias)))
    before = np.asarray(run(bias))
    for _ in range(150):
        bias = ops.updated_bias(bias, run(bias), rate=0.01)
    after = np.asarray(run(bias))
    assert before.max() > 3 * 128
    assert 0.85 * 128 <= after.min() <= after.max() <= 1.15 * 128


def test_importance_and_noisy_load():
    clean, noisy_map = normal(60, 6), normal(60, 6, seed=1)
    noisy, std = ops.noisy_logits(clean, noisy_map, jax.random.key(3), floor=0.01)
    sizes = np.log1p(np.exp(np.asarray(noisy_map, np.float64))) + 0.01
    np.testing.assert_allclose(std, sizes, rtol=1e-6)
    np.testing.assert_allclose((noisy - clean) / std, jax.random.normal(jax.random.key(3), (60, 6)), atol=1e-4)
    again, _ = ops.noisy_logits(jnp.zeros((4000, 6)), jnp.zeros((4000, 6)), jax.random.key(5))
    assert abs(float(again.std()) / np.log(2) - 1) < 0.02

    p = ops.noisy_load(clean, std, noisy, top_k=2)
    want, loud = np.zeros((60, 6)), np.asarray(noisy, np.float64)
    for t, i in np.ndindex(60, 6):
        second = np.sort(np.delete(loud[t], i))[-2]
        want[t, i] = (1 + math.erf((np.asarray(clean)[t, i] - second) / sizes[t, i] / math.sqrt(2))) / 2
    np.testing.assert_allclose(p, want, atol=2e-6)
    routing = route(noisy, top_k=2, renormalize=True)
    importance = ops.expert_importance(routing)
    want = np.zeros(6)
    np.add.at(want, np.asarray(routing.indices), np.asarray(routing.weights, np.float64))
    np.testing.assert_allclose(importance, want, rtol=1e-5)
    np.testing.assert_allclose(ops.balance_loss(importance), want.var() / want.mean() ** 2, rtol=1e-4)
    assert np.isfinite(jax.grad(lambda c: ops.balance_loss(ops.noisy_load(c, std, noisy, top_k=2).sum(0)))(clean)).all()


def test_jitter():
    x = jnp.ones((1000, 8), jnp.bfloat16)
    y = ops.jitter(x, jax.random.key(0), 0.25)
    assert y.dtype == jnp.bfloat16
    values = np.asarray(y, np.float32)
    assert 0.75 <= values.min() < 0.76 < 1.24 < values.max() <= 1.25
    np.testing.assert_array_equal(ops.jitter(x, jax.random.key(0), 0.0), x)
    with pytest.raises(ValueError, match=r"amount must be from 0 to 1; got 1\.5"):
        ops.jitter(x, jax.random.key(0), 1.5)


def test_chunks():
    """The union, its smooth form and the last chunk that is shorter."""
    logits = normal(2, 10, 6)
    routing = route(logits, top_k=6, score="relu_rms")
    active = np.asarray(logits) > 0
    shares = np.where(active, logits, 0).astype(np.float64)
    shares /= shares.sum(-1, keepdims=True)
    mask = jnp.ones((2, 10), bool).at[1, 7:].set(False)
    used, smooth, padded = [], [], []
    for row, start in np.ndindex(2, 3):
        part = slice(4 * start, 4 * start + 4)
        used.append(active[row, part].any(0))
        smooth.append(1 - np.prod(1 - shares[row, part], 0))
        padded.append(1 - np.prod(1 - shares[row, part] * np.asarray(mask)[row, part, None], 0))
    np.testing.assert_array_equal(ops.chunk_union(routing, 4).reshape(6, 6), used)
    np.testing.assert_allclose(ops.chunk_sparsity_loss(routing, 4), np.mean(smooth), rtol=1e-6)
    np.testing.assert_allclose(ops.chunk_sparsity_loss(routing, 4, mask=mask), np.mean(padded), rtol=1e-6)
    assert ops.chunk_union(routing, 1).sum() == active.sum()
    one = route(jnp.array([[9.0, -1.0], [9.0, -1.0]]), top_k=1, score="relu_rms")  # a share of exactly 1, twice
    assert np.isfinite(
        jax.grad(lambda x: ops.chunk_sparsity_loss(route(x, top_k=1, score="relu_rms"), 2))(one.logits)
    ).all()
    with pytest.raises(ValueError, match=r"tokens must be \[\*batch, t\] and chunk at least 1; got 2 axes, 0"):
        ops.chunk_union(routing, 0)


@pytest.mark.oracle
def test_locality_is_torchs_cross_entropy():
    torch = need("torch")
    logits = normal(2, 9, 5)
    segments = jnp.array([[0] * 4 + [1] * 5, [0] * 9])
    mask = jnp.ones((2, 9), bool).at[1, 6:].set(False)
    pairs = np.asarray((segments[:, 1:] == segments[:, :-1]) & mask[:, 1:])
    theirs = torch.tensor(np.asarray(logits), dtype=torch.float64, requires_grad=True)
    left, right = 10 * theirs[:, :-1][torch.tensor(pairs)], 10 * theirs[:, 1:][torch.tensor(pairs)]
    want = torch.nn.functional.binary_cross_entropy_with_logits(left, torch.sigmoid(right))
    want.backward()

    def loss(x):
        return ops.locality_loss(route(x, top_k=2), steepness=10.0, mask=mask, segment_ids=segments)

    got, slope = jax.value_and_grad(loss)(logits)
    np.testing.assert_allclose(got, want.item(), rtol=1e-6)
    np.testing.assert_allclose(slope, theirs.grad.numpy(), atol=1e-6)
    assert float(ops.locality_loss(route(normal(1, 4), top_k=1))) == 0


def test_values_over_devices_are_those_of_all_tokens():
    """Each auxiliary value, and the router's gradient of it, sharded as whole; a mean of means would differ."""
    child(
        """
import functools, jax, jax.numpy as jnp, numpy as np
from portable import ops, sharding
from portable.ops import route

mesh = sharding.mesh(data=4)
logits = jax.random.normal(jax.random.key(0), (8, 6, 5)) * jnp.arange(1.0, 9.0)[:, None, None]
mask = jnp.arange(6) < jnp.array([6, 6, 1, 2, 6, 3, 0, 0])[:, None]
bias = jnp.linspace(0, 0.2, 5)

def values(logits, mask, bias, axis):
    routing = route(logits, top_k=2, bias=bias, mask=mask)
    options = {"mask": mask, "axis_name": axis}
    return {
        "balance": ops.load_balance_loss(routing, **options),
        "sequence": ops.load_balance_loss(routing, per_sequence=True, **options),
        "z": ops.z_loss(routing, **options),
        "chunk": ops.chunk_sparsity_loss(routing, 3, **options),
        "locality": ops.locality_loss(routing, steepness=1.0, **options),
        "importance": ops.balance_loss(ops.expert_importance(routing, axis_name=axis)),
    }, ops.expert_load(routing, axis_name=axis)

P = jax.P
spread = jax.shard_map(
    functools.partial(values, axis="data"), mesh=mesh, in_specs=(P("data"), P("data"), P()), out_specs=P()
)
whole = functools.partial(values, axis=None)
got, load = jax.jit(spread)(logits, mask, bias)
want, count = jax.jit(whole)(logits, mask, bias)
np.testing.assert_array_equal(load, count)
slopes = [jax.jit(jax.jacrev(lambda x: f(x, mask, bias)[0]))(logits) for f in (spread, whole)]
for name in want:
    np.testing.assert_allclose(got[name], want[name], rtol=2e-6, err_msg=name)
    np.testing.assert_allclose(slopes[0][name], slopes[1][name], rtol=1e-4, atol=1e-7, err_msg=name)
part = jax.jit(lambda x, m: whole(x, m, bias)[0]["balance"])
mean = np.mean([float(part(logits[i : i + 2], mask[i : i + 2])) for i in range(0, 6, 2)])
assert abs(mean - float(want["balance"])) > 1e-2

moved = jax.shard_map(
    lambda x: ops.limit_capacity(route(x, top_k=2), 3, overflow="next").indices,
    mesh=mesh, in_specs=P("data"), out_specs=P("data"),
)(logits)
alone = ops.limit_capacity(route(logits[2:4], top_k=2), 3, overflow="next").indices
np.testing.assert_array_equal(moved[2:4], alone)
""",
        devices=4,
    )


R = Routing(jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2)), 4)
M = route(jnp.zeros((3, 4)), top_k=2)
BAD = {
    "no scores": (lambda: ops.load_balance_loss(R), "load_balance_loss: the routing must have scores; take one from"),
    "no logits": (lambda: ops.z_loss(R), "z_loss: the routing must have logits"),
    "share": (lambda: ops.load_balance_loss(M, share_of="all"), "share_of must be one of choices, tokens; got 'all'"),
    "sequence": (
        lambda: ops.load_balance_loss(route(jnp.zeros(4), top_k=1), per_sequence=True),
        r"per_sequence needs a routing of \[..., t\] tokens",
    ),
    "mask": (lambda: ops.z_loss(M, mask=jnp.ones(2, bool)), r"mask must be \[\*tokens\], \[3\]; got shape \[2\]"),
    "bias": (
        lambda: ops.updated_bias(jnp.zeros(4), jnp.zeros(3)),
        r"load must have the bias's shape, \[4\]; got \[3\]",
    ),
    "noise": (
        lambda: ops.noisy_logits(jnp.zeros((3, 4)), jnp.zeros((3, 3)), jax.random.key(0)),
        r"spread_logits must have the shape of logits, \[3, 4\]; got \[3, 3\]",
    ),
    "noisy load": (
        lambda: ops.noisy_load(*[jnp.ones((3, 4))] * 3, top_k=4),
        "top_k must be from 1 to E - 1; got top_k=4, E=4",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    call, sentence = BAD[fault]
    with pytest.raises(ValueError, match=sentence):
        call()

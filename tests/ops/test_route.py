"""Facts of `route` and of what changes a routing: transformers' routers, and definitions in numpy, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify

import portable
from portable import ops
from portable.ops import Routing, expert_choice, limit_capacity, remap_experts, route, route_options, simple_experts
from portable.ops._route import presets
from portable.parity.numbers import relative
from tests import moe_families
from tests.oracles import need


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def combine(indices, weights, e):
    """[T, E]: each expert's weight, as a matrix that does not know the order of the choices."""
    dense = np.zeros((len(indices), e + 1))
    np.add.at(dense, (np.arange(len(indices))[:, None], np.asarray(indices)), np.asarray(weights, np.float64))
    return dense[:, :e]


@pytest.mark.oracle
@pytest.mark.parametrize("name", moe_families.FAMILIES)
def test_routers_of_transformers(name):
    """Their weights: the same experts, weights within 1e-6 of the scaling, and the router's gradient."""
    torch = need("torch")
    family = moe_families.family(name)
    x = torch.randn(65, moe_families.D)
    logits, weights, indices = family.route(x)
    e = logits.shape[-1]
    weigh = torch.randn(len(x), e)
    (weights * weigh.gather(1, indices)).sum().backward()
    theirs = dict(family.block.named_parameters())

    kernel = jnp.asarray(family.array(family.kernel))
    bias = jnp.asarray(family.array(family.bias)) if family.bias else None
    selection = jnp.asarray(family.array(family.selection_bias)) if family.selection_bias else None
    options = route_options(family.model_type, family.config)

    @jax.jit
    def run(kernel, bias, logits=None):
        if logits is None:
            logits = jnp.asarray(x.numpy()) @ kernel.T + (0 if bias is None else bias)
        made = route(logits, bias=selection, **options)
        return ops._route.routing.spread(made.weights, made.indices, e), made

    _, made = run(kernel, bias, jnp.asarray(logits.detach().numpy()))
    np.testing.assert_array_equal(np.sort(made.indices, -1), np.sort(indices.numpy(), -1))
    want = combine(indices.numpy(), weights.detach().numpy(), e)
    assert np.abs(combine(made.indices, made.weights, e) - want).max() <= 1e-6 * options.get("scaling", 1.0)
    given = jnp.asarray(weigh.numpy())
    slopes = jax.jit(jax.grad(lambda k, b: (run(k, b)[0] * given).sum(), argnums=(0, 1) if family.bias else 0))
    slopes = slopes(kernel, bias) if family.bias else (slopes(kernel, bias),)
    for slope, key in zip(slopes, [family.kernel, family.bias]):
        assert relative(slope, theirs[key].grad.numpy()) <= 5e-6


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", presets.FAMILIES)
def test_presets_have_transformers_defaults(model_type):
    transformers = need("transformers")
    top_k = {"num_experts_per_tok": 6} if model_type == "deepseek_v2" else {}
    config = transformers.AutoConfig.for_model(model_type, **top_k).to_dict()
    assert route_options(model_type, config) == route_options(model_type, top_k)
    key = presets.FAMILIES[model_type].config["top_k"]
    assert route_options(model_type, {**config, key: 3})["top_k"] == 3


def test_presets_refuse_what_they_do_not_know():
    with pytest.raises(ValueError, match="no router for model_type 'mixtrel'; there are: mixtral, qwen2_moe"):
        route_options("mixtrel", {})
    with pytest.raises(ValueError, match=r"topk_method must be one of greedy, .*; got 'noaux_tc'"):
        route_options("deepseek_v2", {"num_experts_per_tok": 2, "topk_method": "noaux_tc"})
    with pytest.raises(ValueError, match="a deepseek_v2 must have num_experts_per_tok"):
        route_options("deepseek_v2", {})


def test_blockffn():
    """ReLU, then RMSNorm over all experts with a learned scale; as many experts as are positive, up to top_k."""
    logits, scale = normal(40, 8), 1 + normal(8, seed=1)
    r = np.maximum(np.asarray(logits, np.float64), 0)
    scores = r / np.sqrt((r**2).mean(-1, keepdims=True) + 1e-6)
    want = scores * np.asarray(scale, np.float64)
    made = route(logits, top_k=8, score="relu_rms", score_scale=scale)
    np.testing.assert_allclose(combine(made.indices, made.weights, 8), want, atol=1e-6)
    np.testing.assert_allclose(made.scores, scores, atol=1e-6)
    count = (r > 0).sum(-1)
    assert count.min() < 3 < 6 < count.max()
    np.testing.assert_array_equal((np.asarray(made.indices) < 8).sum(-1), count)
    few = route(logits, top_k=3, score="relu_rms", score_scale=scale)
    kept = want * (np.argsort(np.argsort(-r, -1), -1) < 3)
    np.testing.assert_allclose(combine(few.indices, few.weights, 8), kept, atol=1e-6)


def test_zero_experts_lose_their_weight_before_the_rest_is_normalised():
    logits = normal(50, 6)
    made = route(logits, top_k=2, renormalize=True, zero_experts=2)
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, -1)[:, :2]
    w = np.where(order >= 4, 0, np.take_along_axis(p, order, -1))
    assert {tuple(x) for x in (order >= 4)} == {(a, b) for a in (True, False) for b in (True, False)}
    w = w / np.where(w.sum(-1, keepdims=True) == 0, 1, w.sum(-1, keepdims=True))
    np.testing.assert_array_equal(made.indices, order)
    np.testing.assert_allclose(made.weights, w, atol=1e-6)


SETTINGS = {
    "softmax": {"top_k": 3},
    "sigmoid": {"top_k": 3, "score": "sigmoid", "renormalize": True, "scaling": 2.0},
    "groups": {"top_k": 3, "score": "sigmoid", "groups": 4, "group_top_k": 2, "group_score": "top2"},
    "relu_rms": {"top_k": 5, "score": "relu_rms"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_ruled_out_experts_and_padding(name):
    """-inf prunes an expert: the rest is as if it were not there. Padding chooses nothing. Gradients stay finite."""
    options = SETTINGS[name]
    logits, mask = normal(3, 7, 8), jnp.ones((3, 7), bool).at[1, 4:].set(False)
    pruned = logits.at[..., 5].set(-jnp.inf).at[2, 0].set(-jnp.inf).at[2, 1, 1:].set(-jnp.inf)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(logits):
        made = route(logits, mask=mask, **options)
        return (made.weights**2).sum() + (made.scores**2).sum(), made

    (_, made), slope = run(pruned)
    indices, weights = np.asarray(made.indices), np.asarray(made.weights)
    assert not (indices == 5).any()
    assert (indices[1, 4:] == 8).all()
    assert (indices[2, 0] == 8).all()
    assert (indices[2, 1] < 8).sum() <= 1
    np.testing.assert_array_equal(weights[indices == 8], 0)
    assert np.isfinite(slope).all()
    assert (np.asarray(slope)[1, 4:] == 0).all()
    if "groups" not in options and name != "relu_rms":
        rest = route(jnp.delete(logits[0], 5, axis=-1), **options)
        np.testing.assert_array_equal(indices[0] - (indices[0] > 5), rest.indices)
        np.testing.assert_allclose(weights[0], rest.weights, atol=1e-6)
    alone = route(pruned[1, :4], **options)
    np.testing.assert_array_equal(indices[1, :4], alone.indices)


def test_a_group_is_not_judged_by_an_expert_that_is_ruled_out():
    """Two live experts at 0.9 + 0.1 against one at 1.5 alone and two that are gone."""
    scores = jnp.array([[0.9, 0.1, 1.5, -jnp.inf, -jnp.inf, -jnp.inf]])
    made = route(scores, top_k=1, score="sigmoid", groups=3, group_top_k=1, group_score="top2", bias=jnp.zeros(6))
    assert made.indices.tolist() == [[0]]
    made = route(scores, top_k=2, groups=3, group_top_k=2, group_score="top2")
    assert made.indices.tolist() == [[2, 0]]


def test_ties_and_edges():
    assert route(jnp.zeros((2, 5)), top_k=3).indices.tolist() == [[0, 1, 2]] * 2
    assert route(jnp.full((1, 4), 500.0).at[0, 2].set(600.0), top_k=3).indices.tolist() == [[2, 0, 1]]
    one = route(normal(4, 1), top_k=1)
    assert (one.indices.tolist(), one.weights.tolist()) == ([[0]] * 4, [[1.0]] * 4)
    alone = route(normal(6), top_k=6)
    assert sorted(alone.indices.tolist()) == list(range(6))
    np.testing.assert_allclose(alone.weights.sum(), 1, atol=1e-6)
    assert route(normal(0, 4), top_k=2).indices.shape == (0, 2)
    # Probabilities that underflow still stand in the order of their logits.
    assert route(jnp.array([[0.0, -300.0, -200.0, -400.0]]), top_k=3).indices.tolist() == [[0, 2, 1]]


def test_dtypes():
    made = route(normal(4, 8).astype(jnp.bfloat16), top_k=2)
    assert (made.indices.dtype, made.weights.dtype, made.logits.dtype) == (jnp.int32, jnp.float32, jnp.float32)
    with jax.enable_x64(True):
        made = route(jnp.ones((4, 8), jnp.float64), top_k=2)
        assert (made.weights.dtype, made.indices.dtype) == (jnp.float64, jnp.int32)
        assert expert_choice(jnp.ones((4, 8), jnp.float64), capacity=1).weights.dtype == jnp.float64


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("groups", "relu_rms") else pytest.mark.full) for n in SETTINGS]
)
def test_transformations(name):
    """jit, vmap, forward and reverse mode agree, and one program serves every platform."""
    options = SETTINGS[name]
    logits, move = normal(2, 5, 8), normal(2, 5, 8, seed=1)

    def weights(x):
        return route(x, bias=None, **options).weights

    whole = route(logits, **options)
    made = jax.jit(lambda x: route(x, **options))(logits)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), made, whole)
    for row in range(2):
        one = jax.tree.map(lambda x, row=row: x[row], jax.vmap(lambda x: route(x, **options))(logits))
        np.testing.assert_array_equal(one.indices, whole.indices[row])
        np.testing.assert_allclose(one.weights, whole.weights[row], atol=1e-6)
    _, forward = jax.jvp(weights, (logits,), (move,))
    _, pull = jax.vjp(weights, logits)
    given = normal(*forward.shape, seed=2)
    np.testing.assert_allclose((forward * given).sum(), (pull(given)[0] * move).sum(), rtol=1e-5)
    exported = export.export(jax.jit(weights), platforms=("cpu", "cuda", "tpu"))(logits)
    np.testing.assert_allclose(exported.call(logits), whole.weights, atol=1e-6)


def test_nan_is_named_here_and_in_compiled_code():
    sentence = r"route: logits must hold no NaN and no \+inf"
    for bad in (jnp.nan, jnp.inf):
        with pytest.raises(ValueError, match=sentence):
            route(normal(3, 4).at[1, 2].set(bad), top_k=2)
    with pytest.raises(ValueError, match="expert_choice: logits must hold no NaN"):
        expert_choice(normal(3, 4).at[1, 2].set(jnp.nan), capacity=1)
    with portable.checks():
        error, _ = jax.jit(checkify.checkify(lambda x: route(x, top_k=2).weights))(jnp.full((3, 4), jnp.nan))
        with pytest.raises(checkify.JaxRuntimeError, match=sentence):
            error.throw()


def test_expert_choice():
    logits, mask = normal(3, 10, 4), jnp.ones((3, 10), bool).at[0, 5:].set(False)
    p = np.exp(np.asarray(logits, np.float64).reshape(30, 4))
    p /= p.sum(-1, keepdims=True)
    real = np.asarray(mask).reshape(-1)
    for rule in ({}, {"mask": mask}):
        made = expert_choice(logits, factor=2.0, **rule)
        assert made.indices.shape == (4, 15)
        for e in range(4):
            column = np.where(real, p[:, e], -1) if rule else p[:, e]
            want = np.argsort(-column, kind="stable")[:15]
            np.testing.assert_array_equal(made.indices[e], want)
            np.testing.assert_allclose(made.weights[e], np.maximum(column[want], 0), atol=1e-6)
    padded = expert_choice(logits, capacity=30, mask=mask)
    assert int((padded.weights > 0).sum()) == 4 * 25
    assert expert_choice(jnp.zeros((5, 2)), capacity=3).indices.tolist() == [[0, 1, 2]] * 2
    # Raising an expert's logit where it chose raises its weights, through the softmax.
    slope = jax.grad(lambda x: expert_choice(x, capacity=2).weights[1].sum())(logits[0])
    chosen = np.zeros(10, bool)
    chosen[np.asarray(expert_choice(logits[0], capacity=2).indices[1])] = True
    p = p.reshape(3, 10, 4)[0]
    want = np.where(chosen[:, None], p[:, 1:2] * ((np.arange(4) == 1) - p), 0)
    np.testing.assert_allclose(slope, want, atol=1e-6)


def limited(routing, room, order, move):
    """The definition: choices one after another, first choices of all tokens first."""
    e, k = routing.num_experts, routing.indices.shape[-1]
    indices, scores = np.asarray(routing.indices).copy(), np.asarray(routing.scores, np.float64)
    load, dropped = np.zeros(e, int), []
    for c in range(k):
        for t in order:
            expert = indices[t, c]
            if expert < e:
                if load[expert] < room[expert]:
                    load[expert] += 1
                else:
                    indices[t, c] = e
                    dropped.append((t, c))
    waiting = dropped if move else []
    while waiting:
        first = {}
        for t, c in waiting:
            first[t] = min(c, first.get(t, k))
        asked = {}
        for t in order:
            free = [i for i in range(e) if load[i] < room[i] and i not in indices[t] and scores[t, i] > 0]
            if t in first and free:
                asked[t] = max(free, key=lambda i, t=t: (scores[t, i], -i))
        if not asked:
            break
        for t, expert in asked.items():
            if load[expert] < room[expert]:
                load[expert] += 1
                indices[t, first[t]] = expert
                waiting.remove((t, first[t]))
    return indices


@pytest.mark.parametrize("overflow", ["drop", "next"])
@pytest.mark.parametrize("priority", ["position", "score", "array"])
def test_capacity(priority, overflow, seed):
    logits = normal(4, 8, 6, seed=seed, scale=1.5).at[..., 2].add(2)
    mask = jnp.ones((4, 8), bool).at[1, 3:].set(False)
    made = route(logits, top_k=2, mask=mask)
    flat = jax.tree.map(lambda x: x.reshape(32, -1), made)
    given = normal(4, 8, seed=9) if priority == "array" else priority
    level = {
        "position": np.zeros(32),
        "score": np.asarray(flat.weights).max(-1),
        "array": np.asarray(given).reshape(-1) if priority == "array" else None,
    }[priority]
    order = np.argsort(-level, kind="stable")
    run = jax.jit(lambda made, room: limit_capacity(made, room, priority=given, overflow=overflow))
    for room in ([5] * 6, [3, 9, 5, 1, 30, 7], [9] * 6, [64] * 6):
        got = run(made, jnp.array(room))
        want = limited(flat, room, order, overflow == "next")
        np.testing.assert_array_equal(got.indices.reshape(32, 2), want)
        scores = np.append(np.asarray(flat.scores), np.zeros((32, 1)), -1)
        np.testing.assert_allclose(got.weights.reshape(32, 2), np.take_along_axis(scores, want, -1), atol=1e-6)
        if room == [9] * 6:  # 54 choices, 54 places
            assert (want < 6).sum() >= 53 if overflow == "next" else (want < 6).sum() < 50
    assert (limited(flat, [5] * 6, order, False) == 6).sum() > 10 + 5


def test_capacity_by_a_factor_and_gradients_of_moved_choices():
    made = route(normal(30, 6), top_k=2)
    same = limit_capacity(made, factor=1.5)
    np.testing.assert_array_equal(same.indices, limit_capacity(made, 15).indices)
    np.testing.assert_array_equal(limit_capacity(made, factor=6.0).indices, made.indices)

    def total(logits):
        moved = limit_capacity(route(logits, top_k=2, renormalize=True), 10, overflow="next")
        return (moved.weights * normal(30, 2, seed=3)).sum()

    logits = normal(30, 6)
    step = 1e-6 * np.asarray(normal(30, 6, seed=4), np.float64)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits, np.float64))
        run = jax.jit(jax.value_and_grad(total))
        want = float(run(wide + step)[0] - run(wide - step)[0]) / 2e-6
        got = (np.asarray(run(wide)[1]) * step).sum() / 1e-6
    assert abs(got - want) <= 1e-6 * max(1, abs(want))


def test_simple_experts():
    """MoE++'s order: networks, constants, a copy, a zero; one token and expert at a time."""
    x, constants, mixes = normal(20, 8), normal(2, 8, seed=1), normal(2, 8, 2, seed=2)
    routing = route(normal(20, 9, seed=3), top_k=4)  # 4 networks, 2 constants, 2 copies, 1 zero
    want, left = np.zeros((20, 8)), np.full((20, 4), 4)
    tokens, v, mix, weights = (np.asarray(a, np.float64) for a in (x, constants, mixes, routing.weights))
    indices = np.asarray(routing.indices)
    for t, c in np.ndindex(20, 4):
        e, w, token = indices[t, c], weights[t, c], tokens[t]
        if e < 4:
            left[t, c] = e
        elif e < 6:
            a = np.exp(token @ mix[e - 4])
            a /= a.sum()
            want[t] += w * (a[0] * token + a[1] * v[e - 4])
        elif e < 8:
            want[t] += w * token
    y, networks = jax.jit(functools.partial(simple_experts, copies=2, zeros=1))(
        x, routing, constants=constants, mixes=mixes
    )
    np.testing.assert_allclose(y, want, atol=1e-6)
    np.testing.assert_array_equal(networks.indices, left)
    np.testing.assert_array_equal(networks.weights, np.where(left < 4, routing.weights, 0))
    assert networks.num_experts == 4
    half, _ = simple_experts(x.astype(jnp.bfloat16), routing, copies=5)
    assert half.dtype == jnp.bfloat16


def test_remap_experts():
    routing = route(normal(3, 6, 4), top_k=2, mask=jnp.ones((3, 6), bool).at[0, 0].set(False))
    table = jnp.array([[0, 1, 2, 3], [4, 1, 5, 3], [0, 6, 6, 3]])  # 6 is gone
    rows = jax.random.randint(jax.random.key(0), (3, 6), 0, 3)
    made = jax.jit(functools.partial(remap_experts, num_experts=6))(routing, table, rows=rows)
    places, weights = np.full((3, 6, 2), 6), np.zeros((3, 6, 2), np.float32)
    indices = np.asarray(routing.indices)
    for place in np.ndindex(3, 6, 2):
        if indices[place] < 4:
            places[place] = np.asarray(table)[np.asarray(rows)[place[:2]], indices[place]]
        if places[place] < 6:
            weights[place] = np.asarray(routing.weights)[place]
    np.testing.assert_array_equal(made.indices, places)
    np.testing.assert_array_equal(made.weights, weights)
    assert (places == 6).sum() > 4
    turned = remap_experts(routing, jnp.array([3, 2, 1, 0]), num_experts=4)
    np.testing.assert_array_equal(turned.indices[1:], 3 - routing.indices[1:])
    assert turned.indices[0, 0].tolist() == [4, 4]


L = jnp.zeros((3, 8))
R = Routing(jnp.zeros((3, 2), jnp.int32), jnp.ones((3, 2)), 8)
BAD = {
    "top_k": (lambda: route(L, top_k=9), "top_k must be from 1 to the number of experts; got top_k=9, E=8"),
    "no choice": (lambda: route(L, top_k=0), "got top_k=0, E=8"),
    "groups": (lambda: route(L, top_k=1, groups=3), "groups must divide the experts; got groups=3, E=8"),
    "groups kept": (
        lambda: route(L, top_k=1, groups=4, group_top_k=5),
        "group_top_k must be from 1 to groups=4; got 5",
    ),
    "few": (lambda: route(L, top_k=5, groups=4, group_top_k=2), "got top_k=5, group_top_k=2 groups of 2"),
    "score": (lambda: route(L, top_k=1, score="tanh"), "one of softmax, sigmoid, relu_rms; got 'tanh'"),
    "group score": (lambda: route(L, top_k=1, group_score="sum"), "one of max, top2; got 'sum'"),
    "scale": (lambda: route(L, top_k=1, score_scale=jnp.ones(8)), "score_scale belongs to score='relu_rms'"),
    "half": (lambda: route(L, top_k=2.0), "top_k must be an integer; got 2.0"),
    "nan bias": (lambda: route(L, top_k=1, bias=jnp.full(8, jnp.nan)), "bias must hold finite numbers"),
    "factor": (lambda: limit_capacity(R, factor=0.0), "factor must be positive; got 0.0"),
    "v3": (
        lambda: route_options("deepseek_v3", {"scoring_func": "softmax"}),
        "scoring_func of deepseek_v3 must be 'sigmoid'",
    ),
    "bias": (lambda: route(L, top_k=1, bias=jnp.ones(7)), r"bias must be \[E\] with E=8; got shape \[7\]"),
    "mask": (lambda: route(L, top_k=1, mask=jnp.ones(3)), r"mask must be booleans \[\*tokens\], \[3\]; got float32"),
    "zeros": (lambda: route(L, top_k=1, zero_experts=9), "zero_experts must be from 0 to the number of experts; got 9"),
    "scalar": (lambda: route(jnp.zeros(()), top_k=1), "got a scalar"),
    "integers": (lambda: route(L.astype(int), top_k=1), "logits must be floating point; got int32"),
    "list": (lambda: route([1.0], top_k=1), "logits must be an array; got list"),
    "choice": (lambda: expert_choice(L), "give either capacity or factor"),
    "choices": (lambda: expert_choice(L, capacity=4), "from 1 to the number of tokens; got 4, 3 tokens"),
    "capacity": (lambda: limit_capacity(R), "give either capacity or factor"),
    "empty": (lambda: limit_capacity(R, 0), "an expert must take at least one choice; got 0"),
    "capacities": (lambda: limit_capacity(R, jnp.ones(3, int)), r"or integers \[E\] with E=8"),
    "overflow": (lambda: limit_capacity(R, 1, overflow="lose"), "one of drop, next; got 'lose'"),
    "priority": (lambda: limit_capacity(R, 1, priority="luck"), "one of position, score; got 'luck'"),
    "priorities": (lambda: limit_capacity(R, 1, priority=jnp.ones(2)), r"priority must be \[\*tokens\], \[3\]"),
    "hand": (lambda: limit_capacity(R, 1, overflow="next"), "needs the scores of a routing from `route`"),
    "table": (lambda: remap_experts(R, jnp.zeros(7, int), num_experts=8), r"with E=8; got shape \[7\]"),
    "rows": (lambda: remap_experts(R, jnp.arange(8)[None], num_experts=8), r"give rows with a table \[rows, E\]"),
    "place": (lambda: remap_experts(R, jnp.arange(8) + 2, num_experts=8), "places from 0 to 8"),
    "twice": (lambda: remap_experts(R, jnp.zeros(8, int), num_experts=8), "no place may stand twice"),
    "row": (
        lambda: remap_experts(R, jnp.arange(8)[None], num_experts=8, rows=jnp.array([0, 1, 0])),
        "rows must be from 0 to 0",
    ),
    "tokens": (lambda: simple_experts(jnp.ones((4, 5)), R), r"of the routing's tokens, \[3\]; got shape \[4, 5\]"),
    "constants": (lambda: simple_experts(jnp.ones((3, 5)), R, constants=jnp.ones((1, 5))), "together, or neither"),
    "mixes": (
        lambda: simple_experts(jnp.ones((3, 5)), R, constants=jnp.ones((1, 5)), mixes=jnp.ones((1, 5))),
        r"mixes \[c, d, 2\] with d=5; got \[1, 5\] and \[1, 5\]",
    ),
    "too many": (lambda: simple_experts(jnp.ones((3, 5)), R, copies=9), "8 experts must include 0 constants, 9 copies"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_gets_a_sentence(fault):
    call, sentence = BAD[fault]
    with pytest.raises((ValueError, TypeError), match=sentence):
        call()

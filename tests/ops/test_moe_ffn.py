"""What is special to the experts' ops: what they refuse, what they drop, and what must not change a result."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import portable
from portable.ops import Routing, grouped_matmul, moe_ffn
from tests.oracles import child

T, D, F, E, K = 12, 8, 16, 4, 2
FORMS = ("xla_small_tiles", "xla_large_tiles", "xla_ragged")


def arguments(seed, tokens=T):
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(E)[:K] for _ in range(tokens)]).astype(np.int32)
    routing = Routing(jnp.asarray(indices), jnp.asarray(rng.uniform(size=indices.shape), jnp.float32), E)
    shapes = (tokens, D), (E, D, F), (E, D, F), (E, F, D)
    x, gate, up, down = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return x, gate, up, down, routing


def defined(x, gate, up, down, routing, capacity=None):
    """The sum over each token's choices, a loop in float64; an expert takes no more than `capacity`."""
    x, gate, up, down, weights = (np.asarray(a, np.float64) for a in (x, gate, up, down, routing.weights))
    taken, y = np.zeros(E, int), np.zeros_like(x)
    for t, choices in enumerate(np.asarray(routing.indices)):
        for j, e in enumerate(choices):
            if e == E or (capacity is not None and taken[e] >= capacity):
                continue
            taken[e] += 1
            g = x[t] @ gate[e]
            y[t] += weights[t, j] * ((g / (1 + np.exp(-g)) * (x[t] @ up[e])) @ down[e])
    return y


@pytest.mark.parametrize("capacity", [None, 1, 4, T])
@pytest.mark.parametrize("form", [*FORMS, "xla_capacity"])
def test_a_capacity_drops_an_experts_last_tokens(form, capacity, seed):
    if form == "xla_capacity" and capacity is None:
        with pytest.raises(portable.Unavailable, match="needs the most choices an expert takes; got capacity=None"):
            moe_ffn(*arguments(seed), implementation=form)
        return
    got = moe_ffn(*arguments(seed), capacity=capacity, implementation=form)
    np.testing.assert_allclose(got, defined(*arguments(seed), capacity), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_token_without_a_number_spoils_itself_alone(form, seed):
    x, gate, up, down, routing = arguments(seed)
    # The last token has no expert: its row lies behind those of all experts.
    indices = routing.indices.at[-1].set(E)
    routing = dataclasses.replace(routing, indices=indices)

    def value(x, gate, up, down):
        return moe_ffn(x, gate, up, down, routing, implementation=form)

    bad = x.at[-1].set(jnp.nan)
    got, pull = jax.vjp(value, bad, gate, up, down)
    want, pull_want = jax.vjp(value, x, gate, up, down)
    np.testing.assert_array_equal(got, want)
    assert not np.asarray(got[-1]).any()
    jax.tree.map(np.testing.assert_array_equal, pull(x), pull_want(x))
    spoiled = value(x.at[3].set(jnp.nan), gate, up, down)
    np.testing.assert_array_equal(np.isnan(spoiled).any(1), np.arange(T) == 3)


@pytest.mark.parametrize("form", [None, *FORMS])
def test_a_foreign_index_in_compiled_code_is_no_choice(form, seed):
    *arrays, routing = arguments(seed)
    put = lambda i: dataclasses.replace(routing, indices=routing.indices.at[2, 1].set(i))  # noqa: E731
    run = jax.jit(lambda indices: moe_ffn(*arrays, dataclasses.replace(routing, indices=indices), implementation=form))
    want = run(put(E).indices)
    for foreign in (-1, E + 5):
        np.testing.assert_array_equal(run(put(foreign).indices), want)


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_no_form_holds_all_experts_matrices(tokens, dtype, seed):
    """In the dtype of the products, whatever that of the matrices: what a processor holds is a few experts' of them."""
    d, f, e = 64, 128, 32
    of = jax.ShapeDtypeStruct
    for given in (jnp.bfloat16, jnp.float32):
        up, down = of((e, d, f), given), of((e, f, d), given)
        choices = of((tokens, K), jnp.int32), of((tokens, K), jnp.float32)

        def value(x, gate, up, down, indices, weights):
            return moe_ffn(x, gate, up, down, Routing(indices, weights, e), implementation="xla_small_tiles")

        done = jax.jit(value).lower(of((tokens, d), dtype), up, up, down, *choices).compile()
        assert done.memory_analysis().temp_size_in_bytes < 3 * d * f * 4 * e / 4


def test_the_order_of_tokens_does_not_matter(seed):
    x, *experts, routing = arguments(seed)
    order = np.random.default_rng(seed).permutation(T)
    shuffled = dataclasses.replace(routing, indices=routing.indices[order], weights=routing.weights[order])
    want = moe_ffn(x, *experts, routing)[order]
    np.testing.assert_allclose(moe_ffn(x[order], *experts, shuffled), want, rtol=1e-6, atol=1e-6)


def test_shapes_of_tokens_and_a_mapped_axis(seed):
    x, *experts, routing = arguments(seed)
    want = moe_ffn(x, *experts, routing)

    def folded(tree):
        return jax.tree.map(lambda a: a.reshape(3, 4, *a.shape[1:]), tree)

    np.testing.assert_array_equal(moe_ffn(folded(x), *experts, folded(routing)).reshape(T, D), want)
    mapped = jax.vmap(lambda x, r: moe_ffn(x, *experts, r))(folded(x), folded(routing))
    np.testing.assert_allclose(mapped.reshape(T, D), want, rtol=1e-5, atol=1e-5)


SHARDED = """
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from portable.ops import Routing, moe_ffn
from portable import sharding
from portable.parity.numbers import relative
from tests.ops.test_moe_ffn import E, arguments

x, gate, up, down, routing = arguments(0)
mesh = sharding.mesh(data=4)

def local(x, indices, weights, *experts):  # each device's tiles run as often as its own tokens ask
    return moe_ffn(x, *experts, Routing(indices, weights, E), implementation=FORM)

for FORM in (None, "xla_large_tiles"):
    tokens, whole = P("data"), P()
    over = jax.shard_map(local, mesh=mesh, in_specs=(tokens,) * 3 + (whole,) * 3, out_specs=tokens)

    def slopes(f):
        loss = lambda x, weights, *experts: jnp.sum(f(x, routing.indices, weights, *experts) ** 2)
        return jax.jit(jax.grad(loss, argnums=range(5)))(x, routing.weights, gate, up, down)

    for got, want in zip(slopes(over), slopes(local), strict=True):
        assert relative(got, want) <= 2e-6
print("agree")
"""


def test_tokens_over_four_devices():
    assert "agree" in child(SHARDED, devices=4)


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"routing": None}, TypeError, "routing must be a Routing, as ops.route returns; got NoneType."),
        ({"num_experts": 5}, ValueError, "must be made for these experts, e=4; got one for 5."),
        ({"indices": -1}, ValueError, "indices must lie in 0..4, where 4 is an empty choice."),
        ({"indices": 5}, ValueError, "indices must lie in 0..4"),
        ({"x": jnp.ones([5, D])}, ValueError, "indices and weights must be [*tokens, k] for x [5, 8]; got [12, 2]"),
        ({"x": jnp.ones([T, D], int)}, TypeError, "x must be floating point"),
        ({"w_down": jnp.ones([E, F, 9])}, ValueError, "w_down must be [e, f, d] with d=8; got shape [4, 16, 9]."),
        ({"w_up": [jnp.ones([D, F])] * 3}, ValueError, "w_up must have e=4 arrays; got 3."),
        ({"w_up": [jnp.ones([D, F])] * 4}, TypeError, "must all be stacked arrays, or all sequences; got both."),
        ({"w_gate": None, "activation": "swiglu_oai"}, ValueError, "need a gate; got w_gate=None."),
        ({"activation": "swish"}, ValueError, "activation must be one of silu, gelu,"),
        ({"b_up": jnp.ones([E, D])}, ValueError, "b_up must be [e, f] with f=16; got shape [4, 8]."),
        ({"capacity": 2.0}, ValueError, "capacity must be an integer of at least 0; got 2.0."),
        ({"capacity": -1}, ValueError, "capacity must be an integer of at least 0; got -1."),
    ],
)
def test_mistakes(change, error, sentence):
    x, w_gate, w_up, w_down, routing = arguments(0)
    given = {"x": x, "w_gate": w_gate, "w_up": w_up, "w_down": w_down, "routing": routing} | change
    if "num_experts" in given:
        given["routing"] = dataclasses.replace(routing, num_experts=given.pop("num_experts"))
    if "indices" in given:
        given["routing"] = dataclasses.replace(routing, indices=routing.indices.at[2, 1].set(given.pop("indices")))
    positional = [given.pop(name) for name in ("x", "w_gate", "w_up", "w_down", "routing")]
    with pytest.raises(error, match=re.escape(sentence)):
        moe_ffn(*positional, **given)


@pytest.mark.parametrize("sizes, sentence", [([3, -1], "must not be negative"), ([3, 3], "at most the rows of x, 5")])
def test_groups_that_do_not_fit(sizes, sentence):
    with pytest.raises(ValueError, match=sentence):
        grouped_matmul(jnp.ones([5, 2]), jnp.ones([2, 2, 3]), jnp.array(sizes))

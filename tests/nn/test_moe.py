"""The layer against transformers' blocks and a definition in numpy; its tables, slices and copies of a dense layer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import nn, ops
from portable.parity.numbers import relative
from tests import moe_families
from tests.oracles import need


def normal(*shape, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def filled(make, fill):
    """The layer that `make` builds, its variables from numpy: nothing is compiled to draw what is thrown away."""
    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = [(path, v.replace(jnp.asarray(fill(path, v), v.get_value().dtype))) for path, v in nnx.to_flat_state(state)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def layer(seed=0, **options):
    """A small layer, each Param away from its initial value."""
    rng = np.random.default_rng(seed)

    def fill(path, variable):
        if path[-1] == "table":
            return options["table"]
        return rng.normal(size=variable.get_value().shape) * 0.3 * isinstance(variable, nnx.Param)

    return filled(lambda: nn.MoE(16, 12, **{"num_experts": 6, "top_k": 2, "rngs": nnx.Rngs(0)} | options), fill)


@functools.partial(jax.jit, static_argnums=0)
def called(graphdef, state, x, kwargs):
    return nnx.merge(graphdef, state)(x, return_routing=True, **kwargs)


def run(made, x, **kwargs):
    """Calls the layer compiled as one program, as users do; returns the routing too."""
    return called(*nnx.split(made), x, kwargs)


def ours(family):
    """The layer with the block's weights, and where each tensor of the block lies in it."""
    options = ops.route_options(family.model_type, family.config)
    down = family.array("experts.down_proj")
    oss = family.model_type == "gpt_oss"
    shared = next((k for k in ("shared_expert", "shared_experts") if family.has(f"{k}.up_proj.weight")), None)
    options |= {
        "num_experts": len(down),
        "activation": "swiglu_oai" if oss else "silu",
        "use_bias": oss,
        "use_router_bias": family.bias is not None,
        "use_selection_bias": family.selection_bias is not None,
        "copies": family.array(family.kernel).shape[0] - len(down),
        "shared": None if shared is None else family.array(f"{shared}.up_proj.weight").shape[0],
        "shared_gate": family.has("shared_expert_gate.weight"),
    }

    def halves(x):
        """Their gate and up in one tensor: rows, or in gpt-oss every other column."""
        if oss:
            return x[..., ::2], x[..., 1::2]
        return np.split(x[: len(down)].transpose(0, 2, 1), 2, -1)

    places = {
        "router.kernel": (family.kernel, np.transpose),
        "router.bias": (family.bias, np.asarray),
        "gate": ("experts.gate_up_proj", lambda x: halves(x)[0]),
        "up": ("experts.gate_up_proj", lambda x: halves(x)[1]),
        "down": ("experts.down_proj", np.asarray if oss else lambda x: x.transpose(0, 2, 1)),
        "gate_bias": ("experts.gate_up_proj_bias", lambda x: x[..., ::2]),
        "up_bias": ("experts.gate_up_proj_bias", lambda x: x[..., 1::2]),
        "down_bias": ("experts.down_proj_bias", np.asarray),
        "shared_gate.kernel": ("shared_expert_gate.weight", np.transpose),
        **{f"shared.{part}.kernel": (f"{shared}.{part}_proj.weight", np.transpose) for part in ("gate", "up", "down")},
    }
    places["selection_bias"] = family.selection_bias, np.asarray

    def fill(path, variable):
        tensor, view = places[".".join(map(str, path))]
        return view(family.array(tensor))

    made = filled(lambda: nn.MoE(moe_families.D, moe_families.F, rngs=nnx.Rngs(0), **options), fill)
    return made, places


# Each has what no other has; the rest differ in the router alone, and those of all are tested beside `route`.
DISTINCT = ("qwen2_moe", "gpt_oss", "deepseek_v3", "lfm2_moe", "longcat_flash")


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in DISTINCT else pytest.mark.full) for n in moe_families.FAMILIES]
)
def test_blocks_of_transformers(name):
    """Output within 2e-5, and the gradient of the input and of every weight within 2.5 times that."""
    torch = need("torch")
    family = moe_families.family(name)
    x = torch.randn(2, 17, moe_families.D, requires_grad=True)
    want = family.block(x)
    want = want[0] if isinstance(want, tuple) else want
    weigh = torch.randn_like(want)
    (want * weigh).sum().backward()
    made, places = ours(family)
    graphdef, params, rest = nnx.split(made, nnx.Param, ...)

    @jax.jit
    def step(params, x):
        def loss(params, x):
            y = nnx.merge(graphdef, params, rest)(x)
            return (y * jnp.asarray(weigh.numpy())).sum(), y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (_, y), (slopes, slope) = step(params, jnp.asarray(x.detach().numpy()))
    assert relative(y, want.detach().numpy()) <= 2e-5
    assert relative(slope, x.grad.numpy()) <= 5e-5
    theirs = dict(family.block.named_parameters())
    seen = set()
    for path, got in nnx.to_flat_state(slopes):
        tensor, view = places[".".join(map(str, path))]
        seen.add(tensor)
        assert relative(got.get_value(), view(theirs[tensor].grad.numpy())) <= 5e-5, path
    assert seen == set(theirs)


def test_moe_plus_plus():
    """Two networks, two constants, a copy and a zero; two layers, the second with the logits of the first."""
    options = {"num_experts": 2, "constants": 2, "copies": 1, "zeros": 1, "renormalize": True, "router_hidden": 20}
    first, second = layer(**options, router_residual=True), layer(5, **options, router_residual=True)
    x = normal(30, 16)

    def definition(made, u, previous):
        p = {
            ".".join(map(str, path)): np.asarray(v.get_value(), np.float64)
            for path, v in nnx.to_flat_state(nnx.state(made))
        }
        logits = np.tanh(u @ p["router_hidden.kernel"]) @ p["router.kernel"]
        if previous is not None:
            logits = logits + previous @ p["router_residual.kernel"]
        scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        y = np.zeros_like(u)
        for t in range(len(u)):
            chosen = np.argsort(-scores[t])[:2]
            w = np.where(chosen == 5, 0, scores[t, chosen])
            for e, weight in zip(chosen, w / w.sum()):
                if e < 2:
                    g = u[t] @ p["gate"][e]
                    out = (g / (1 + np.exp(-g)) * (u[t] @ p["up"][e])) @ p["down"][e]
                elif e < 4:
                    a = np.exp(u[t] @ p["mixes"][e - 2])
                    out = (a[0] * u[t] + a[1] * p["constants"][e - 2]) / a.sum()
                else:
                    out = u[t] if e == 4 else np.zeros_like(u[t])
                y[t] += weight * out
        return y, logits

    want, logits = definition(first, np.asarray(x, np.float64), None)
    got, routing = run(first, x)
    assert relative(got, want) <= 1e-5
    assert sorted(np.unique(np.asarray(routing.indices))) == [0, 1, 2, 3, 4, 5]
    want, _ = definition(second, want, logits)
    got, _ = run(second, got, previous_logits=routing.logits)
    assert relative(got, want) <= 1e-5


def test_blockffn_plain_experts():
    """As many experts as the router's ReLU leaves, without a gate; all of them as one dense product."""
    made = layer(top_k=6, score="relu_rms", gated=False, use_bias=True)
    x = normal(3, 9, 16)
    y, routing = run(made, x)
    logits = np.asarray(x, np.float64) @ np.asarray(made.router.kernel[...], np.float64)
    r = np.maximum(logits, 0)
    w = r / np.sqrt((r**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(made.score_scale[...])
    up, up_bias, down, down_bias = (
        np.asarray(p[...], np.float64) for p in (made.up, made.up_bias, made.down, made.down_bias)
    )
    hidden = np.einsum("btd,edf->btef", np.asarray(x, np.float64), up) + up_bias
    hidden = hidden / (1 + np.exp(-hidden))
    want = np.einsum("btef,efd,bte->btd", hidden, down, w) + np.einsum("ed,bte->btd", down_bias, w)
    assert relative(y, want) <= 1e-5
    counts = (np.asarray(routing.indices) < 6).sum(-1)
    assert counts.min() < counts.max()


def test_experts_that_choose():
    made = layer(top_k=None, expert_choice=True, capacity_factor=2.0)
    x, mask = normal(2, 9, 16), jnp.ones((2, 9), bool).at[1, 5:].set(False)
    y, choice = run(made, x, mask=mask)
    assert choice.indices.shape == (6, 6)
    flat, want = np.asarray(x, np.float64).reshape(18, 16), np.zeros((18, 16))
    gate, up, down = (np.asarray(p[...], np.float64) for p in (made.gate, made.up, made.down))
    for e, c in np.ndindex(6, 6):
        u = flat[int(choice.indices[e, c])]
        g = u @ gate[e]
        want[int(choice.indices[e, c])] += float(choice.weights[e, c]) * (
            (g / (1 + np.exp(-g)) * (u @ up[e])) @ down[e]
        )
    assert relative(y.reshape(18, 16), want) <= 1e-5
    assert (np.asarray(y)[1, 5:] == 0).all()


def test_a_capacity_and_noise():
    made, x = layer(capacity_factor=1.0, noisy=True, jitter=0.1), normal(24, 16)
    y, routing = run(made, x)
    assert int(ops.expert_load(routing).max()) <= 8
    free = layer(noisy=True)
    whole, _ = run(free, x)
    dropped = np.asarray((routing.indices == 6).any(-1))
    assert dropped.any()
    np.testing.assert_allclose(y[~dropped], whole[~dropped], atol=1e-5)
    one, _ = run(made, x, key=jax.random.key(1))
    assert relative(one, run(made, x, key=jax.random.key(2))[0]) > 1e-2
    np.testing.assert_array_equal(one, run(made, x, key=jax.random.key(1))[0])


@pytest.mark.parametrize("biased", [False, True])
def test_slices_of_a_dense_layer(biased):
    """All slices at weight 1 are the dense layer; copies are it whatever is chosen, for weights that sum to 1."""
    gate, up, down, x = normal(16, 24), normal(16, 24, seed=1), normal(24, 16, seed=2), normal(5, 16, seed=3)
    b_gate, b_up, b_down = normal(24, seed=4), normal(24, seed=5), normal(16, seed=6)
    biases = {"b_gate": b_gate, "b_up": b_up, "b_down": b_down} if biased else {}
    g, u = (np.asarray(x, np.float64) @ np.asarray(w, np.float64) for w in (gate, up))
    if biased:
        g, u = g + np.asarray(b_gate), u + np.asarray(b_up)
    want = (g / (1 + np.exp(-g)) * u) @ np.asarray(down, np.float64) + (np.asarray(b_down) if biased else 0)
    sliced = nn.moe_from_dense(gate, up, down, num_experts=4, top_k=2, **biases, rngs=nnx.Rngs(0))
    assert sliced.up.get_value().shape == (4, 16, 6)
    every = ops.Routing(jnp.tile(jnp.arange(4), (5, 1)), jnp.ones((5, 4)), 4)
    assert relative(run(sliced, x, routing=every)[0], want) <= 2e-6
    assert relative(run(sliced, x)[0], want) > 0.1
    options = {"num_experts": 4, "top_k": 2, "renormalize": True, "how": "copy"}
    copied = nn.moe_from_dense(gate, up, down, **options, **biases, rngs=nnx.Rngs(0))
    assert relative(run(copied, x)[0], want) <= 2e-6
    plain = nn.moe_from_dense(None, up, down, num_experts=4, top_k=2, activation="relu", rngs=nnx.Rngs(0))
    want = np.maximum(np.asarray(x, np.float64) @ np.asarray(up, np.float64), 0) @ np.asarray(down, np.float64)
    assert relative(run(plain, x, routing=every)[0], want) <= 2e-6


def test_adapters_replace_experts():
    """Tokens of adapter 1 take slot 6 for expert 2; those of adapter 0 are as in the base; a pruned expert is gone."""
    table = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 6, 3, 4, 5]])
    made, x = layer(num_experts=6, table=table, slots=8), normal(40, 16)
    rows = jnp.arange(40) % 2
    y, routing = run(made, x, rows=rows)
    base = layer()
    for name in ("gate", "up", "down"):
        getattr(base, name)[...] = getattr(made, name)[...][:6]
    base.router.kernel[...] = made.router.kernel[...]
    without, same = run(base, x)
    np.testing.assert_array_equal(routing.indices, same.indices)
    tuned = np.asarray((routing.indices == 2).any(-1) & (rows == 1))
    assert 3 < tuned.sum() < 20
    np.testing.assert_allclose(y[~tuned], without[~tuned], atol=1e-5)
    for name in ("gate", "up", "down"):
        param = getattr(base, name)
        param[...] = param[...].at[2].set(getattr(made, name)[...][6])
    np.testing.assert_allclose(y[tuned], run(base, x)[0][tuned], atol=1e-5)

    made.set_table(table.at[1].set(table[0]).at[:, 2].set(8))
    pruned, _ = run(made, x, rows=rows)
    base.down[...] = base.down[...].at[2].set(0.0)
    np.testing.assert_allclose(pruned, run(base, x)[0], atol=1e-5)


def test_the_selection_bias_balances_and_is_no_param():
    made = layer(use_selection_bias=True, score="sigmoid", renormalize=True)
    x = normal(400, 16) + 0.5
    _, routing = run(made, x)
    before = ops.expert_load(routing)
    for _ in range(60):
        made.update_bias(ops.expert_load(run(made, x)[1]), rate=0.02)
    after = ops.expert_load(run(made, x)[1])
    assert before.max() - before.min() > 3 * (after.max() - after.min())
    assert not any("selection_bias" in path for path, _ in nnx.to_flat_state(nnx.state(made, nnx.Param)))
    graphdef, state = nnx.split(made)
    slope = jax.jit(jax.grad(lambda s: nnx.merge(graphdef, s)(x).sum()))(state)
    np.testing.assert_array_equal(slope["selection_bias"].get_value(), after)


def test_padding_and_dtypes():
    made, x = layer(shared=8, shared_gate=True), normal(2, 7, 16)
    mask = jnp.ones((2, 7), bool).at[0, 3:].set(False)
    y, routing = run(made, x, mask=mask)
    whole, _ = run(made, x)
    np.testing.assert_allclose(y[mask], whole[mask], atol=1e-6)
    assert (np.asarray(routing.indices)[0, 3:] == 6).all()
    half = layer(dtype=jnp.bfloat16)
    y, routing = run(half, x)
    assert (y.dtype, routing.weights.dtype, routing.logits.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert relative(y, run(layer(), x)[0]) <= 3e-2


def test_every_variable_names_its_axes_and_experts_are_drawn_alone():
    made = layer(
        use_bias=True, use_selection_bias=True, constants=1, shared=8, shared_gate=True, noisy=True, table=jnp.arange(6)
    )
    for variable in jax.tree.leaves(nnx.state(made), is_leaf=lambda x: isinstance(x, nnx.Variable)):
        assert len(variable.get_metadata()["axes"]) == variable.get_value().ndim
    assert made.up.get_metadata()["axes"] == ("expert", "embed", "mlp")
    big = nn.MoE(256, 64, num_experts=16, top_k=1, rngs=nnx.Rngs(0))
    assert 0.9 / 16 < float(big.up[...].std()) < 1.1 / 16  # 1 / sqrt(256), not 1 / sqrt(16 * 256)


BAD = {
    "top_k": (lambda: layer(top_k=7), "route: top_k must be from 1 to the number of experts; got top_k=7, E=6"),
    "option": (lambda: layer(groups=4), "groups must divide the experts; got groups=4, E=6"),
    "clamp": (lambda: layer(activation="swiglu_oai", gated=False), "needs gated experts; got gated=False"),
    "activation": (lambda: layer()(normal(3, 15)), "x must be [*tokens, d] with d=16; got [3, 15]"),
    "list": (lambda: layer()([1.0]), "x must be [*tokens, d] with d=16; got list"),
    "shared gate": (lambda: layer(shared_gate=True), "give its width as shared"),
    "shared": (lambda: layer(shared=8, activation="relu2"), "is one of silu, gelu, gelu_tanh, relu; got 'relu2'"),
    "neither": (lambda: layer(top_k=None), "give top_k, or expert_choice=True"),
    "both": (lambda: layer(expert_choice=True), "give top_k, or expert_choice=True"),
    "no factor": (lambda: layer(top_k=None, expert_choice=True), "expert_choice needs a capacity_factor"),
    "table": (lambda: layer(table=jnp.arange(5)), "table must be [E] or [rows, E] with E=6; got shape [5]"),
    "places": (lambda: layer(table=jnp.arange(6) + 2), "places from 0 to 6 (which stands for none)"),
    "slots": (lambda: layer(slots=8), "slots needs a table"),
    "rows": (lambda: layer()(normal(3, 16), rows=jnp.zeros(3, int)), "rows is for a layer with a table"),
    "no rows": (lambda: layer(table=jnp.arange(6)[None])(normal(3, 16)), "give rows with a table [rows, E]"),
    "set": (lambda: layer().set_table(jnp.arange(6)), "must have the shape of the layer's, None; got [6]"),
    "residual": (lambda: layer()(normal(3, 16), previous_logits=normal(3, 6)), "a layer with router_residual=True"),
    "bias": (lambda: layer().update_bias(jnp.ones(6)), "a layer with use_selection_bias=True"),
    "routing": (
        lambda: layer()(normal(3, 16), routing=ops.Routing(jnp.zeros((3, 1), int), jnp.ones((3, 1)), 5)),
        "the routing must be made for these experts, e=6; got one for 5",
    ),
    "mask": (
        lambda: layer()(
            normal(3, 16), mask=jnp.ones(3, bool), routing=ops.Routing(jnp.zeros((3, 1), int), jnp.ones((3, 1)), 6)
        ),
        "give a mask, or a routing whose choices are empty at padding",
    ),
    "name": (lambda: layer(activation="swish"), "activation must be one of silu, gelu,"),
    "factor": (lambda: layer(capacity_factor=-1.0), "factor must be positive; got -1.0"),
    "overflow": (lambda: layer(capacity_factor=1.0, overflow="x"), "overflow must be one of drop, next; got 'x'"),
    "none": (lambda: layer(num_experts=0, zeros=2), "num_experts must be at least 1; got 0"),
    "flat": (lambda: nn.moe_from_dense(None, normal(4), normal(4), num_experts=2), "w_up must be [d, m]; got [4]"),
    "split": (
        lambda: nn.moe_from_dense(None, normal(4, 10), normal(10, 4), num_experts=3, top_k=1, rngs=nnx.Rngs(0)),
        "num_experts must divide the 10 hidden channels; got 3",
    ),
    "how": (
        lambda: nn.moe_from_dense(None, normal(4, 9), normal(9, 4), num_experts=3, how="cut", rngs=nnx.Rngs(0)),
        "how must be split or copy; got 'cut'",
    ),
    "dense": (
        lambda: nn.moe_from_dense(None, normal(4, 9), normal(8, 4), num_experts=3, rngs=nnx.Rngs(0)),
        "w_down must be [9, 4]; got [8, 4]",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_refusals(fault):
    call, sentence = BAD[fault]
    with pytest.raises(ValueError) as error:
        call()
    assert sentence in str(error.value)

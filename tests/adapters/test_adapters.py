"""Adapters on models: what apply finds and refuses, what is trained, merged, switched, chosen row by row, dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from portable import adapters, nn, ops
from portable.adapters import AdapterParam, DoRAConfig, ESFTConfig, LoRAConfig, S2FTConfig, StoredParam
from portable.checks import ConfigError
from portable.models.decoder import Decoder, DecoderConfig
from tests.models import small

TOKENS = jnp.asarray(np.arange(10).reshape(2, 5))
SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}


class Mixed(nnx.Module):
    """Every kind of layer, without anything between them."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.linear = nnx.Linear(8, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 6, (3,), rngs=rngs)
        self.general = nnx.LinearGeneral(6, (2, 4), rngs=rngs)
        self.heads = nnx.LinearGeneral(4, 3, batch_axis={0: 2}, rngs=rngs)
        self.einsum = nnx.Einsum("bthe,hed->btd", (2, 4, 5), (5,), rngs=rngs)
        self.back = nnx.LinearGeneral((2, 4), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, tokens):
        x = self.general(self.conv(self.linear(self.embed(tokens))))
        apart = jnp.einsum("hbtd->bt", self.heads(x.transpose(2, 0, 1, 3)))
        return self.einsum(x) + self.back(x) + apart[..., None]


KINDS = ["embed", "linear", "conv", "general", "heads", "einsum", "back"]


def decoder(**options):
    return Decoder(DecoderConfig(**SIZES | options), rngs=nnx.Rngs(0))


def run(model, tokens=TOKENS, **options):
    return nnx.jit(lambda model, tokens: model(tokens, **options))(model, tokens)


def close(got, want, bar=2e-6):
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=bar * np.abs(want).max())


def params(model, kind=nnx.Param):
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(nnx.state(model, kind))}


@pytest.mark.parametrize("kind", [LoRAConfig, DoRAConfig])
def test_every_kind_of_layer_trains_merges_and_can_be_switched_off(kind):
    model = Mixed(nnx.Rngs(0))
    before, plain = run(model), params(model)
    found = adapters.apply(model, kind(rank=2, alpha=4, target_modules=KINDS))
    assert sorted(found) == sorted(KINDS)
    close(run(model), before)
    assert plain.keys() == params(model, nnx.All(nnx.Param, nnx.Not(AdapterParam))).keys()

    optimizer = nnx.Optimizer(model, adapters.lora_plus(optax.adam, 1e-3), wrt=AdapterParam)

    @nnx.jit
    def step(model, optimizer):
        loss, slopes = nnx.value_and_grad(
            lambda model: jnp.mean((model(TOKENS) - 1) ** 2), argnums=nnx.DiffState(0, AdapterParam)
        )(model)
        optimizer.update(model, slopes)
        return loss

    losses = [step(model, optimizer) for _ in range(3)]
    assert losses[2] < losses[0]
    after = run(model)
    for path, value in plain.items():
        np.testing.assert_array_equal(params(model)[path], value)
    merged = adapters.merge(model)
    close(run(merged), after)
    assert {type(m) for _, m in nnx.iter_modules(merged)} == {type(m) for _, m in nnx.iter_modules(Mixed(nnx.Rngs(0)))}
    assert params(merged).keys() == plain.keys()
    adapters.refresh(model)
    close(run(model), after, 5e-7)
    with adapters.disable(model):
        np.testing.assert_array_equal(run(model), before)
    close(run(model), after, 5e-7)
    adapters.remove(model, "default")
    np.testing.assert_array_equal(run(model), before)
    assert type(model.linear) is nnx.Linear


def test_gradients_do_not_flow_through_a_detached_norm_unless_asked():
    def slopes(**options):
        model = Mixed(nnx.Rngs(0))
        adapters.apply(model, DoRAConfig(rank=2, target_modules=["linear"], init="random", **options))
        loss = lambda m: jnp.sum(m(TOKENS) ** 2)  # noqa: E731
        return nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam)))(model)

    detached, attached = (params(slopes(detach=d), AdapterParam) for d in (True, False))
    (a,) = [k for k in detached if k.endswith(".a")]
    (m,) = [k for k in detached if k.endswith(".magnitude")]
    assert np.abs(detached[a] - attached[a]).max() > 1e-2 * np.abs(attached[a]).max()
    close(detached[m], attached[m])


def test_norms_are_of_the_last_refresh_until_the_next():
    model = Mixed(nnx.Rngs(0))
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["linear"], init="random"))
    adapters.refresh(model)
    layer = model.linear.adapters["kernel"]["default"]
    layer.b.set_value(3 * layer.b.get_value())
    stale = run(model)
    adapters.refresh(model)
    fresh = run(model)
    assert np.abs(stale - fresh).max() > 1e-2
    layer.norms = nnx.data(None)
    close(run(model), fresh)


@pytest.mark.parametrize(
    "options, wanted",
    [
        ({"target_modules": ["query"]}, ["layers.0.mixer.query", "layers.1.mixer.query", "layers.2.mixer.query"]),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, ["layers.1.mixer.query"]),
        ({"target_modules": r".*[02]\.mixer\.(key|out)", "exclude_modules": ["0.mixer.out"]}, None),
        ({"target_modules": ["lm_head", "embed_tokens"]}, ["embed", "head"]),
        ({"target_modules": ["k_proj"], "layers_to_transform": [0, 2], "layers_pattern": "layers"}, None),
    ],
)
def test_targets_are_named_as_in_peft(options, wanted):
    wanted = (
        wanted
        or {
            "exclude_modules": ["layers.0.mixer.key", "layers.2.mixer.key", "layers.2.mixer.out"],
            "layers_pattern": ["layers.0.mixer.key", "layers.2.mixer.key"],
        }[next(k for k in ("exclude_modules", "layers_pattern") if k in options)]
    )
    assert sorted(adapters.apply(decoder(tie_word_embeddings=False), LoRAConfig(rank=2, **options))) == wanted


def test_all_linear_leaves_out_what_leads_into_the_vocabulary():
    found = adapters.apply(decoder(tie_word_embeddings=False), LoRAConfig(rank=2, target_modules="all-linear"))
    assert len(found) == 3 * 7
    assert "head" not in found


def test_ranks_and_alphas_by_pattern():
    model = decoder()
    config = LoRAConfig(
        rank=4,
        alpha=8,
        rslora=True,
        target_modules=["q_proj"],
        rank_pattern={"1.mixer.query": 2},
        alpha_pattern={"2.*": 3},
    )
    adapters.apply(model, config)
    found = [layer.mixer.query.adapters["kernel"]["default"] for layer in model.layers]
    assert [a.rank for a in found] == [4, 2, 4]
    np.testing.assert_allclose([a.scale for a in found], [4, 8 / 2**0.5, 3 / 2])


@pytest.mark.parametrize(
    "config, message",
    [
        (
            LoRAConfig(rank=17, target_modules=["query"]),
            r"layers\.0\.mixer\.query: rank 17 is above that of its matrix \[16",
        ),
        (
            LoRAConfig(target_modules=["qery"]),
            r"no module is matched by target_modules=\['qery'\].*nearest names.*query",
        ),
        (LoRAConfig(rank=2, target_modules=r"q.*"), "no module is matched"),
        (LoRAConfig(rank=2), "target_modules must name what is adapted"),
        (ESFTConfig(experts=[0], target_modules=["up"]), "it has no experts"),
        (S2FTConfig(channels=21, target_modules=["down"]), "21 channels are more than its 20"),
        (LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["hed"]), "names hed, which no module is called"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(config, message):
    model = decoder()
    before = params(model)
    with pytest.raises(ValueError, match=message):
        adapters.apply(model, config)
    assert params(model).keys() == before.keys()
    assert not adapters.adapter_names(model)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LoRAConfig(rank=0), "rank must be a positive integer; got 0"),
        (lambda: LoRAConfig(dropout=1.0), r"dropout must lie in \[0, 1\)"),
        (lambda: DoRAConfig(norm="fast"), "norm must be one of auto, dense, factored"),
        (lambda: LoRAConfig(target_modules="(q"), "is no regular expression"),
        (lambda: ESFTConfig(experts=[1, 1]), "distinct numbers"),
        (lambda: LoRAConfig(target_modules="a", layers_to_transform=[1]), "goes with a list"),
    ],
)
def test_configurations_that_contradict_themselves(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_several_adapters_by_name():
    model = decoder()
    before = run(model)
    for seed, name in enumerate(("french", "german")):
        config = DoRAConfig(rank=2 + seed, alpha=9, target_modules=["query", "down"], init="random")
        adapters.apply(model, config, name=name, rngs=nnx.Rngs(seed))
    german = run(model)
    assert adapters.active(model) == "german"
    trained = params(model, AdapterParam)
    assert trained
    assert all(".german." in path for path in trained)
    assert any(".french." in path for path in params(model, StoredParam))
    with pytest.raises(ValueError, match="has an adapter called 'german' already"):
        adapters.apply(model, config, name="german")
    with pytest.raises(ValueError, match="no adapter called 'dutch'; there are: french, german"):
        adapters.activate(model, "dutch")
    adapters.activate(model, "french")
    french = run(model)
    assert np.abs(french - german).max() > 1e-2
    adapters.activate(model, None)
    np.testing.assert_array_equal(run(model), before)
    adapters.activate(model, "german")
    close(run(model), german, 1e-7)

    view = adapters.assign(model, ["french", "german"])
    mixed = run(view)
    close(mixed, jnp.stack([french[0], german[1]]))
    view = adapters.assign(view, jnp.array([-1, 0]))
    close(run(view), jnp.stack([before[0], french[1]]))
    tokens = jnp.array([[0, 0, 0, 0, 0], [1, -1, 1, 1, 1]])
    close(run(adapters.assign(view, tokens))[0], french[0])
    with pytest.raises(ValueError, match="no adapter is called 'dutch'"):
        adapters.assign(model, ["dutch", None])
    adapters.remove(model, "german")
    assert adapters.adapter_names(model) == ["french"]


def test_rows_of_a_batch_in_stacked_layers_and_embeddings():
    model = decoder(tie_word_embeddings=False)
    wanted = []
    for seed, name in enumerate(("one", "two")):
        config = DoRAConfig(rank=2, target_modules=["embed", "value", "gate"], init="random")
        adapters.apply(model, config, name=name, rngs=nnx.Rngs(seed))
        wanted.append(run(model)[seed])
    close(run(adapters.assign(nn.stack(model), ["one", "two"])), jnp.stack(wanted))


def test_stacked_layers_are_the_layers():
    model, stacked = decoder(), nn.stack(decoder())
    config = DoRAConfig(rank=2, target_modules=["query", "up"], init="random")
    assert adapters.apply(model, config, rngs=nnx.Rngs(5)) == adapters.apply(stacked, config, rngs=nnx.Rngs(5))
    assert isinstance(stacked.layers[0], nn.Stack)
    want = run(model)
    close(run(stacked), want)
    close(run(nn.stack(model)), want)
    close(run(nn.unstack(stacked)), want)
    close(run(adapters.merge(stacked)), want)
    adapters.refresh(stacked)
    close(run(stacked), want)


def test_models_with_states_decode_with_an_adapter():
    latent = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    model = decoder(**latent)
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["key_up", "value_up", "kv_down"], init="random"))
    want = run(model)
    lengths = jnp.array([4, 4])

    @nnx.jit
    def step(model):
        _, state = model.prefill(TOKENS[:, :4], lengths, model.init_state(2, 5))
        return model.step(TOKENS[:, 4], state)[0]

    close(step(model), want[:, 4], 1e-5)
    mamba = nnx.merge(*nnx.split(small.random_model()))
    adapters.apply(mamba, DoRAConfig(rank=2, target_modules=["in_proj", "out_proj"], init="random"))
    close(run(adapters.merge(mamba)), run(mamba), 1e-4)  # the model's own weights of 0.3 make its logits sensitive


def test_an_embedding_that_is_the_head_is_not_merged():
    model = decoder(tie_word_embeddings=True)
    adapters.apply(model, LoRAConfig(rank=2, target_modules=["embed"]))
    with pytest.raises(ValueError, match="the embedding has an adapter and is the head too"):
        adapters.merge(model)


def test_modules_that_are_trained_whole():
    model = decoder(tie_word_embeddings=False)
    before = run(model)
    config = LoRAConfig(rank=2, target_modules=["query"], modules_to_save=["lm_head", "norm"])
    assert adapters.apply(model, config)[-2:] == ["lm_head", "norm"]
    trained = params(model, AdapterParam)
    assert {"head.kernel", "norm.scale"} <= trained.keys()
    model.head.kernel.set_value(2 * model.head.kernel.get_value())
    close(run(model), 2 * before)
    with adapters.disable(model):
        close(run(model), before, 1e-7)
        assert "head.kernel" not in params(model, AdapterParam)
    merged = adapters.merge(model)
    close(run(merged), 2 * before)
    assert not params(merged, AdapterParam)
    with pytest.raises(ValueError, match="is trained whole by the adapter 'default' already"):
        adapters.apply(model, config, name="second")
    adapters.remove(model, "default")
    np.testing.assert_array_equal(run(model), before)
    assert not adapters.adapter_names(model)


@pytest.mark.parametrize("side", ["in", "out"])
def test_s2ft_trains_some_channels_as_a_dense_model_would(side):
    model = Mixed(nnx.Rngs(0))
    before = run(model)
    adapters.apply(model, S2FTConfig(channels=3, side=side, target_modules=["linear", "back", "heads"]))
    close(run(model), before)
    loss = lambda m: jnp.sum(m(TOKENS) ** 2)  # noqa: E731
    slopes = params(nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam)))(model), AdapterParam)
    dense = params(nnx.jit(nnx.grad(loss))(Mixed(nnx.Rngs(0))))
    index = model.linear.adapters["kernel"]["default"].index.get_value()
    assert len(set(index.tolist())) == 3
    own = dense["linear.kernel"][index] if side == "in" else dense["linear.kernel"][:, index]
    close(slopes["linear.adapters.kernel.default.delta"], own, 5e-6)
    for path, slope in slopes.items():
        module = getattr(model, path.split(".")[0]).adapters["kernel"]["default"].delta
        module.set_value(module.get_value() - 0.01 * slope)
    changed = run(model)
    assert np.abs(changed - before).max() > 1e-3
    close(run(adapters.merge(model)), changed)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def test_esft_trains_chosen_experts_alone():
    model = decoder(**EXPERTS, dense_layers=(0,))
    before, plain = run(model), params(model)
    config = ESFTConfig(
        experts={"1.mlp.*": (0, 3), "2.mlp.*": (1,)},
        target_modules=["mlp.gate", "mlp.down"],
        exclude_modules=["0.mlp.gate", "0.mlp.down"],
    )
    adapters.apply(model, config)
    close(run(model), before)
    loss = lambda m: jnp.sum(m(TOKENS) ** 2)  # noqa: E731
    slopes = params(nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam)))(model), AdapterParam)
    dense = params(nnx.jit(nnx.grad(loss))(decoder(**EXPERTS, dense_layers=(0,))))
    close(slopes["layers.1.mlp.adapters.gate.default.delta"], dense["layers.1.mlp.gate"][jnp.array([0, 3])], 1e-5)
    for layer in model.layers[1:]:
        for slot in ("gate", "down"):
            delta = layer.mlp.adapters[slot]["default"].delta
            delta.set_value(jnp.ones_like(delta.get_value()))
    changed = run(model)
    merged = adapters.merge(model)
    close(run(merged), changed)
    np.testing.assert_array_equal(params(merged)["layers.2.mlp.gate"][0], plain["layers.2.mlp.gate"][0])
    assert np.abs(params(merged)["layers.2.mlp.gate"][1] - plain["layers.2.mlp.gate"][1]).min() > 0.9


def test_low_rank_experts_merge_to_what_they_compute():
    model = decoder(**EXPERTS, shared_intermediate_size=8)
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["mlp.up", "mlp.down", "router"], init="random"))
    close(run(adapters.merge(model)), run(model), 5e-6)
    adapters.refresh(model)
    close(run(adapters.merge(model)), run(model), 5e-6)


def test_dropout_is_of_a_call_and_of_its_key():
    model = nn.stack(decoder())
    adapters.apply(model, DoRAConfig(rank=2, dropout=0.5, target_modules=["query", "up"], init="random"))
    plain = run(model)
    dropped = jax.jit(lambda key: adapters.dropping(model, key)(TOKENS))
    one, same, other = (dropped(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - plain).max() > 1e-3
    np.testing.assert_array_equal(run(model), plain)


def test_experts_inputs_are_not_dropped():
    with pytest.raises(ValueError, match="what experts are given is not dropped"):
        adapters.apply(decoder(**EXPERTS), LoRAConfig(rank=2, dropout=0.1, target_modules=["mlp.up"]))


def test_a_zero_row_stays_zero_and_finite():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    model.kernel.set_value(model.kernel.get_value().at[:, 2].set(0))
    holder = nnx.Dict(layer=model)
    adapters.apply(holder, DoRAConfig(rank=2, target_modules=["layer"]))
    loss = lambda h: jnp.sum(h["layer"](jnp.ones((3, 6))) ** 2)  # noqa: E731
    value, slopes = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, AdapterParam))(holder)
    assert np.isfinite(value)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert np.all(holder["layer"](jnp.ones((3, 6)))[:, 2] == 0)


def test_bfloat16_models_keep_float32_adapters_and_float32_gradients():
    config = DecoderConfig(**SIZES, tie_word_embeddings=False)
    model = Decoder(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["query", "embed"], init="random"))
    loss = lambda m: jnp.sum(m(TOKENS) ** 2)  # noqa: E731
    slopes = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, AdapterParam)))(model)
    assert {x.dtype for x in jax.tree.leaves(slopes)} == {jnp.dtype("float32")}
    assert adapters.merge(model).layers[0].mixer.query.kernel.get_value().dtype == jnp.bfloat16


def test_learning_rates_of_lora_plus():
    model = Mixed(nnx.Rngs(0))
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["linear", "conv"]))
    state = nnx.state(model, AdapterParam)
    optimizer = adapters.lora_plus(optax.sgd, 0.5, ratio=16)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, state), optimizer.init(state), state)
    for path, update in nnx.to_flat_state(updates):
        assert np.all(np.asarray(update.get_value()) == (-8 if path[-1] == "b" else -0.5)), path


def test_a_quantised_layer(seed):
    qwix = pytest.importorskip("qwix")
    x, w, a, b = (
        jax.random.normal(jax.random.key(seed + i), s) for i, s in enumerate([(3, 8), (8, 6), (8, 2), (2, 6)])
    )
    m = jnp.linalg.norm(w, axis=0)
    by_channel = qwix.quantize(w, "int8", channelwise_axes=[1])
    tiled = qwix.quantize(w, "int8", channelwise_axes=[1], tiled_axes={0: 4})
    for q in (by_channel, tiled):
        want = ops.dora_linear(x, qwix.dequantize(q), a, b, m)
        close(ops.dora_linear(x, q, a, b, m), want)


@pytest.mark.full
def test_both_modes_of_nnx_run_adapted_models():
    from tests.oracles import child

    program = """
import jax
import jax.numpy as jnp
from flax import nnx
from portable import adapters, nn
from portable.models.mamba2 import Mamba2Config, Mamba2LM
config = Mamba2Config(vocab_size=11, hidden_size=16, num_hidden_layers=2, num_heads=4, head_dim=8, state_size=4)
model = Mamba2LM(config, rngs=nnx.Rngs(0))
adapters.apply(model, adapters.DoRAConfig(rank=2, target_modules=["in_proj"], init="random"))
adapters.refresh(model)
tokens = jnp.zeros([2, 5], jnp.int32)
want = model(tokens)
assert jnp.allclose(nn.stack(model)(tokens), want, atol=1e-4)
assert jnp.allclose(adapters.merge(model)(tokens), want, atol=1e-4)
graphdef, trained, rest = nnx.split(model, adapters.AdapterParam, ...)
slopes = jax.grad(lambda trained: jnp.sum(nnx.merge(graphdef, trained, rest)(tokens) ** 2))(trained)
assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(slopes))
print("ok")
"""
    assert "ok" in child(program, env={"NNX_GRAPH_MODE": "false", "NNX_GRAPH_UPDATES": "false"})

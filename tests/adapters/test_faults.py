"""What a review found: stale norms, names that end others, layers that multiply by themselves, views, wrong options."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import adapters, ops
from portable.adapters import DoRAConfig, ESFTConfig, LoRAConfig, S2FTConfig
from portable.checks import CheckpointError, ConfigError


class Two(nnx.Module):
    def __init__(self, rngs=None, **options):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.fc = nnx.Linear(6, 6, rngs=rngs, **options)
        self.block = nnx.Dict({"fc": nnx.Linear(6, 6, rngs=rngs)})

    def __call__(self, x):
        return self.block["fc"](nnx.silu(self.fc(x)))


X = jax.random.normal(jax.random.key(5), (3, 6))


def moved(model, size=0.5):
    for i, (_, v) in enumerate(nnx.to_flat_state(nnx.state(model, adapters.AdapterParam))):
        v.set_value(v.get_value() + size * jax.random.normal(jax.random.key(i), v.get_value().shape))
    return model


def adapted(config, **options):
    model = Two(**options)
    adapters.apply(model, config)
    nnx.update(model, nnx.state(moved(model), adapters.AdapterParam))
    return model


def test_merging_after_an_old_refresh_takes_the_norms_of_the_weights_there_are(tmp_path):
    model = Two()
    adapters.apply(model, DoRAConfig(rank=2, target_modules=["fc"]))
    adapters.refresh(model)
    state = nnx.state(model, adapters.AdapterParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.3, state))
    adapters.save_peft(model, tmp_path)
    again = Two()
    adapters.load_peft(again, tmp_path)
    np.testing.assert_allclose(adapters.merge(model)(X), again(X), rtol=1e-5, atol=1e-6)
    assert np.abs(model(X) - again(X)).max() > 1e-3  # the refresh is old
    adapters.forget(model)
    np.testing.assert_allclose(model(X), again(X), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("field, pattern", [("alpha_pattern", {"block.fc": 8, "fc": 16}), ("rank_pattern", {"fc": 4})])
def test_a_name_that_ends_another_keeps_its_own_rank_and_scale(tmp_path, field, pattern):
    config = LoRAConfig(rank=2, alpha=8, target_modules=r"fc|block\.fc", init="random", **{field: pattern})
    model = Two()
    adapters.apply(model, config)
    adapters.save_peft(model, tmp_path)
    again = Two()
    adapters.load_peft(again, tmp_path)
    for layer, other in ((model.fc, again.fc), (model.block["fc"], again.block["fc"])):
        mine, theirs = (x.adapters["kernel"]["default"] for x in (layer, other))
        assert (mine.rank, mine.scale) == (theirs.rank, theirs.scale)
    np.testing.assert_allclose(model(X), again(X), rtol=1e-6)


def test_a_file_whose_rank_is_not_that_of_its_factors(tmp_path):
    model = Two()
    adapters.apply(model, LoRAConfig(rank=2, target_modules=["fc"]))
    adapters.save_peft(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"r": 4}))
    with pytest.raises(CheckpointError, match=r"adapter_config\.json says 4, got 2"):
        adapters.load_peft(Two(), tmp_path)
    for name, value in {"lora_alpha": "16", "lora_dropout": "x", "target_modules": 5, "rank_pattern": [1]}.items():
        path.write_text(json.dumps(content | {name: value}))
        with pytest.raises(ConfigError, match=f"{name} must be"):
            adapters.load_peft(Two(), tmp_path)


def test_a_product_of_ones_own_is_not_left_out():
    def doubled(*args, **options):
        return 2 * jax.lax.dot_general(*args, **options)

    with pytest.raises(ValueError, match="dot_general of its own, doubled"):
        adapters.apply(Two(dot_general=doubled), LoRAConfig(target_modules=["fc"], rank=2))


def test_a_view_takes_no_adapter_and_is_not_saved(tmp_path):
    model = Two()
    adapters.apply(model, LoRAConfig(rank=2, target_modules=["fc"]), name="one")
    view = adapters.assign(model, ["one", None, "one"])
    with pytest.raises(ValueError, match="rows of this view"):
        adapters.apply(view, LoRAConfig(rank=2, target_modules=["fc"]), name="two")
    with pytest.raises(ValueError, match="rows of this view"):
        adapters.save_peft(view, tmp_path, name="one")
    with pytest.raises(ValueError, match="no active adapter"):
        adapters.save_peft(Two(), tmp_path)


def test_merging_what_is_not_in_use_is_refused():
    model = Two()
    adapters.apply(model, LoRAConfig(rank=2, target_modules=["fc"], modules_to_save=["block"]))
    with adapters.disable(model), pytest.raises(ValueError, match="no active adapter"):
        adapters.merge(model)
    adapters.activate(model, None)
    with pytest.raises(ValueError, match="no active adapter"):
        adapters.merge(model)


def test_layers_may_have_the_names_of_what_adapters_hold():
    class Names(nnx.Module):
        def __init__(self):
            self.bank, self.saved = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(1))

    assert adapters.apply(Names(), LoRAConfig(rank=2, target_modules="all-linear")) == ["bank", "saved"]


def test_an_embedding_shows_nan():
    model = nnx.Embed(10, 6, rngs=nnx.Rngs(0))
    model.embedding.set_value(model.embedding.get_value().at[9, 2].set(jnp.nan))
    root = nnx.Dict({"emb": model})
    adapters.apply(root, DoRAConfig(rank=2, target_modules=["emb"]))
    found = np.asarray(root["emb"](jnp.array([0])))
    np.testing.assert_array_equal(np.isnan(found[0]), np.arange(6) == 2)


@pytest.mark.parametrize("side", ["in", "out"])
def test_chosen_channels_are_added_where_they_are(side):
    model = adapted(S2FTConfig(channels=2, side=side, target_modules=["fc"]))
    found = model.fc.adapters["kernel"]["default"]
    want, index, delta = (np.array(z) for z in (model.fc.kernel[...], found.index[...], found.delta[...]))
    if side == "in":
        want[index] += delta
    else:
        want[:, index] += delta
    np.testing.assert_allclose(adapters.merge(model).fc.kernel[...], want, rtol=1e-6)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: LoRAConfig(rank=True), "rank must be"),
        (lambda: LoRAConfig(alpha="8"), "alpha must be"),
        (lambda: LoRAConfig(alpha=float("nan")), "alpha must be"),
        (lambda: LoRAConfig(alpha_pattern={"a": "z"}), "alpha must be"),
        (lambda: LoRAConfig(rank_pattern=[1]), "rank_pattern must be"),
        (lambda: LoRAConfig(dropout="0.1"), "dropout must"),
        (lambda: S2FTConfig(channels=2.5), "channels must be"),
        (lambda: ESFTConfig(experts=3), "experts must be"),
        (lambda: ESFTConfig(experts=["a"]), "experts must be"),
    ],
)
def test_wrong_options(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_what_is_no_configuration():
    with pytest.raises(TypeError, match="config must be LoRAConfig"):
        adapters.apply(Two(), {"r": 8})


def test_codes_of_a_table():
    qwix = pytest.importorskip("qwix")
    w = jax.random.normal(jax.random.key(0), (64, 8))
    quantised = qwix.quantize(w, "nf4", channelwise_axes=[1])
    x, a, b = jax.random.normal(jax.random.key(1), (4, 64)), jnp.ones((64, 2)) / 64, jnp.ones((2, 8))
    want = x @ qwix.dequantize(quantised) + (x @ a) @ b
    np.testing.assert_allclose(ops.lora_linear(x, quantised, a, b), want, rtol=1e-5, atol=1e-5)


def test_all_linear_in_some_layers():
    class Inside(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Dict({"fc": nnx.Linear(4, 4, rngs=nnx.Rngs(i))}) for i in range(3)])
            self.out = nnx.Linear(4, 4, rngs=nnx.Rngs(3))

    config = LoRAConfig(rank=2, target_modules="all-linear", layers_to_transform=[0, 2])
    assert adapters.apply(Inside(), config) == ["layers.0.fc", "layers.2.fc"]

"""NAT and DiNAT against transformers' code, repaired: logits, feature maps, gradients, files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import models
from portable.checks import CheckpointError, ConfigError
from portable.models.nat import NAT, NATConfig
from tests.models import nat_oracle as oracle
from tests.oracles import need

torch, safetensors = need("torch", "safetensors.numpy")

DILATED = {
    "embed_dim": 16,
    "depths": [2, 1, 1],
    "num_heads": [2, 4, 8],
    "kernel_size": 3,
    "dilations": [[1, 4], [2], [1]],
}
# Windows larger than the last level's image, which the published code pads; factors on the branches; no qkv bias.
PADDED = {
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "kernel_size": 7,
    "dilations": [[1], [1]],
    "layer_scale_init_value": 0.1,
    "qkv_bias": False,
    "hidden_act": "gelu_new",
    "mlp_ratio": 2.0,
}
CASES = {"dilated": (DILATED, (52, 64)), "padded": (PADDED, (32, 24))}


def _relative(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    """transformers' model in float64, ours from its files, and images [b, y, x, c]."""
    options, size = CASES[request.param]
    theirs = oracle.model(**options)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.float().save_pretrained(folder)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    return theirs.double(), models.load(folder), images


def _nchw(images):
    return torch.tensor(images.transpose(0, 3, 1, 2), dtype=torch.float64)


def test_logits_and_gradients_equal_transformers(pair):
    theirs, ours, images = pair
    pixels = _nchw(images).requires_grad_()
    logits = theirs(pixels).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).reshape(logits.shape)
    (logits * weights).sum().backward()

    graphdef, params = nnx.split(ours)

    @jax.jit
    def run(params, images):
        logits = nnx.merge(graphdef, params)(images)
        return (logits * jnp.asarray(weights.numpy(), jnp.float32)).sum(), logits

    (_, found), (gradients, by_image) = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(params, images)
    assert _relative(found, logits.detach()) <= 5e-6
    assert _relative(by_image, pixels.grad.permute(0, 2, 3, 1)) <= 2e-5
    rules = models.nat.weight_map().tensors({p: v.shape for p, v in _flat(params).items()})
    named = dict(theirs.named_parameters())
    assert {t.name for t in rules} == named.keys()
    arrays = {path: np.asarray(v.get_value()) for path, v in _flat(gradients).items()}
    for tensor in rules:
        ours_ = np.concatenate([tensor.view(arrays[block.path], block) for block in tensor.blocks])
        if tensor.name.endswith("key.bias"):  # it moves all scores of a query alike: the gradient is zero
            beside = named[tensor.name.replace("key", "query")].grad
            assert np.abs(ours_).max() <= 1e-5 * beside.abs().max()
        else:
            assert _relative(ours_, named[tensor.name].grad) <= 5e-5, tensor.name


def _flat(state):
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(state)}


def test_feature_maps_are_the_hidden_states_before_downsampling(pair):
    theirs, ours, images = pair
    with torch.no_grad():
        embedded = theirs.dinat.embeddings(_nchw(images))
        states = theirs.dinat.encoder(
            embedded, output_hidden_states=True, output_hidden_states_before_downsampling=True
        ).hidden_states[1:]
    maps = nnx.jit(lambda model, images: model.feature_maps(images))(ours, images)
    assert len(maps) == len(states)
    for ours_, theirs_ in zip(maps, states, strict=True):
        assert _relative(ours_, theirs_) <= 5e-6


def test_saved_files_are_read_by_transformers_and_come_back(pair, tmp_path):
    theirs, ours, _ = pair
    models.save(ours, tmp_path)
    again, report = oracle.modeling().DinatForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    for name, value in theirs.float().state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    theirs.double()


def test_the_authors_format_goes_there_and_back(pair, tmp_path):
    _, ours, _ = pair
    models.save(ours, tmp_path, format="shi-labs")
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    d = ours.config.embed_dim
    assert tensors["levels.0.blocks.0.attn.qkv.weight"].shape == (3 * d, d)
    assert tensors["patch_embed.proj.1.weight"].shape == (d, d // 2, 3, 3)
    kernel = ours.levels[0].blocks[0].attention.key.kernel[...]
    assert np.array_equal(tensors["levels.0.blocks.0.attn.qkv.weight"][d : 2 * d], np.asarray(kernel).T)
    again = models.load(tmp_path)
    assert again.config == ours.config
    for path, value in _flat(nnx.state(ours)).items():
        assert np.array_equal(value.get_value(), _flat(nnx.state(again))[path].get_value()), path


def test_nat_is_written_under_its_own_name_and_both_names_are_read(tmp_path):
    config = NATConfig(embed_dim=8, depths=(1,), num_heads=(2,), kernel_size=3, num_labels=2, labels=("cat", "dog"))
    model = NAT(config, rngs=nnx.Rngs(0))
    models.save(model, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["id2label"]) == ("nat", {"0": "cat", "1": "dog"})
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert "nat.encoder.levels.0.layers.0.attention.self.rpb" in tensors
    assert models.load(tmp_path).config == config
    renamed = {name.replace("nat.", "dinat.", 1): value for name, value in tensors.items()}
    safetensors.save_file(renamed, tmp_path / "model.safetensors")
    assert models.load(tmp_path).config == config


def test_a_model_without_a_head(tmp_path):
    theirs = oracle.modeling().DinatModel(oracle.model(**PADDED).config).float()
    theirs.save_pretrained(tmp_path)
    ours = models.load(tmp_path)
    assert ours.config.num_labels == 0
    images = np.random.default_rng(1).normal(size=(1, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        pooled = theirs.eval()(_nchw(images).float()).pooler_output
    assert _relative(ours(images), pooled) <= 5e-6


PARAMETERS = {"mini": 20e6, "tiny": 28e6, "small": 51e6, "base": 90e6, "large": 200e6}


QUICK = ("nat_mini", "dinat_small")  # the others differ in numbers alone


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.full)
        for name in (f"{kind}_{size}" for kind in ("nat", "dinat") for size in PARAMETERS)
        if hasattr(NATConfig, name)
    ],
)
def test_published_sizes(name):
    """The authors' tables name the parameters in whole millions."""
    model = nnx.eval_shape(lambda: NAT(getattr(NATConfig, name)(), rngs=nnx.Rngs(0)))
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    assert abs(count - PARAMETERS[name.split("_")[1]]) < 1e6


def test_dilations_of_published_models_fill_their_images():
    for name, size in [("dinat_mini", 224), ("dinat_large", 224), ("dinat_large_384", 384)]:
        config = getattr(NATConfig, name)()
        sides = [size // 4 // 2**level for level in range(4)]
        largest = [max(row) for row in config.dilations]
        assert [d * config.kernel_size <= side for d, side in zip(largest, sides, strict=True)] == [True] * 4
        assert largest == [side // config.kernel_size for side in sides]


def test_dropped_branches():
    config = NATConfig(
        embed_dim=8, depths=(2,), num_heads=(2,), kernel_size=3, patch_size=1, drop_path_rate=0.5, num_labels=3
    )
    model = NAT(config, rngs=nnx.Rngs(0))
    assert [block.drop_rate for block in model.levels[0].blocks] == [0.0, 0.5]
    images = jnp.tile(jax.random.normal(jax.random.key(0), (1, 4, 4, 3)), (64, 1, 1, 1))
    without, once = model(images), model(images, key=jax.random.key(1))
    assert jnp.array_equal(once, model(images, key=jax.random.key(1)))
    # Each of two branches is there or not: four results, none of them that without dropping.
    assert len(np.unique(np.round(np.asarray(once), 5), axis=0)) == 4
    assert not jnp.any(jnp.all(jnp.isclose(once, without, atol=1e-6), -1))


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_lower_precision_stays_near(dtype):
    config = NATConfig(embed_dim=16, depths=(1, 1), num_heads=(2, 4), kernel_size=3, patch_size=2, num_labels=3)
    exact, rounded = (NAT(config, dtype=jnp.dtype(d), rngs=nnx.Rngs(0)) for d in ("float32", dtype))
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    logits = rounded(images)
    assert logits.dtype == jnp.float32
    assert _relative(logits, exact(images)) <= 0.05


BAD = [
    ({"num_heads": (2,)}, "num_heads must have one entry for each of 4 levels; got [2]"),
    ({"kernel_size": 6}, "kernel_size must be odd; got 6"),
    ({"dilations": ((1, 2),)}, "dilations must have one entry for each block, [3, 4, 6, 5] by level; got [2]"),
    ({"num_heads": (3, 4, 8, 16)}, "num_heads[0] must divide the level's 64 channels; got 3"),
    ({"patch_size": 8}, "patch_size must be 4, 2 or 1; got 8"),
    ({"hidden_act": "swoosh"}, "hidden_act must be one of"),
    ({"drop_path_rate": 1.0}, "drop_path_rate must be below 1; got 1.0"),
    ({"depths": (3, 0, 6, 5)}, "depths[1] must be a positive integer; got 0"),
    ({"labels": ("cat",)}, "labels must name each of 1000 classes or none; got 1"),
    ({"embed_dim": "64"}, "embed_dim must be a positive integer; got '64'"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD)
def test_bad_configurations(options, sentence):
    with pytest.raises(ConfigError) as error:
        NATConfig(**options)
    assert sentence in str(error.value)


def test_bad_files(tmp_path):
    config = NATConfig(embed_dim=8, depths=(1,), num_heads=(2,), kernel_size=3, num_labels=2)
    models.save(NAT(config, rngs=nnx.Rngs(0)), tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change, sentence in [
        ({"kernel_size": None}, "kernel_size must be a positive integer; got None"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must number its 2 classes from 0; got ['0', '2']"),
        ({"patch_size": [4, 2]}, "patch_size must be the same on both axes; got [2, 4]"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(ConfigError, match=r"config\.json") as error:
            models.load(tmp_path)
        assert sentence in str(error.value)
    path.write_text(json.dumps(good | {"kernel_size": 5}))
    with pytest.raises(CheckpointError, match=r"attention\.self\.rpb.*\[2, 9, 9\].*\[2, 5, 5\]"):
        models.load(tmp_path)
    small = dataclasses.replace(config, patch_size=1)
    with pytest.raises(ConfigError, match="patches of 4 alone; got patch_size=1"):
        models.save(NAT(small, rngs=nnx.Rngs(0)), tmp_path, format="transformers")


def test_bad_images():
    model = NAT(NATConfig(embed_dim=8, depths=(1,), num_heads=(2,), kernel_size=3), rngs=nnx.Rngs(0))
    for images, sentence in [
        (jnp.zeros([4, 4, 3]), "images must be [b, height, width, 3], none empty; got [4, 4, 3]"),
        (jnp.zeros([1, 3, 8, 8]), "got [1, 3, 8, 8]"),
        (jnp.zeros([1, 0, 8, 3]), "got [1, 0, 8, 3]"),
    ]:
        with pytest.raises(ValueError) as error:
            model(images)
        assert sentence in str(error.value)
    with pytest.raises(TypeError, match="must be floating point; got uint8"):
        model(jnp.zeros([1, 8, 8, 3], jnp.uint8))

"""`load` and `save` of whole models: formats, dtypes, memory."""

import dataclasses
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from portable import cli, models, nn
from portable.checkpoint.params import shapes
from portable.checks import CheckpointError, ConfigError
from portable.models.mamba2 import Mamba2LM, weight_map
from tests.models.small import CONFIG, EMBEDDING, TOKENS, assert_same, random_model, rewrite_tensors, values
from tests.oracles import child


@pytest.fixture
def folder(tmp_path):
    models.save(random_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [10**9, 3000], ids=["one file", "shards"])
@pytest.mark.parametrize("format", ["transformers", "state-spaces"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"use_bias": False, "use_conv_bias": False, "n_groups": 1}],
    ids=["tied", "untied", "no biases"],
)
def test_round_trip_is_exact(tmp_path, format, options, size):
    model = random_model(**options)
    models.save(model, tmp_path, format=format, max_shard_size=size)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    assert_same(loaded, model)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("option", [{"rms_norm": False}, {"norm_before_gate": True}, {"D_has_hdim": True}])
def test_options_that_transformers_lacks_are_kept_and_told(tmp_path, option):
    model = random_model(**option)
    with pytest.warns(UserWarning, match="state-spaces' format, which transformers cannot load"):
        models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    assert_same(loaded, model)
    with pytest.raises(ConfigError, match=next(iter(option))):
        models.save(model, tmp_path, format="transformers")
    assert_same(models.load(tmp_path), model)


def test_one_skip_weight_per_channel_is_one_axis_in_the_file(tmp_path):
    model = random_model(D_has_hdim=True)
    models.save(model, tmp_path, format="state-spaces")
    tensor = load_file(tmp_path / "model.safetensors")["backbone.layers.1.mixer.D"]
    np.testing.assert_array_equal(tensor, values(model)["layers.1.mixer.D"].reshape(-1))


def test_fused_tensors_hold_their_parts_in_the_order_of_the_originals(folder):
    tensors, params = load_file(folder / "model.safetensors"), values(random_model())
    mixer = "layers.0.mixer."
    parts = [params[f"{mixer}in_{part}.kernel"] for part in ("z", "x", "B", "C", "dt")]
    np.testing.assert_array_equal(tensors[f"backbone.{mixer}in_proj.weight"], np.concatenate(parts, 1).T)
    taps = np.concatenate([params[f"{mixer}conv_{part}.kernel"] for part in ("x", "B", "C")], 1)
    np.testing.assert_array_equal(tensors[f"backbone.{mixer}conv1d.weight"][:, 0], taps.T)


def test_sharded_weights_lie_in_files_below_the_size(tmp_path):
    models.save(random_model(), tmp_path, max_shard_size=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1
    assert all(sum(a.nbytes for a in load_file(file).values()) <= 20_000 for file in files)


def _misspell(tensors):
    tensors["backbone.embedding.weight"] = tensors.pop(EMBEDDING)


def _copy_head(tensors):
    tensors["lm_head.weight"] = tensors[EMBEDDING]


def _no_backbone(tensors):
    return {name.removeprefix("backbone."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("change", [_misspell, _copy_head, _no_backbone])
def test_spellings_that_files_have(folder, change):
    rewrite_tensors(folder, change)
    assert_same(models.load(folder), random_model())


def test_vocabulary_padded_as_the_original_pads_it(tmp_path):
    model = random_model(vocab_size=42, pad_vocab_size_multiple=16)
    models.save(model, tmp_path, format="state-spaces")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 42
    assert load_file(tmp_path / "model.safetensors")["backbone.embedding.weight"].shape == (48, 16)
    loaded = models.load(tmp_path)
    assert loaded(TOKENS).shape == (2, 12, 48)
    models.save(loaded, tmp_path, format="transformers")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 48
    assert_same(models.load(tmp_path), model)


def test_dtype_is_honoured(folder):
    wanted = {path: jnp.asarray(value, jnp.bfloat16) for path, value in values(random_model()).items()}
    for dtype in (jnp.bfloat16, "bfloat16"):
        model = models.load(folder, dtype)
        assert model.dtype == jnp.bfloat16
        for path, value in values(model).items():
            assert value.dtype == jnp.bfloat16
            np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    assert models.load(folder, compute_dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert models.load(folder, jnp.bfloat16, compute_dtype=jnp.float32).dtype == jnp.float32


def test_without_a_dtype_every_parameter_keeps_its_own(tmp_path):
    path = "layers.0.mixer.A_log"
    model = random_model(jnp.bfloat16)
    graphdef, state = nnx.split(model)
    flat = [
        (keys, p.replace(p.get_value().astype(jnp.float32)) if ".".join(map(str, keys)) == path else p)
        for keys, p in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert_same(loaded, model)
    assert values(loaded)[path].dtype == np.float32
    assert loaded.dtype == jnp.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_float64_files_load_as_float32_without_x64(folder):
    rewrite_tensors(folder, lambda t: {name: tensor.astype(np.float64) for name, tensor in t.items()})
    assert_same(models.load(folder), random_model())


def test_metadata_of_parameters_survives(folder):
    def axes(model):
        return {path: p.get_metadata() for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    assert axes(models.load(folder)) == axes(random_model())


def test_float64_is_given_where_jax_has_it_and_else_refused(folder):
    with pytest.raises(TypeError, match="load: dtype=float64 needs jax_enable_x64"):
        models.load(folder, "float64")
    with jax.enable_x64(True):
        model = models.load(folder, "float64")
    assert {value.dtype for value in values(model).values()} == {np.dtype(np.float64)}


def test_stacked_model_is_saved_as_its_layers(tmp_path):
    models.save(nn.stack(random_model()), tmp_path)
    assert_same(models.load(tmp_path), random_model())


def test_weight_maps_cover_every_parameter_once():
    for options in ({}, {"tie_word_embeddings": False, "rms_norm": False, "D_has_hdim": True}):
        model = random_model(**options)
        for format in ("transformers", "state-spaces"):
            tensors = weight_map(format).tensors(shapes(model))
            paths = [block.path for tensor in tensors for block in tensor.blocks]
            assert sorted(paths) == sorted(values(model))
            sizes = sum(math.prod(tensor.shape) for tensor in tensors)
            assert sizes == sum(value.size for value in values(model).values())


MEMORY = """
import json, sys, numpy as np, jax
from pathlib import Path
from portable import models
from portable.models.mamba2 import Mamba2Config, Mamba2LM, weight_map
from portable.checkpoint import Checkpoint

def kilobytes(what):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(what))

small, big, dtype = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
models.load(small, dtype)  # whatever is set up once
Path("/proc/self/clear_refs").write_text("5")
before = kilobytes("VmRSS")
model = models.load(big, dtype)
after = kilobytes("VmHWM")
weights = sum(a.nbytes for a in jax.tree.leaves(jax.tree.map(lambda a: a, models.nnx.state(model))))
print(json.dumps([1024 * (after - before), weights]))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_of_loading_stays_below_one_and_a_third_of_the_weights(tmp_path, dtype, monkeypatch):
    config = dataclasses.replace(
        CONFIG,
        vocab_size=40_000,
        hidden_size=1024,
        num_heads=32,
        head_dim=64,
        state_size=64,
        num_hidden_layers=6,
    )
    abstract = nnx.eval_shape(lambda: Mamba2LM(config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    big, small = tmp_path / "big", tmp_path / "small"
    big.mkdir()
    (big / "config.json").write_text(json.dumps(config.to_dict()))
    tensors = {t.name: rng.random(t.shape, np.float32) for t in weight_map().tensors(shapes(abstract))}
    save_file(tensors, big / "model.safetensors")
    models.save(random_model(), small)
    arguments = json.dumps(["", str(small), str(big), dtype])
    used, weights = json.loads(child(f"import sys; sys.argv = {arguments}\n{MEMORY}", env={"OMP_NUM_THREADS": "1"}))
    assert weights > 150e6
    assert used < 1.3 * weights


def test_convert_writes_the_other_format(tmp_path, capsys):
    model = random_model()
    models.save(model, tmp_path / "a", format="state-spaces")
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: config.json and 24 tensors (F32) in 1 file.\n"
    assert EMBEDDING in load_file(tmp_path / "b" / "model.safetensors")
    assert_same(models.load(tmp_path / "b"), model)
    command = ["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--dtype", "bfloat16", "--to", "state-spaces"]
    assert cli.main(command) == 0
    assert "(BF16)" in capsys.readouterr().out
    assert_same(models.load(tmp_path / "c"), models.load(tmp_path / "a", "bfloat16"))


def test_a_model_with_state_beside_its_parameters_is_complete(folder, monkeypatch):
    """Random number state and the like is not in checkpoints; it is initialised, and only it."""

    class Noisy(Mamba2LM):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(7))

    family = models.MODELS["mamba2"]._replace(model=Noisy)
    monkeypatch.setitem(models.MODELS, "mamba2", family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = models.load(folder)
    assert isinstance(model.dropout(jnp.ones(3)), jax.Array)
    assert values(model).keys() == values(random_model()).keys()


def test_saving_where_a_file_is_loses_nothing(folder, tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match=r"cannot write .*taken"):
        models.save(models.load(folder), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"

"""`load` and `save` of whole models: formats, dtypes, memory, and what can be wrong with a folder."""

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

from portable import cli, models
from portable.checkpoint.params import shapes
from portable.checks import CheckpointError, ConfigError
from portable.models.mamba2 import Mamba2Config, Mamba2LM, weight_map
from tests.oracles import child

CONFIG = Mamba2Config(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=8,
    state_size=4,
    n_groups=2,
    use_bias=True,
    bos_token_id=0,
)
TOKENS = np.arange(24).reshape(2, 12) % 48
EMBEDDING = "backbone.embeddings.weight"


def _model(dtype=jnp.float32, **options):
    """A model of `CONFIG` in which every parameter is random."""
    config = dataclasses.replace(CONFIG, **options)
    model = Mamba2LM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    return _replaced(model, lambda p: jnp.asarray(0.3 * rng.standard_normal(p.shape), dtype))


def _replaced(model, change):
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(change, state))


def _values(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(p.get_value()) for path, p in flat}


def _assert_same(got, want):
    got, want = _values(got), _values(want)
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert got[path].dtype == value.dtype, path
        np.testing.assert_array_equal(got[path], value, err_msg=path)


def _tensors(folder, change):
    """Rewrites the weights of a folder with the safetensors library."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    changed = change(tensors)
    save_file(tensors if changed is None else changed, file)


def _config(folder, **change):
    file = folder / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def folder(tmp_path):
    models.save(_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("size", [10**9, 3000], ids=["one file", "shards"])
@pytest.mark.parametrize("format", ["transformers", "state-spaces"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"use_bias": False, "use_conv_bias": False, "n_groups": 1}],
    ids=["tied", "untied", "no biases"],
)
def test_round_trip_is_exact(tmp_path, format, options, size):
    model = _model(**options)
    models.save(model, tmp_path, format=format, max_shard_size=size)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    _assert_same(loaded, model)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))


@pytest.mark.parametrize("option", [{"rms_norm": False}, {"norm_before_gate": True}, {"D_has_hdim": True}])
def test_options_that_transformers_lacks_are_kept_and_told(tmp_path, option):
    model = _model(**option)
    with pytest.warns(UserWarning, match="state-spaces' format, which transformers cannot load"):
        models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    _assert_same(loaded, model)
    with pytest.raises(ConfigError, match=next(iter(option))):
        models.save(model, tmp_path, format="transformers")
    _assert_same(models.load(tmp_path), model)


def test_one_skip_weight_per_channel_is_one_axis_in_the_file(tmp_path):
    model = _model(D_has_hdim=True)
    models.save(model, tmp_path, format="state-spaces")
    tensor = load_file(tmp_path / "model.safetensors")["backbone.layers.1.mixer.D"]
    np.testing.assert_array_equal(tensor, _values(model)["layers.1.mixer.D"].reshape(-1))


def test_fused_tensors_hold_their_parts_in_the_order_of_the_originals(folder):
    tensors, params = load_file(folder / "model.safetensors"), _values(_model())
    mixer = "layers.0.mixer."
    parts = [params[f"{mixer}in_{part}.kernel"] for part in ("z", "x", "B", "C", "dt")]
    np.testing.assert_array_equal(tensors[f"backbone.{mixer}in_proj.weight"], np.concatenate(parts, 1).T)
    taps = np.concatenate([params[f"{mixer}conv_{part}.kernel"] for part in ("x", "B", "C")], 1)
    np.testing.assert_array_equal(tensors[f"backbone.{mixer}conv1d.weight"][:, 0], taps.T)


def test_sharded_weights_lie_in_files_below_the_size(tmp_path):
    models.save(_model(), tmp_path, max_shard_size=20_000)
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
    _tensors(folder, change)
    _assert_same(models.load(folder), _model())


def test_tied_head_that_differs_is_told(folder):
    _tensors(folder, lambda t: t.__setitem__("lm_head.weight", t[EMBEDDING] + 1))
    with pytest.raises(CheckpointError, match=r"wrong copy  lm_head\.weight: expected the values of backbone\.emb"):
        models.load(folder)


def test_vocabulary_padded_as_the_original_pads_it(tmp_path):
    model = _model(vocab_size=42, pad_vocab_size_multiple=16)
    models.save(model, tmp_path, format="state-spaces")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 42
    assert load_file(tmp_path / "model.safetensors")["backbone.embedding.weight"].shape == (48, 16)
    loaded = models.load(tmp_path)
    assert loaded(TOKENS).shape == (2, 12, 48)
    models.save(loaded, tmp_path, format="transformers")
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 48
    _assert_same(models.load(tmp_path), model)


def test_dtype_is_honoured(folder):
    wanted = {path: jnp.asarray(value, jnp.bfloat16) for path, value in _values(_model()).items()}
    for dtype in (jnp.bfloat16, "bfloat16"):
        model = models.load(folder, dtype)
        assert model.dtype == jnp.bfloat16
        for path, value in _values(model).items():
            assert value.dtype == jnp.bfloat16
            np.testing.assert_array_equal(value, wanted[path], err_msg=path)
    assert models.load(folder, compute_dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert models.load(folder, jnp.bfloat16, compute_dtype=jnp.float32).dtype == jnp.float32


def test_without_a_dtype_every_parameter_keeps_its_own(tmp_path):
    path = "layers.0.mixer.A_log"
    model = _model(jnp.bfloat16)
    graphdef, state = nnx.split(model)
    flat = [
        (keys, p.replace(p.get_value().astype(jnp.float32)) if ".".join(map(str, keys)) == path else p)
        for keys, p in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    models.save(model, tmp_path)
    loaded = models.load(tmp_path)
    _assert_same(loaded, model)
    assert _values(loaded)[path].dtype == np.float32
    assert loaded.dtype == jnp.bfloat16
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_float64_files_load_as_float32_without_x64(folder):
    _tensors(folder, lambda t: {name: tensor.astype(np.float64) for name, tensor in t.items()})
    _assert_same(models.load(folder), _model())


def test_metadata_of_parameters_survives(folder):
    def axes(model):
        return {path: p.get_metadata() for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}

    assert axes(models.load(folder)) == axes(_model())


def test_every_mismatch_is_told_at_once(folder):
    def spoil(tensors):
        del tensors["backbone.layers.0.norm.weight"], tensors["backbone.layers.1.mixer.dt_bias"]
        tensors["backbone.layers.2.norm.weight"] = np.ones(16, np.float32)
        tensors["backbone.norm_f.weight"] = np.ones(15, np.float32)
        tensors["backbone.layers.0.mixer.out_proj.weight"] = np.ones((32, 16), np.float32)
        tensors["backbone.layers.1.mixer.D"] = np.ones(4, np.int64)

    _tensors(folder, spoil)
    with pytest.raises(CheckpointError) as caught:
        models.load(folder)
    told = str(caught.value).splitlines()
    assert told[0].startswith(f"{folder}: 6 tensors do not fit the Mamba2LM of its config.json; use the config")
    assert sorted(told[1:]) == [
        "  missing     backbone.layers.0.norm.weight: expected [16]",
        "  missing     backbone.layers.1.mixer.dt_bias: expected [4]",
        "  unexpected  backbone.layers.2.norm.weight: got F32 [16]",
        "  wrong dtype backbone.layers.1.mixer.D: expected one of F64, F32, F16, BF16, got I64",
        "  wrong shape backbone.layers.0.mixer.out_proj.weight: expected [16, 32], got [32, 16]",
        "  wrong shape backbone.norm_f.weight: expected [16], got [15]",
    ]


def test_not_strict_warns_of_missing_and_unexpected(folder):
    def spoil(tensors):
        del tensors["backbone.norm_f.weight"], tensors["backbone.layers.0.mixer.in_proj.weight"]
        tensors["extra"] = np.ones(2, np.float32)

    _tensors(folder, spoil)
    with pytest.raises(CheckpointError, match="strict=False would ignore the missing and the unexpected"):
        models.load(folder)
    with pytest.warns(UserWarning, match=r"(?s)3 tensors ignored.*in_proj.*norm_f.*extra: got F32 \[2\]"):
        model = models.load(folder, strict=False)
    got, want, fresh = _values(model), _values(_model()), _values(Mamba2LM(CONFIG, rngs=nnx.Rngs(0)))
    random = {f"layers.0.mixer.in_{part}.kernel" for part in ("z", "x", "B", "C", "dt")} | {"norm.scale"}
    for path in want:
        if path in random:  # computed in one compiled program, hence the last bits
            np.testing.assert_allclose(got[path], fresh[path], rtol=1e-5, atol=1e-7, err_msg=path)
        else:
            np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def test_not_strict_still_refuses_wrong_shapes(folder):
    _tensors(folder, lambda t: t.__setitem__("backbone.norm_f.weight", np.ones(15, np.float32)))
    with pytest.raises(CheckpointError, match=r"wrong shape backbone\.norm_f\.weight"):
        models.load(folder, strict=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_not_finite_weights_warn_once_with_their_names(folder, bad, dtype):
    def spoil(tensors):
        tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        for name in ("backbone.layers.0.mixer.in_proj.weight", "backbone.norm_f.weight"):
            tensors[name].reshape(-1)[-1] = bad
        return tensors

    _tensors(folder, spoil)
    with pytest.warns(UserWarning, match="NaN or infinity") as caught:
        models.load(folder)
    (warning,) = caught
    assert str(warning.message) == (
        f"{folder}: NaN or infinity in backbone.layers.0.mixer.in_proj.weight, backbone.norm_f.weight; "
        "is the file damaged?"
    )
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "change, error, sentence",
    [
        ({"model_type": "llama"}, CheckpointError, "model type 'llama' is not supported; these are: mamba2"),
        ({"model_type": None}, CheckpointError, "model type None is not supported; these are: mamba2"),
        (
            {"hidden_size": None, "n_groups": None},
            ConfigError,
            r"config.json: .* lacks hidden_size, n_groups",
        ),
        ({"n_groups": 3}, ConfigError, "config.json: .*n_groups must divide num_heads"),
    ],
)
def test_config_that_cannot_be_used(folder, change, error, sentence):
    _config(folder, **change)
    with pytest.raises(error, match=sentence):
        models.load(folder)


@pytest.mark.parametrize("layer", [{}, {"layer": "Mamba1"}])
def test_the_first_mamba_is_not_taken_for_the_second(folder, layer):
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 48, "ssm_cfg": layer}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model type 'mamba1' is not supported; these are: mamba2"):
        models.load(folder)


def test_config_of_other_sizes(folder):
    _config(folder, num_hidden_layers=3, state_size=8)
    with pytest.raises(CheckpointError) as caught:
        models.load(folder)
    told = str(caught.value)
    assert "missing     backbone.layers.2.norm.weight: expected [16]" in told
    for i in range(2):
        assert f"wrong shape backbone.layers.{i}.mixer.in_proj.weight: expected [100, 16], got [84, 16]" in told


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "has no config.json; it has model.safetensors"),
        ("{", "is not JSON"),
        ("[1]", "a JSON object, got list"),
    ],
)
def test_config_that_cannot_be_read(folder, content, sentence):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=sentence):
        models.load(folder)


@pytest.mark.parametrize("dtype", ["int8", jnp.int32, "bf17", object()])
def test_dtype_that_is_none(folder, dtype):
    with pytest.raises(TypeError, match="load: dtype must be a floating-point dtype such as 'bfloat16', got"):
        models.load(folder, dtype)


def test_saving_what_is_no_model(tmp_path):
    with pytest.raises(TypeError, match="save: model must be one of Mamba2LM, got Linear"):
        models.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)


def test_weight_maps_cover_every_parameter_once():
    for options in ({}, {"tie_word_embeddings": False, "rms_norm": False, "D_has_hdim": True}):
        model = _model(**options)
        for format in ("transformers", "state-spaces"):
            tensors = weight_map(format).tensors(shapes(model))
            paths = [block.path for tensor in tensors for block in tensor.blocks]
            assert sorted(paths) == sorted(_values(model))
            sizes = sum(math.prod(tensor.shape) for tensor in tensors)
            assert sizes == sum(value.size for value in _values(model).values())


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
    models.save(_model(), small)
    arguments = json.dumps(["", str(small), str(big), dtype])
    used, weights = json.loads(child(f"import sys; sys.argv = {arguments}\n{MEMORY}", env={"OMP_NUM_THREADS": "1"}))
    assert weights > 150e6
    assert used < 1.3 * weights


def test_convert_writes_the_other_format(tmp_path, capsys):
    model = _model()
    models.save(model, tmp_path / "a", format="state-spaces")
    assert cli.main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'b'}: config.json and 24 tensors (F32) in 1 file.\n"
    assert EMBEDDING in load_file(tmp_path / "b" / "model.safetensors")
    _assert_same(models.load(tmp_path / "b"), model)
    command = ["convert", str(tmp_path / "b"), str(tmp_path / "c"), "--dtype", "bf16", "--to", "state-spaces"]
    assert cli.main(command) == 0
    assert "(BF16)" in capsys.readouterr().out
    _assert_same(models.load(tmp_path / "c"), models.load(tmp_path / "a", "bfloat16"))


def test_convert_says_mistakes_in_a_sentence(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "lacks vocab_size" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "portable never unpickles a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    assert _values(model).keys() == _values(_model()).keys()

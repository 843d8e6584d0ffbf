"""What can be wrong with a folder that `load` is given: one sentence each, all mismatches at once."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import cli, models
from portable.checks import CheckpointError, ConfigError
from portable.models.mamba2 import Mamba2LM
from tests.models.small import CONFIG, EMBEDDING, random_model, rewrite_config, rewrite_tensors, values


@pytest.fixture
def folder(tmp_path):
    models.save(random_model(), tmp_path)
    return tmp_path


def test_tied_head_that_differs_is_told(folder):
    rewrite_tensors(folder, lambda t: t.__setitem__("lm_head.weight", t[EMBEDDING] + 1))
    with pytest.raises(CheckpointError, match=r"wrong copy  lm_head\.weight: expected the values of backbone\.emb"):
        models.load(folder)


def test_every_mismatch_is_told_at_once(folder):
    def spoil(tensors):
        del tensors["backbone.layers.0.norm.weight"], tensors["backbone.layers.1.mixer.dt_bias"]
        tensors["backbone.layers.2.norm.weight"] = np.ones(16, np.float32)
        tensors["backbone.norm_f.weight"] = np.ones(15, np.float32)
        tensors["backbone.layers.0.mixer.out_proj.weight"] = np.ones((32, 16), np.float32)
        tensors["backbone.layers.1.mixer.D"] = np.ones(4, np.int64)

    rewrite_tensors(folder, spoil)
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

    rewrite_tensors(folder, spoil)
    with pytest.raises(CheckpointError, match="strict=False would ignore the missing and the unexpected"):
        models.load(folder)
    with pytest.warns(UserWarning, match=r"(?s)3 tensors ignored.*in_proj.*norm_f.*extra: got F32 \[2\]"):
        model = models.load(folder, strict=False)
    got, want, fresh = values(model), values(random_model()), values(Mamba2LM(CONFIG, rngs=nnx.Rngs(0)))
    random = {f"layers.0.mixer.in_{part}.kernel" for part in ("z", "x", "B", "C", "dt")} | {"norm.scale"}
    for path in want:
        if path in random:  # computed in one compiled program, hence the last bits
            np.testing.assert_allclose(got[path], fresh[path], rtol=1e-5, atol=1e-7, err_msg=path)
        else:
            np.testing.assert_array_equal(got[path], want[path], err_msg=path)


def test_not_strict_still_refuses_wrong_shapes(folder):
    rewrite_tensors(folder, lambda t: t.__setitem__("backbone.norm_f.weight", np.ones(15, np.float32)))
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

    rewrite_tensors(folder, spoil)
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
        ({"model_type": "bert"}, CheckpointError, "model type 'bert' is not supported; these are: mamba2"),
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
    rewrite_config(folder, **change)
    with pytest.raises(error, match=sentence):
        models.load(folder)


@pytest.mark.parametrize("layer", [{}, None, {"layer": "Mamba1"}])
def test_the_first_mamba_is_not_taken_for_the_second(folder, layer):
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 48, "ssm_cfg": layer}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="model type 'mamba1' is not supported; these are: mamba2"):
        models.load(folder)


def test_config_of_other_sizes(folder):
    rewrite_config(folder, num_hidden_layers=3, state_size=8)
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
    with pytest.raises(TypeError, match="save: model must be one of Mamba2LM, NAT, Decoder, got Linear"):
        models.save(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), tmp_path)


def test_convert_says_mistakes_in_a_sentence(tmp_path, capsys):
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba2"}))
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "lacks vocab_size" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "portable never unpickles a file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

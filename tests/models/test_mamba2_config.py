"""Mamba2Config reads and writes both formats of config.json."""

import dataclasses
import json
import math

import pytest

from portable.checks import ConfigError
from portable.models.mamba2 import Mamba2Config

# As published beside the weights of state-spaces/mamba2-130m.
PUBLISHED = {
    "d_model": 768,
    "d_intermediate": 0,
    "n_layer": 24,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}
TRANSFORMERS = {
    "model_type": "mamba2",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
}
EVERY_OPTION = Mamba2Config(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_heads=6,
    head_dim=8,
    state_size=12,
    n_groups=3,
    expand=3,
    conv_kernel=3,
    file_chunk_size=64,
    layer_norm_epsilon=1e-3,
    use_bias=True,
    use_conv_bias=False,
    hidden_act="gelu",
    residual_in_fp32=False,
    tie_word_embeddings=False,
    time_step_limit=(0.01, math.inf),
    time_step_min=0.01,
    time_step_max=0.2,
    time_step_floor=1e-3,
    initializer_range=0.3,
    rescale_prenorm_residual=True,
    bos_token_id=1,
    eos_token_id=(2, 3),
    pad_token_id=4,
)
BEYOND_TRANSFORMERS = {"rms_norm": False, "norm_before_gate": True, "D_has_hdim": True}


def _reread(config, format):
    return Mamba2Config.from_dict(json.loads(json.dumps(config.to_dict(format), allow_nan=False)))


def test_published_config_is_the_named_size():
    assert Mamba2Config.from_dict(PUBLISHED) == Mamba2Config.mamba2_130m()
    assert Mamba2Config.mamba2_130m().padded_vocab_size == 50288


def test_published_config_is_written_back():
    assert Mamba2Config.mamba2_130m().to_dict("state-spaces") == PUBLISHED


@pytest.mark.parametrize(
    "size, millions", [("130m", 129), ("370m", 368), ("780m", 780), ("1_3b", 1344), ("2_7b", 2703)]
)
def test_named_sizes_have_their_number_of_parameters(size, millions):
    c = getattr(Mamba2Config, f"mamba2_{size}")()
    inner, conv = c.expand * c.hidden_size, c.expand * c.hidden_size + 2 * c.n_groups * c.state_size
    mixer = c.hidden_size * (inner + conv + c.num_heads) + conv * (c.conv_kernel + 1) + 3 * c.num_heads + inner
    layer = mixer + inner * c.hidden_size + c.hidden_size
    total = c.padded_vocab_size * c.hidden_size + c.num_hidden_layers * layer + c.hidden_size
    assert round(total / 1e6) == millions


def test_every_option_survives_a_round_trip():
    for field in dataclasses.fields(Mamba2Config):
        if field.name not in {"chunk_size", "A_init_range", "pad_vocab_size_multiple", *BEYOND_TRANSFORMERS}:
            assert getattr(EVERY_OPTION, field.name) != field.default
    assert _reread(EVERY_OPTION, "state-spaces") == EVERY_OPTION
    # transformers would rescale the weights it loads.
    assert _reread(EVERY_OPTION, "transformers") == dataclasses.replace(EVERY_OPTION, rescale_prenorm_residual=False)


@pytest.mark.parametrize("option", BEYOND_TRANSFORMERS)
def test_options_that_transformers_lacks_are_kept_in_the_other_format(option):
    config = dataclasses.replace(EVERY_OPTION, **{option: BEYOND_TRANSFORMERS[option]})
    assert config.formats == ("state-spaces",)
    assert _reread(config, "state-spaces") == config
    with pytest.raises(ConfigError, match=f"has no {option}=.*use format 'state-spaces'"):
        config.to_dict("transformers")
    assert EVERY_OPTION.formats == ("transformers", "state-spaces")


def test_options_that_transformers_ignores_in_its_own_files_are_ignored():
    """Mamba-Codestral's config.json says norm_before_gate; transformers' model has none, and is right."""
    config = Mamba2Config.from_dict(TRANSFORMERS | {"norm_before_gate": True, "rms_norm": True})
    assert config == Mamba2Config.from_dict(TRANSFORMERS)
    assert not config.norm_before_gate


def test_transformers_has_no_padding_so_the_rows_are_written():
    padded = dataclasses.replace(EVERY_OPTION, vocab_size=50, pad_vocab_size_multiple=16)
    assert padded.to_dict()["vocab_size"] == 64
    plain = dataclasses.replace(padded, rms_norm=True, norm_before_gate=False, D_has_hdim=False)
    back = _reread(plain, "transformers")
    assert (back.vocab_size, back.padded_vocab_size) == (50, 64)
    assert _reread(padded, "state-spaces") == padded


def test_what_mamba_ssm_pads_to_where_the_file_is_silent():
    published = {key: value for key, value in PUBLISHED.items() if key != "pad_vocab_size_multiple"}
    assert Mamba2Config.from_dict(published).padded_vocab_size == 50280


@pytest.mark.parametrize("infinity", [math.inf, {"__float__": "Infinity"}, "Infinity"])
@pytest.mark.parametrize("whole", [TRANSFORMERS, PUBLISHED], ids=["transformers", "state-spaces"])
def test_infinite_limits_however_they_are_written(infinity, whole):
    if "ssm_cfg" in whole:
        whole = whole | {"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.5, infinity]}}
    else:
        whole = whole | {"time_step_limit": [0.5, infinity]}
    assert Mamba2Config.from_dict(whole).time_step_limit == (0.5, math.inf)


def test_missing_fields_are_all_named():
    given = {"model_type": "mamba2", "vocab_size": 50, "head_dim": None, "num_heads": 4, "state_size": 8}
    with pytest.raises(ConfigError, match=r"lacks hidden_size, num_hidden_layers, head_dim, n_groups; it has"):
        Mamba2Config.from_dict(given)
    with pytest.raises(ConfigError, match=r"lacks vocab_size, n_layer; it has d_model"):
        Mamba2Config.from_dict({"d_model": 768})


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"num_heads": 5}, r"num_heads \* head_dim must equal expand \* hidden_size; got 5 \* 8 and 2 \* 16"),
        ({"n_groups": 3}, "n_groups must divide num_heads; got n_groups=3, num_heads=4"),
        ({"hidden_size": "16"}, "hidden_size must be an integer of at least 1, got '16'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"state_size": 8.0}, "state_size must be an integer"),
        ({"vocab_size": True}, "vocab_size must be an integer"),
        ({"chunk_size": -1}, "chunk_size must be an integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false, got 'false'"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon must be a number"),
        ({"time_step_limit": [0.1]}, r"time_step_limit must be \(low, high\)"),
        ({"time_step_limit": [0.2, 0.1]}, r"time_step_limit .* 0 <= low <= high, got \(0.2, 0.1\)"),
        ({"time_step_limit": [0.1, "high"]}, "time_step_limit"),
        ({"hidden_act": "mish"}, "hidden_act must be one of silu, .*; got 'mish'"),
        ({"eos_token_id": "a"}, "eos_token_id must be a token id or null; got 'a'"),
        ({"unpadded_vocab_size": 10**6}, "vocab_size must be unpadded_vocab_size 1000000 rounded up"),
    ],
)
def test_contradictions_in_transformers_format(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Mamba2Config.from_dict(TRANSFORMERS | change)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"rms_norm": False}, "a LayerNorm between blocks"),
        ({"d_intermediate": 64}, "an MLP after each mixer"),
        ({"attn_layer_idx": [3]}, "attention layers"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 512}}, "a gated MLP inside the mixer"),
        ({"ssm_cfg": {"layer": "Mamba2", "colour": 1}}, "does not know: colour"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 0}}, "headdim must be an integer"),
        ({"ssm_cfg": {"layer": "Mamba2", "headdim": 100}}, r"num_heads \* head_dim must equal"),
        ({"d_model": "768"}, "d_model must be an integer"),
        ({"ssm_cfg": ["x"]}, r"ssm_cfg must hold options by name; got \('x',\)"),
    ],
)
def test_what_the_model_lacks_in_state_spaces_format(change, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Mamba2Config.from_dict(PUBLISHED | change)


def test_options_without_effect_are_accepted():
    layer = {"layer": "Mamba2", "use_mem_eff_path": True, "d_ssm": 1536}
    assert Mamba2Config.from_dict(PUBLISHED | {"ssm_cfg": layer}) == Mamba2Config.mamba2_130m()


def test_unknown_format():
    with pytest.raises(ConfigError, match="format must be 'transformers' or 'state-spaces', got 'gguf'"):
        EVERY_OPTION.to_dict("gguf")


def test_it_is_hashable_and_so_may_be_static():
    assert hash(Mamba2Config.from_dict(TRANSFORMERS)) == hash(Mamba2Config.from_dict(dict(TRANSFORMERS)))

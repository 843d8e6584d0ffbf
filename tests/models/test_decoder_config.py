"""What a decoder's config.json may say, and what is refused."""

import dataclasses

import pytest

from portable.checks import ConfigError
from portable.models.decoder import FAMILIES, DecoderConfig
from portable.nn import Rotary

LLAMA = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3",
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 2,
    "v_head_dim": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}


def test_old_files_name_rotary_positions_otherwise():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7}
    config = DecoderConfig.from_dict(LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling})
    assert config.rope == Rotary(5e5, kind="yarn", factor=4.0, original_length=16, mscale=0.7)


def test_what_a_family_assumes_where_the_file_is_silent():
    assert DecoderConfig.from_dict(MIXTRAL).rope.theta == 1e6
    assert DecoderConfig.from_dict(MIXTRAL).norm_topk_prob
    oss = DecoderConfig.from_dict(MIXTRAL | {"model_type": "gpt_oss", "sliding_window": 4})
    assert oss.layer_types == ("sliding_attention", "full_attention") * 2
    assert (oss.rope.kind, oss.rope.factor, oss.rope.theta, oss.rope.truncate) == ("yarn", 32.0, 150000.0, False)
    assert DecoderConfig.from_dict(DEEPSEEK).dense_layers == (0,)
    assert DecoderConfig.from_dict(LLAMA | {"model_type": "qwen3"}).head_dim == 128


BAD = {
    "unknown rope type": (LLAMA | {"rope_scaling": {"type": "longrope"}}, "rope_type must be one of", "'longrope'"),
    "unknown score": (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func must be 'sigmoid' in this model type"),
    "unknown router": (DEEPSEEK | {"topk_method": "hash"}, "topk_method must be one of noaux_tc; got 'hash'"),
    "too many experts a token": (MIXTRAL | {"num_experts_per_tok": 5}, "must be in 1..num_experts=4; got 5"),
    "groups": (DEEPSEEK | {"n_group": 3}, "n_group must divide num_experts; got 3 and 8"),
    "more groups than there are": (DEEPSEEK | {"topk_group": 5}, "topk_group must be at most n_group=4; got 5"),
    "more experts than groups have": (
        DEEPSEEK | {"topk_group": 1, "num_experts_per_tok": 3},
        "num_experts_per_tok must be at most the 2 experts of topk_group; got 3",
    ),
    "fields are missing": ({"model_type": "llama", "vocab_size": 8}, "lacks hidden_size, num_hidden_layers"),
    "heads": (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads; got 3 and 2"),
    "layer types": (LLAMA | {"model_type": "qwen3", "layer_types": ["mamba"] * 4}, "layer_types must be of", "'mamba'"),
    "too few layer types": (LLAMA | {"model_type": "qwen3", "layer_types": ["conv"]}, "name each of 4 layers; got 1"),
    "a window of nothing": (
        LLAMA | {"model_type": "qwen3", "layer_types": ["sliding_attention"] * 4},
        "sliding_attention needs sliding_window; got none",
    ),
    "part of the channels": (LLAMA | {"partial_rotary_factor": 0.5}, "rotates all channels; got partial_rotary_factor"),
    "activation": (LLAMA | {"hidden_act": "xielu"}, "hidden_act must be one of", "'xielu'"),
    "quantized": (MIXTRAL | {"quantization_config": {"quant_method": "mxfp4"}}, "weights are quantized (mxfp4)"),
    "another clamp": (
        MIXTRAL | {"model_type": "gpt_oss", "sliding_window": 4, "swiglu_limit": 5.0},
        "clamped at 7 with slope 1.702; got swiglu_limit=5.0",
    ),
    "not a number": (LLAMA | {"num_hidden_layers": "4"}, "num_hidden_layers must be an integer of at least 1; got '4'"),
    "another model": (LLAMA | {"model_type": "gpt2"}, "model_type must be one of", "'gpt2'"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name):
    config, *sentences = BAD[name]
    with pytest.raises(ConfigError) as error:
        DecoderConfig.from_dict(config)
    for sentence in sentences:
        assert sentence in str(error.value)


def test_unknown_router_of_a_configuration():
    with pytest.raises(ConfigError, match=r"router must be one of softmax, .*; got 'hash'"):
        dataclasses.replace(DecoderConfig.from_dict(MIXTRAL), router="hash")


@pytest.mark.parametrize(
    "change, told",
    [({"qk_norm": True}, "qk_norm=True"), ({"logits_scaling": 2.0}, "logits_scaling=2.0")],
)
def test_a_family_without_a_word_for_an_option_is_not_written(change, told):
    config = dataclasses.replace(DecoderConfig.from_dict(LLAMA), **change)
    with pytest.raises(ConfigError, match=f"llama of transformers has no word for {told}"):
        config.to_dict()


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read_again(family):
    file = DEEPSEEK | MIXTRAL | {"num_experts": 4, "n_group": 2, "sliding_window": 3, "use_sliding_window": True}
    file |= {"model_type": family, "layer_types": ["full_attention"] * 4, "shared_expert_intermediate_size": 8}
    file |= {"topk_group": 1, "topk_method": None, "n_routed_experts": 4, "num_key_value_heads": 1}
    config = DecoderConfig.from_dict(file)
    assert DecoderConfig.from_dict(config.to_dict()) == config

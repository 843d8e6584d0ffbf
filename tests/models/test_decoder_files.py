"""Files of decoders with experts: what is missing or foreign in them is told by name, and loading holds one copy."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from portable import models
from portable.checks import CheckpointError, ConfigError
from portable.models.decoder import Decoder, DecoderConfig
from tests.models.small import rewrite_tensors, values
from tests.oracles import need

CONFIG = DecoderConfig(
    family="deepseek_v3",
    vocab_size=16,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=8,
    kv_lora_rank=4,
    q_lora_rank=4,
    qk_nope_head_dim=4,
    qk_rope_head_dim=2,
    v_head_dim=4,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_intermediate_size=8,
    dense_layers=(0,),
    router="sigmoid_groups",
    router_eps=1e-20,
    n_group=2,
    topk_group=1,
    norm_topk_prob=True,
    use_expert_bias=True,
    rope=dataclasses.replace(DecoderConfig.rope, interleaved=True),
)


@pytest.fixture
def folder(tmp_path):
    model = Decoder(CONFIG, rngs=nnx.Rngs(0))
    model.layers[1].mlp.selection_bias[...] = jnp.arange(4.0)
    models.save(model, tmp_path)
    return tmp_path


def test_the_bias_of_the_selection_is_kept_and_is_no_param(folder):
    model = models.load(folder)
    np.testing.assert_array_equal(model.layers[1].mlp.selection_bias[...], np.arange(4.0))
    assert not any("selection_bias" in name for name in values(model))


def test_a_missing_expert_is_named(folder):
    def drop(tensors):
        del tensors["model.layers.1.mlp.experts.2.up_proj.weight"]

    rewrite_tensors(folder, drop)
    with pytest.raises(CheckpointError, match=r"missing     model.layers.1.mlp.experts.2.up_proj.weight: .*\[8, 8\]"):
        models.load(folder)


def test_a_missing_file_of_experts_is_named(tmp_path):
    models.save(Decoder(CONFIG, rngs=nnx.Rngs(0)), tmp_path, max_shard_size=2000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = index["model.layers.1.mlp.experts.3.gate_proj.weight"]
    (tmp_path / lost).unlink()
    with pytest.raises(CheckpointError, match=f"lacks 1 of the .* files that its index names: {lost}"):
        models.load(tmp_path)


def test_layers_that_predict_further_tokens_are_passed_over(folder):
    def add(tensors):
        tensors["model.layers.2.eh_proj.weight"] = np.zeros((8, 16), np.float32)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(1, np.float32)

    want = jax.tree.leaves(nnx.state(models.load(folder)))
    rewrite_tensors(folder, add)
    got = jax.tree.leaves(nnx.state(models.load(folder)))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_four_bits_are_refused_in_a_sentence(folder):
    def pack(tensors):
        tensors["model.layers.1.mlp.experts.gate_up_proj_blocks"] = np.zeros((4, 2), np.uint8)

    rewrite_tensors(folder, pack)
    with pytest.raises(CheckpointError, match=r"gate_up_proj_blocks belongs to quantized weights .* save them in bf"):
        models.load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ConfigError, match=r"config.json: DecoderConfig: the weights are quantized \(fp8\)"):
        models.load(folder)


def test_loading_holds_one_copy_of_the_experts(tmp_path):
    """Beside the weights themselves only some pieces of files are in memory."""
    config = dataclasses.replace(CONFIG, hidden_size=64, num_experts=16, n_group=2, moe_intermediate_size=2048)
    config = dataclasses.replace(config, shared_intermediate_size=2048)
    models.save(Decoder(config, rngs=nnx.Rngs(0)), tmp_path)
    experts = 16 * 64 * 2048 * 4
    jax.clear_caches()
    tracemalloc.start()
    try:
        model = models.load(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    held = sum(value.nbytes for value in values(model).values())
    assert held > 3 * experts
    assert peak < held + experts


@pytest.mark.parametrize("name", ["qwen3_0_6b", "qwen3_30b_a3b", "olmoe_1b_7b"])
def test_a_published_size_is_transformers_model_of_that_config(name):
    torch, transformers = need("torch", "transformers")
    config = getattr(DecoderConfig, name)()
    file = config.to_dict()
    theirs = transformers.CONFIG_MAPPING[file["model_type"]].from_dict(file)
    with torch.device("meta"):
        wanted = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(theirs).parameters())
    made = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(made, nnx.Param))) == wanted

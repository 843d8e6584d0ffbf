"""Where the tensors of transformers' checkpoints lie in `Decoder`."""

from collections.abc import Callable, Iterable

from portable.checkpoint import Rule, WeightMap, depthwise, transposed
from portable.checks import CheckpointError
from portable.models.decoder.config import DecoderConfig

# Names of the parts of a layer, where a family has others than most.
_LFM2 = {"input_layernorm": "operator_norm", "post_attention_layernorm": "ffn_norm", "mlp": "feed_forward"}
_LFM2 |= {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm", "norm": "embedding_norm"}
_LFM2 |= {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_SPELLED = {
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2,
    "mixtral": {"mlp": "block_sparse_moe", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "granitemoe": {"mlp": "block_sparse_moe"},
}


def check_tensors(tensors: Iterable[str]) -> str:
    """Returns "transformers", the only format.

    Raises:
      CheckpointError: the tensors are blocks of four bits, which their names tell.
    """
    if packed := [name for name in tensors if name.endswith(("_blocks", "_scales", ".weight_scale_inv"))]:
        raise CheckpointError(
            f"{packed[0]} belongs to quantized weights (MXFP4 or FP8), which are not read; save them in bfloat16 first "
            "(transformers: from_pretrained(..., dequantize=True) and save_pretrained)."
        )
    return "transformers"


def weight_map(config: DecoderConfig) -> WeightMap:
    """Returns the rules for a model of this configuration."""
    spelled = _SPELLED.get(config.family, {})

    def name(part: str) -> str:
        return spelled.get(part, part)

    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    rules = [Rule(embedding, "embed.embedding"), Rule(f"model.{name('norm')}.weight", "norm.scale")]
    rules.append(Rule(head, "head.kernel", transposed))
    there, here = "model.layers.{i}.", "layers.{i}."
    rules.append(Rule(f"{there}{name('input_layernorm')}.weight", f"{here}mixer_norm.scale"))
    rules.append(Rule(f"{there}{name('post_attention_layernorm')}.weight", f"{here}mlp_norm.scale"))

    def dense(tensor: str, *modules: str, **options) -> None:
        kernels, biases = (tuple(f"{here}{m}.{leaf}" for m in modules) for leaf in ("kernel", "bias"))
        rules.append(Rule(f"{there}{tensor}.weight", kernels, transposed, **options))
        rules.append(Rule(f"{there}{tensor}.bias", biases, **options))

    for tensor, module in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        dense(f"self_attn.{tensor}", f"mixer.{module}")
    for i in range(config.num_hidden_layers):  # the same module behind attention and convolution, by other names
        out = "conv.out_proj" if config.layer_type(i) == "conv" else f"self_attn.{name('o_proj')}"
        rules.append(Rule(f"model.layers.{i}.{out}.weight", f"layers.{i}.mixer.out.kernel", transposed))
        rules.append(Rule(f"model.layers.{i}.{out}.bias", f"layers.{i}.mixer.out.bias"))
    rules.append(Rule(f"{there}self_attn.sinks", f"{here}mixer.sinks"))
    if config.kv_lora_rank is None:
        for tensor, module in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
            rules.append(Rule(f"{there}self_attn.{name(tensor)}.weight", f"{here}mixer.{module}.scale"))
    else:
        dense("self_attn.q_a_proj", "mixer.query_down")
        rules.append(Rule(f"{there}self_attn.q_a_layernorm.weight", f"{here}mixer.query_norm.scale"))
        dense("self_attn.q_b_proj", "mixer.query_up")
        dense("self_attn.kv_a_proj_with_mqa", "mixer.kv_down", "mixer.key_rope")
        rules.append(Rule(f"{there}self_attn.kv_a_layernorm.weight", f"{here}mixer.kv_norm.scale"))
        nope, _, value = config.latent_dims
        dense("self_attn.kv_b_proj", "mixer.key_up", "mixer.value_up", turns=(nope, value))
    if "conv" in config.layer_types:
        dense("conv.in_proj", "mixer.in_B", "mixer.in_C", "mixer.in_x")
        rules.append(Rule(f"{there}conv.conv.weight", f"{here}mixer.conv.kernel", depthwise))
        rules.append(Rule(f"{there}conv.conv.bias", f"{here}mixer.conv.bias"))
    for part in ("gate", "up", "down"):
        dense(f"{name('mlp')}.{name(f'{part}_proj')}", f"mlp.{part}")
    if config.num_experts:
        rules += _experts(config, there + name("mlp"), f"{here}mlp", name)
    return WeightMap(tuple(rules), repeats={head: embedding}, prefix="model.", ignored=_ignored(config))


def _experts(config: DecoderConfig, there: str, here: str, name: Callable[[str], str]) -> list[Rule]:
    """The rules of a layer of experts, `there` in the file and `here` in the model."""
    router = "router.layer" if config.family == "granitemoe" else "router" if config.family == "gpt_oss" else "gate"
    bias = "expert_bias" if config.family == "lfm2_moe" else "gate.e_score_correction_bias"
    rules = [
        Rule(f"{there}.{router}.weight", f"{here}.router.kernel", transposed),
        Rule(f"{there}.{router}.bias", f"{here}.router.bias"),
        Rule(f"{there}.{bias}", f"{here}.selection_bias"),
        Rule(f"{there}.shared_expert_gate.weight", f"{here}.shared_gate.kernel", transposed),
    ]
    shared = "shared_experts" if config.kv_lora_rank is not None else "shared_expert"
    gates = f"{here}.gate", f"{here}.up"
    for part in ("gate", "up", "down"):
        rules.append(Rule(f"{there}.{shared}.{part}_proj.weight", f"{here}.shared.{part}.kernel", transposed))
        rules.append(Rule(f"{there}.{shared}.{part}_proj.bias", f"{here}.shared.{part}.bias"))
    if config.family == "granitemoe":
        rules.append(Rule(f"{there}.input_linear.weight", gates, transposed, axis=1))
        rules.append(Rule(f"{there}.output_linear.weight", f"{here}.down", transposed))
    elif config.family == "gpt_oss":
        biases = f"{here}.gate_bias", f"{here}.up_bias"
        rules.append(Rule(f"{there}.experts.gate_up_proj", gates, axis=2, turns=(1, 1)))
        rules.append(Rule(f"{there}.experts.gate_up_proj_bias", biases, axis=1, turns=(1, 1)))
        rules.append(Rule(f"{there}.experts.down_proj", f"{here}.down"))
        rules.append(Rule(f"{there}.experts.down_proj_bias", f"{here}.down_bias"))
    else:
        for part in ("gate", "up", "down"):
            tensor = f"{there}.experts.{{e}}.{name(f'{part}_proj')}.weight"
            rules.append(Rule(tensor, f"{here}.{part}", transposed))
    return rules


def _ignored(config: DecoderConfig) -> str:
    """Tables of rotary angles in old files, and the layers that predict further tokens (DeepSeek-V3)."""
    further = "|".join(str(config.num_hidden_layers + i) for i in range(8))
    return rf"(model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq|model\.layers\.({further})\..*"

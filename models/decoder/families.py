"""The model types of transformers that `DecoderConfig` expresses: how their config.json says what."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from portable.checks import ConfigError

REQUIRED = object()


class Family(NamedTuple):
    """One model type.

    Attributes:
      architecture: transformers' class.
      fields: our field -> (their key, what they assume where it is missing, or REQUIRED).
      fixed: our field -> what it always is.
      theta: base of rotary frequencies where the file names none.
      read: file -> further fields.
      write: configuration -> further keys.
    """

    architecture: str
    fields: dict[str, tuple[str, Any]]
    fixed: dict[str, Any]
    theta: float = 10000.0
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda file: {}
    write: Callable[[Any], dict[str, Any]] = lambda config: {}


def _same(*names: str, **defaults: Any) -> dict[str, tuple[str, Any]]:
    return {name: (name, REQUIRED) for name in names} | {name: (name, value) for name, value in defaults.items()}


def _base(eps: str = "rms_norm_eps", eps_default: float = 1e-6, bos: Any = None, eos: Any = None, tied: bool = False):
    return _same(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        max_position_embeddings=2048,
        initializer_range=0.02,
        tie_word_embeddings=tied,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=None,
    ) | {"norm_eps": (eps, eps_default)}


_HEADS = _same(num_key_value_heads=None, head_dim=None)
_DENSE = _same("intermediate_size", hidden_act="silu")
_EXPERTS = _same("num_experts_per_tok", hidden_act="silu")
_BIAS = {"attention_bias": ("attention_bias", False), "attention_out_bias": ("attention_bias", False)}
_AUX = {"router_aux_loss_coef": ("router_aux_loss_coef", 0.001)}
# Experts of which "intermediate_size" is the width: there is no dense layer.
_ONLY_EXPERTS = {"moe_intermediate_size": ("intermediate_size", REQUIRED)}


def layers(config: Any) -> list[str]:
    """Returns the type of each layer."""
    return [config.layer_type(i) for i in range(config.num_hidden_layers)]


def _all_sliding(file: Mapping[str, Any]) -> dict[str, Any]:
    """A window in all layers or in none."""
    window = file.get("sliding_window") if file.get("use_sliding_window", True) else None
    n = file["num_hidden_layers"]
    return {"sliding_window": window, "layer_types": () if window is None else ("sliding_attention",) * n}


def _write_all_sliding(config: Any) -> dict[str, Any]:
    kinds = set(layers(config))
    if len(kinds) > 1:
        raise ConfigError(f"DecoderConfig: {config.family} has layers of one kind alone; got {', '.join(kinds)}.")
    return {"sliding_window": config.sliding_window if kinds == {"sliding_attention"} else None}


def _some_sliding(is_sliding: Callable[[Mapping[str, Any], int], bool]):
    """Layers of a window named one by one, or by a rule: which of them where `layer_types` is missing."""

    def read(file: Mapping[str, Any]) -> dict[str, Any]:
        window = file.get("sliding_window") if file.get("use_sliding_window", True) else None
        names = {True: "sliding_attention", False: "full_attention"}
        n = file["num_hidden_layers"]
        kinds = file.get("layer_types") or [names[bool(window) and is_sliding(file, i)] for i in range(n)]
        return {"sliding_window": window or None, "layer_types": tuple(kinds)}

    return read


def _write_some_sliding(config: Any) -> dict[str, Any]:
    window = config.sliding_window
    return {"layer_types": layers(config), "sliding_window": window, "use_sliding_window": window is not None}


def _sparse_layers(file: Mapping[str, Any]) -> dict[str, Any]:
    """Qwen: every decoder_sparse_step-th layer has experts, those of mlp_only_layers have none."""
    step, only = file.get("decoder_sparse_step", 1), file.get("mlp_only_layers") or ()
    dense = [i for i in range(file["num_hidden_layers"]) if i in only or (i + 1) % step]
    return {"dense_layers": tuple(dense)}


def _write_sparse_layers(config: Any) -> dict[str, Any]:
    return {"decoder_sparse_step": 1, "mlp_only_layers": list(config.dense_layers)}


def _leading(key: str) -> tuple[Callable, Callable]:
    """The first layers are dense, as many as a key says."""

    def read(file: Mapping[str, Any]) -> dict[str, Any]:
        return {"dense_layers": tuple(range(min(file.get(key) or 0, file["num_hidden_layers"])))}

    def write(config: Any) -> dict[str, Any]:
        n = len(config.dense_layers)
        if config.dense_layers != tuple(range(n)):
            raise ConfigError(
                f"DecoderConfig: dense layers of {config.family} come first; got dense_layers={config.dense_layers}."
            )
        return {key: n}

    return read, write


def _lfm2(file: Mapping[str, Any]) -> dict[str, Any]:
    n, attention = file["num_hidden_layers"], file.get("full_attn_idxs")
    named = file.get("layer_types")
    kinds = named or ["conv" if attention is not None and i not in attention else "full_attention" for i in range(n)]
    found: dict[str, Any] = {"layer_types": tuple(kinds)}
    if "tie_embedding" in file:
        found["tie_word_embeddings"] = file["tie_embedding"]
    return found


def _lfm2_width(file: Mapping[str, Any]) -> dict[str, Any]:
    """The width inside is made of the file's: two thirds of it, times a factor, rounded up to a multiple."""
    width = file.get("block_ff_dim", file.get("intermediate_size"))
    if width is None:
        raise ConfigError("DecoderConfig: config.json lacks intermediate_size.")
    if file.get("block_auto_adjust_ff_dim", True):
        factor, multiple = file.get("block_ffn_dim_multiplier", 1.0), file.get("block_multiple_of", 256)
        width = int(2 * width / 3)
        if factor is not None:
            width = -(-int(factor * width) // multiple) * multiple
    return {"intermediate_size": width}


def _deepseek(routers: Mapping[str, str], method: str, score: str):
    """Groups, shared experts and the way of choosing of DeepSeek."""

    def read(file: Mapping[str, Any]) -> dict[str, Any]:
        if (given := file.get("scoring_func") or score) != score:
            raise ConfigError(f"DecoderConfig: scoring_func must be {score!r} in this model type; got {given!r}.")
        named = file.get("topk_method") or method
        if named not in routers:
            raise ConfigError(
                f"DecoderConfig: topk_method must be one of {', '.join(routers)}; got {named!r}, a router that this "
                "model has not."
            )
        if (every := file.get("moe_layer_freq", 1)) != 1:
            raise ConfigError(f"DecoderConfig: moe_layer_freq must be 1; got {every}.")
        found: dict[str, Any] = {"router": routers[named]}
        if named != "greedy":
            found |= {name: file.get(name) or 1 for name in ("n_group", "topk_group")}
        if shared := file.get("n_shared_experts"):
            found["shared_intermediate_size"] = shared * file["moe_intermediate_size"]
        return found

    def write(config: Any) -> dict[str, Any]:
        named = {router: name for name, router in routers.items()}
        if config.router not in named:
            raise ConfigError(f"DecoderConfig: {config.family} has no router {config.router!r}.")
        shared, rest = divmod(config.shared_intermediate_size or 0, config.moe_intermediate_size)
        if rest or not shared:
            raise ConfigError(
                "DecoderConfig: shared_intermediate_size must be a multiple of moe_intermediate_size="
                f"{config.moe_intermediate_size} for {config.family}; got {config.shared_intermediate_size}."
            )
        groups = {"n_group": config.n_group, "topk_group": config.topk_group}
        return {"topk_method": named[config.router], "n_shared_experts": shared, **groups}

    return read, write


def _both(*functions: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    def run(argument: Any) -> dict[str, Any]:
        return {key: value for function in functions for key, value in function(argument).items()}

    return run


def _clamp(file: Mapping[str, Any]) -> dict[str, Any]:
    """gpt-oss' activation has one slope and one limit in `portable.ops.moe_ffn`."""
    slope, limit = file.get("swiglu_alpha", 1.702), file.get("swiglu_limit", 7.0)
    if (slope, limit) != (1.702, 7.0):
        raise ConfigError(
            f"DecoderConfig: experts of gpt_oss are clamped at 7 with slope 1.702; got swiglu_limit={limit}, "
            f"swiglu_alpha={slope}."
        )
    return {"clamped_experts": True}


_LATENT = _same("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", q_lora_rank=None)
_FIRST_DENSE, _WRITE_FIRST_DENSE = _leading("first_k_dense_replace")
_NUM_DENSE, _WRITE_NUM_DENSE = _leading("num_dense_layers")
_DEEPSEEK = _LATENT | _EXPERTS | _DENSE | _BIAS | _same("moe_intermediate_size", routed_scaling_factor=1.0)
_DEEPSEEK |= {"num_experts": ("n_routed_experts", REQUIRED), "router_aux_loss_coef": ("aux_loss_alpha", 0.0)}
_DEEPSEEK |= {"num_key_value_heads": ("num_key_value_heads", None)}
_V2_READ, _V2_WRITE = _deepseek({"greedy": "softmax", "group_limited_greedy": "softmax_groups"}, "greedy", "softmax")
_V3_READ, _V3_WRITE = _deepseek({"noaux_tc": "sigmoid_groups"}, "noaux_tc", "sigmoid")
_LFM2_TAPS = {"conv_kernel": ("conv_L_cache", 3), "conv_bias": ("conv_bias", False)}
_LFM2 = _base("norm_eps", 1e-5, 1, 2, True) | _same(num_key_value_heads=8, head_dim=None) | _LFM2_TAPS

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM", _base(bos=1, eos=2) | _HEADS | _DENSE | _BIAS | _same(mlp_bias=False), {}),
    "mistral": Family(
        "MistralForCausalLM",
        _base(bos=1, eos=2) | _HEADS | _DENSE,
        {},
        read=_all_sliding,
        write=_write_all_sliding,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _base() | _HEADS | _DENSE,
        {"attention_bias": True},
        read=_some_sliding(lambda file, i: i >= file.get("max_window_layers", 28)),
        write=_write_some_sliding,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _base() | _HEADS | _DENSE | _BIAS | _same(head_dim=128),
        {"qk_norm": True},
        read=_some_sliding(lambda file, i: i >= file.get("max_window_layers", 28)),
        write=_write_some_sliding,
    ),
    "lfm2": Family(
        "Lfm2ForCausalLM",
        _LFM2,
        {"qk_norm": True},
        1e6,
        _both(_lfm2, _lfm2_width),
        lambda c: {
            "layer_types": layers(c),
            "intermediate_size": c.intermediate_size,
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        _base("rms_norm_eps", 1e-5, 1, 2)
        | _HEADS
        | _EXPERTS
        | _ONLY_EXPERTS
        | _AUX
        | {"num_experts": ("num_local_experts", REQUIRED)},
        {"norm_topk_prob": True},
        1e6,
        _all_sliding,
        _write_all_sliding,
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        _base()
        | _HEADS
        | _DENSE
        | _EXPERTS
        | _AUX
        | _same("num_experts", "moe_intermediate_size", norm_topk_prob=False)
        | {
            "attention_bias": ("qkv_bias", True),
            "shared_intermediate_size": ("shared_expert_intermediate_size", REQUIRED),
        },
        {"shared_expert_gate": True},
        read=_both(_some_sliding(lambda file, i: i % 2 == 0 and i < file.get("max_window_layers", 28)), _sparse_layers),
        write=_both(_write_some_sliding, _write_sparse_layers),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _base()
        | _HEADS
        | _DENSE
        | _EXPERTS
        | _AUX
        | _BIAS
        | _same("num_experts", "moe_intermediate_size", norm_topk_prob=False),
        {"qk_norm": True},
        read=_both(lambda file: _all_sliding({"use_sliding_window": False, **file}), _sparse_layers),
        write=_both(
            _write_all_sliding,
            lambda c: {"use_sliding_window": "sliding_attention" in c.layer_types},
            _write_sparse_layers,
        ),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _base("rms_norm_eps", 1e-5, None, 50279)
        | _same(num_key_value_heads=None)
        | _EXPERTS
        | _ONLY_EXPERTS
        | _BIAS
        | _same("num_experts", clip_qkv=None, norm_topk_prob=False, router_aux_loss_coef=0.01),
        {"qk_norm": "all"},
    ),
    "granitemoe": Family(
        "GraniteMoeForCausalLM",
        _base(bos=1, eos=2)
        | _same(num_key_value_heads=None)
        | _EXPERTS
        | _ONLY_EXPERTS
        | _AUX
        | _BIAS
        | _same(attention_multiplier=1.0, embedding_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
        | {"num_experts": ("num_local_experts", REQUIRED)},
        {"norm_topk_prob": True},
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        _base("rms_norm_eps", 1e-5)
        | _HEADS
        | _same("num_experts_per_tok")
        | _ONLY_EXPERTS
        | _AUX
        | {
            "num_experts": ("num_local_experts", REQUIRED),
            "attention_bias": ("attention_bias", True),
            "attention_out_bias": ("attention_bias", True),
        },
        {"norm_topk_prob": True, "attention_sinks": True, "expert_biases": True},
        150000.0,
        _both(_some_sliding(lambda file, i: i % 2 == 0), _clamp),
        lambda c: {"layer_types": layers(c), "sliding_window": c.sliding_window},
    ),
    "lfm2_moe": Family(
        "Lfm2MoeForCausalLM",
        _LFM2
        | _same(
            "intermediate_size",
            "moe_intermediate_size",
            "num_experts",
            "num_experts_per_tok",
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            use_expert_bias=True,
        ),
        {"qk_norm": True, "router": "sigmoid", "router_eps": 1e-6},
        1e6,
        _both(_lfm2, _NUM_DENSE),
        _both(lambda c: {"layer_types": layers(c)}, _WRITE_NUM_DENSE),
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        _base(bos=1, eos=2) | _DEEPSEEK | _same(mlp_bias=False),
        {},
        read=_both(_FIRST_DENSE, _V2_READ),
        write=_both(_WRITE_FIRST_DENSE, _V2_WRITE),
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        _base(bos=0, eos=1) | _DEEPSEEK | _same(routed_scaling_factor=2.5, norm_topk_prob=True),
        {"use_expert_bias": True, "router_eps": 1e-20},
        read=_both(_FIRST_DENSE, _V3_READ),
        write=_both(_WRITE_FIRST_DENSE, _V3_WRITE),
    ),
}

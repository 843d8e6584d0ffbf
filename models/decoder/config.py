"""Configuration of the attention decoders, read from and written to transformers' config.json."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

from portable.checks import ConfigError
from portable.models.decoder import config_file
from portable.models.decoder.families import FAMILIES
from portable.nn import Rotary
from portable.nn.norm import ACTIVATIONS

LAYER_TYPES = ("full_attention", "sliding_attention", "conv")
# How experts are chosen: by the largest softmax, by the best groups and then the largest softmax, by the largest
# sigmoid plus a bias, by the best groups and then the largest sigmoid plus a bias.
ROUTERS = ("softmax", "softmax_groups", "sigmoid", "sigmoid_groups")

# What the activations of experts are called in `portable.ops.moe_ffn`.
EXPERT_ACTIVATIONS = {name: name for name in ("silu", "gelu", "relu")}
EXPERT_ACTIVATIONS |= {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of an attention decoder, named as in transformers where its families agree.

    Attributes:
      family: transformers' model_type, in whose format the model is saved; one of `families.FAMILIES`.
      vocab_size: v. hidden_size: d. num_hidden_layers: blocks.
      num_attention_heads, num_key_value_heads, head_dim: None takes as many heads, and d / heads channels.
      intermediate_size: width inside the dense feed-forward layers; None where every layer has experts.
      hidden_act: of feed-forward layers.
      max_position_embeddings: of the training; longer inputs are not refused.
      norm_eps: of the norms but those inside latent attention, which have 1e-6.
      tie_word_embeddings: the head is the embedding, transposed.
      initializer_range: standard deviation of kernels at initialisation.
      rope: rotary positions.
      layer_types: of each layer, one of `LAYER_TYPES`; () is full attention in all.
      sliding_window: positions that "sliding_attention" sees, its own among them.
      attention_bias, attention_out_bias, mlp_bias: biases on the projections of queries, keys and values, on the one
        behind attention, and on the dense feed-forward layers.
      qk_norm: RMSNorm of queries and keys; "all" over the channels of all heads.
      clip_qkv: queries, keys and values are clipped to +- this.
      attention_sinks: a learned logit for each head.
      attention_multiplier: scale of the scores; None for head_dim ** -0.5.
      embedding_multiplier, residual_multiplier: factors on the embedding and on each branch.
      logits_scaling: the logits are divided by this.
      conv_kernel, conv_bias: of "conv" layers (`portable.nn.ShortConv`).
      kv_lora_rank: rank of the latent of `portable.nn.LatentAttention`, which takes the place of attention where given.
      q_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: its query_rank, head_dim, rope_dim and value_dim.
      num_experts: 0 for a dense model.
      num_experts_per_tok: experts that a token takes.
      moe_intermediate_size: width inside an expert.
      dense_layers: layers without experts.
      router: one of `ROUTERS`.
      norm_topk_prob: weights of a token's experts are divided by their sum.
      router_eps: added to that sum.
      routed_scaling_factor: factor on the weights.
      n_group, topk_group: groups of experts, and how many of them a token may use.
      use_expert_bias: the sigmoid routers add a bias to the scores that choose, not to the weights.
      expert_biases: biases on router and experts.
      clamped_experts: experts have gpt-oss' activation in place of hidden_act.
      shared_intermediate_size: width of the expert that every token takes; None for none.
      shared_expert_gate: a sigmoid gate on it.
      router_aux_loss_coef: factor of the routers' load balance in the training loss.
      bos_token_id, eos_token_id, pad_token_id: of the tokenizer; None where unknown.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int | None = None
    family: str = "llama"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope: Rotary = Rotary()
    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool | str = False
    clip_qkv: float | None = None
    attention_sinks: bool = False
    attention_multiplier: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0
    conv_kernel: int = 3
    conv_bias: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int | None = None
    dense_layers: tuple[int, ...] = ()
    router: str = "softmax"
    norm_topk_prob: bool = False
    router_eps: float = 0.0
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    use_expert_bias: bool = False
    expert_biases: bool = False
    clamped_experts: bool = False
    shared_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    router_aux_loss_coef: float = 0.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            kind = field.type.__name__ if type(field.type) is type else str(field.type)
            self._check(field.name, kind, getattr(self, field.name))
        self._rule(
            self.family in FAMILIES,
            f"family must be one of {', '.join(FAMILIES)}; got {self.family!r}",
        )
        heads = self.num_attention_heads
        self._rule(
            heads % self.kv_heads == 0,
            f"num_key_value_heads must divide num_attention_heads; got {self.kv_heads} and {heads}",
        )
        self._rule(
            self.head_dim is not None or self.hidden_size % heads == 0,
            f"num_attention_heads must divide hidden_size; got {heads} and {self.hidden_size}. Or give head_dim",
        )
        for name, known in (("hidden_act", ACTIVATIONS), ("router", ROUTERS)):
            value = getattr(self, name)
            self._rule(value in known, f"{name} must be one of {', '.join(known)}; got {value!r}")
        self._check_layers()
        if self.num_experts:
            self._check_experts()
        if self.kv_lora_rank is not None:
            needed = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
            missing = [name for name in needed if getattr(self, name) is None]
            self._rule(not missing, f"kv_lora_rank needs {', '.join(missing)} too; got none")

    def _check(self, name: str, kind: str, value: Any) -> None:
        if value is None:
            self._rule("None" in kind, f"{name} must not be null")
            return
        if "tuple" in kind and isinstance(value, tuple):
            inner = str if "str" in kind else int
            self._rule(all(type(v) is inner for v in value), f"{name} must hold {inner.__name__}s; got {value!r}")
        elif kind.startswith("bool"):
            self._rule(isinstance(value, bool) or (kind != "bool" and value == "all"), f"{name} is not {value!r}")
        elif kind.startswith("int"):
            least = 0 if name in _MAY_BE_ZERO else 1
            self._rule(
                type(value) is int and value >= least, f"{name} must be an integer of at least {least}; got {value!r}"
            )
        elif kind.startswith("float"):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            self._rule(number and value >= 0, f"{name} must be a number of at least 0; got {value!r}")

    def _check_layers(self) -> None:
        n = self.num_hidden_layers
        self._rule(
            len(self.layer_types) in (0, n),
            f"layer_types must name each of {n} layers; got {len(self.layer_types)}",
        )
        for kind in self.layer_types:
            self._rule(kind in LAYER_TYPES, f"layer_types must be of {', '.join(LAYER_TYPES)}; got {kind!r}")
        self._rule(
            "sliding_attention" not in self.layer_types or self.sliding_window is not None,
            "sliding_attention needs sliding_window; got none",
        )
        outside = [i for i in self.dense_layers if not 0 <= i < n]
        self._rule(not outside, f"dense_layers must lie in 0..{n - 1}; got {outside}")
        if any(not self.has_experts(i) for i in range(n)):
            self._rule(self.intermediate_size is not None, "layers without experts need intermediate_size; got none")

    def _check_experts(self) -> None:
        e, k = self.num_experts, self.num_experts_per_tok
        self._rule(
            self.hidden_act in EXPERT_ACTIVATIONS,
            f"hidden_act of experts must be one of {', '.join(EXPERT_ACTIVATIONS)}; got {self.hidden_act!r}",
        )
        self._rule(1 <= k <= e, f"num_experts_per_tok must be in 1..num_experts={e}; got {k}")
        self._rule(self.moe_intermediate_size is not None, "experts need moe_intermediate_size; got none")
        self._rule(e % self.n_group == 0, f"n_group must divide num_experts; got {self.n_group} and {e}")
        self._rule(
            self.topk_group <= self.n_group,
            f"topk_group must be at most n_group={self.n_group}; got {self.topk_group}",
        )
        within = e // self.n_group * self.topk_group
        self._rule(k <= within, f"num_experts_per_tok must be at most the {within} experts of topk_group; got {k}")

    def _rule(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"DecoderConfig: {rule}.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Channels a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def latent_dims(self) -> tuple[int, int, int]:
        """Channels of a head of latent attention: of keys without and with positions, and of values."""
        return self.qk_nope_head_dim or 0, self.qk_rope_head_dim or 0, self.v_head_dim or 0

    def layer_type(self, layer: int) -> str:
        """One of `LAYER_TYPES`."""
        return self.layer_types[layer] if self.layer_types else "full_attention"

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is made of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers

    @classmethod
    def qwen3_0_6b(cls) -> Self:
        """The configuration of Qwen/Qwen3-0.6B."""
        return cls(family="qwen3", **_QWEN3, hidden_size=1024, num_hidden_layers=28, num_attention_heads=16,
                   num_key_value_heads=8, intermediate_size=3072, tie_word_embeddings=True)  # fmt: skip

    @classmethod
    def qwen3_30b_a3b(cls) -> Self:
        """The configuration of Qwen/Qwen3-30B-A3B."""
        return cls(family="qwen3_moe", **_QWEN3, hidden_size=2048, num_hidden_layers=48,
                   num_attention_heads=32, num_key_value_heads=4, intermediate_size=6144, num_experts=128,
                   num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
                   router_aux_loss_coef=0.001)  # fmt: skip

    @classmethod
    def olmoe_1b_7b(cls) -> Self:
        """The configuration of allenai/OLMoE-1B-7B-0924."""
        return cls(family="olmoe", vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=16,
                   num_key_value_heads=16, max_position_embeddings=4096, norm_eps=1e-5,
                   qk_norm="all", num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024,
                   router_aux_loss_coef=0.01, eos_token_id=50279, pad_token_id=1)  # fmt: skip

    @property
    def formats(self) -> tuple[str, ...]:
        """The checkpoint formats that can hold this configuration."""
        return ("transformers",)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of transformers' config.json.

        Raises:
          ConfigError: fields are missing (all are named), contradict each other, or ask for what the model lacks.
        """
        return cls(**config_file.read(config))

    def to_dict(self, format: str = "transformers") -> dict[str, Any]:
        """Returns the contents of transformers' config.json.

        Raises:
          ConfigError: the family has no word for an option of this model.
        """
        if format != "transformers":
            raise ConfigError(f"DecoderConfig: format must be 'transformers'; got {format!r}.")
        return config_file.write(self)


_QWEN3: dict[str, Any] = {
    "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "qk_norm": True,
    "rope": Rotary(theta=1e6), "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_MAY_BE_ZERO = {"num_experts", "num_experts_per_tok", "bos_token_id", "eos_token_id", "pad_token_id"}

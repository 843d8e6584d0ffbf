"""The mixtures of experts of transformers, small and with random weights."""

import importlib
from typing import Any, NamedTuple

import numpy as np

from tests.oracles import need

D, F = 32, 24
# model_type, class of the block, prefix of the config's class, what differs from the defaults.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "MixtralSparseMoeBlock", "Mixtral", {"num_local_experts": 8, "intermediate_size": F}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2Moe",
        {"num_experts": 16, "moe_intermediate_size": F, "shared_expert_intermediate_size": 40},
    ),
    "qwen2_moe normalised": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2Moe",
        {
            "num_experts": 16,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3Moe",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": F, "norm_topk_prob": True},
    ),
    "olmoe": (
        "olmoe",
        "OlmoeSparseMoeBlock",
        "Olmoe",
        {"num_experts": 16, "num_experts_per_tok": 4, "intermediate_size": F},
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeMoE",
        "GraniteMoe",
        {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": F},
    ),
    "gpt_oss": ("gpt_oss", "GptOssMLP", "GptOss", {"num_local_experts": 8, "intermediate_size": F}),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2",
        {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": F, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v2 groups": (
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2",
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": F,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3",
        {
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": F,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        "Lfm2MoeSparseMoeBlock",
        "Lfm2Moe",
        {"num_experts": 16, "moe_intermediate_size": F, "routed_scaling_factor": 1.5},
    ),
    "longcat_flash": (
        "longcat_flash",
        "LongcatFlashMoE",
        "LongcatFlash",
        {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 4, "expert_ffn_hidden_size": F},
    ),
}


class Family(NamedTuple):
    """A block of transformers.

    Attributes:
      model_type: of its config.
      config: as a dict.
      block: the torch module, float32.
      kernel, bias, selection_bias: names of the router's arrays in the block's state; None where there is none.
    """

    model_type: str
    config: dict[str, Any]
    block: Any
    kernel: str
    bias: str | None
    selection_bias: str | None

    def array(self, name: str) -> np.ndarray:
        """Returns a parameter or buffer of the block."""
        return self.block.state_dict()[name].numpy()

    def has(self, name: str) -> bool:
        return name in self.block.state_dict()

    def route(self, x):
        """Returns their router's (logits, weights, indices) of tokens [t, d]."""
        if self.model_type == "lfm2_moe":
            return self.block.gate(x, self.block.expert_bias)
        return (self.block.gate if hasattr(self.block, "gate") else self.block.router)(x)


def family(name: str, seed: int = 0) -> Family:
    """Builds one of `FAMILIES`."""
    torch, transformers = need("torch", "transformers")
    model_type, block, prefix, options = FAMILIES[name]
    modeling = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    config = getattr(transformers, f"{prefix}Config")(hidden_size=D, experts_implementation="eager", **options)
    torch.manual_seed(seed)
    made = getattr(modeling, block)(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
        for key, buffer in made.named_buffers():
            if "bias" in key:
                buffer.normal_(std=0.2)
    keys = made.state_dict().keys()
    kernel = next(k for k in ("gate.weight", "router.weight", "router.classifier.weight") if k in keys)
    return Family(
        model_type,
        config.to_dict(),
        made,
        kernel,
        next((k for k in keys if k == "router.bias"), None),
        next((k for k in keys if k.endswith(("e_score_correction_bias", "expert_bias"))), None),
    )

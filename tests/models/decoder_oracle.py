"""transformers' decoders beside ours, on the same random weights: what they are and how far apart.

`python -m tests.models.decoder_oracle [CASE ...]` prints the "tested on" table of models/decoder/README.md.
"""

import functools
import platform
import sys
import tempfile
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from portable import models
from portable.checkpoint import tensors_of
from portable.models.decoder import Decoder, weight_map
from tests.oracles import need

BASE = {
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "topk_group": 2,
    "n_group": 4,
}


def _told(key: str, value: Any) -> str:
    return f"rope {value['rope_type']}" if key == "rope_parameters" else f"{key}={value}"


def _rope(kind: str, **options) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **options}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
# Class prefix of transformers, and options that differ from BASE.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, llama3": (
        "Llama",
        {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 12}
        | _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "llama, linear": ("Llama", _rope("linear", factor=3.0)),
    "llama, dynamic": ("Llama", {"max_position_embeddings": 8} | _rope("dynamic", factor=3.0)),
    "llama, yarn": ("Llama", _rope("yarn", **_YARN)),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.5},
    ),
    "lfm2, biases": ("Lfm2", {"full_attn_idxs": [0], "conv_bias": True, "conv_L_cache": 4}),
    "mixtral": ("Mixtral", LOCAL | {"sliding_window": 6}),
    "qwen2_moe": (
        "Qwen2Moe",
        EXPERTS | {"shared_expert_intermediate_size": 20, "mlp_only_layers": [0], "num_key_value_heads": 4},
    ),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"norm_topk_prob": True, "head_dim": 16}),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "clip_qkv": 0.8, "eos_token_id": None}),
    "granitemoe": (
        "GraniteMoe",
        LOCAL
        | {
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.0,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        "GptOss",
        LOCAL | {"head_dim": 8, "sliding_window": 4} | _rope("yarn", **_YARN, truncate=False),
    ),
    "lfm2_moe": (
        "Lfm2Moe",
        EXPERTS | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, "num_hidden_layers": 3},
    ),
    "deepseek_v2": (
        "DeepseekV2",
        LATENT
        | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.7, "n_shared_experts": 2}
        | _rope("yarn", **_YARN, mscale=0.7, mscale_all_dim=0.5),
    ),
    "deepseek_v2, greedy": (
        "DeepseekV2",
        LATENT | {"topk_method": "greedy", "q_lora_rank": None, "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | {"n_shared_experts": 1} | _rope("yarn", **_YARN, mscale_all_dim=1.0)),
    "deepseek_v3, halves": ("DeepseekV3", LATENT | {"rope_interleave": False, "norm_topk_prob": False}),
}
NEW_TOKENS = 32


def relative(got, want) -> float:
    """Returns max|got - want| / max|want|; of zeros (an expert that no token took) max|got|."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / (np.abs(want).max() or 1.0))


@functools.cache
def oracle(name: str) -> Any:
    """Returns transformers' model with every weight moved away from its initial value."""
    torch, transformers = need("torch", "transformers")
    transformers.logging.set_verbosity_error()
    prefix, options = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**BASE | options, attn_implementation="eager")
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if "norm" in key:
                tensor.add_(torch.randn_like(tensor) * 0.2)
            elif "embed" in key or "bias" in key or "sinks" in key:
                tensor.copy_(torch.randn_like(tensor) * 0.5)
            else:  # large enough that tokens vary and no two logits are near a tie
                tensor.copy_(torch.randn_like(tensor) * (1.5 / tensor.shape[-1] ** 0.5))
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def loaded(name: str) -> Decoder:
    """Returns our model, loaded from what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        oracle(name).save_pretrained(folder)
        return models.load(folder)


def tokens(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Returns random ids."""
    return np.random.default_rng(seed).integers(0, BASE["vocab_size"], shape)


def forward(name: str, given: np.ndarray) -> Any:
    """Returns transformers' logits; dynamic frequencies are those of this row, not of a longer one before it."""
    torch = need("torch")
    rotary = getattr(oracle(name).model, "rotary_emb", None)
    if getattr(rotary, "rope_type", "") == "dynamic":
        rotary.inv_freq, rotary.max_seq_len_cached = rotary.original_inv_freq, rotary.original_max_seq_len
    return oracle(name)(torch.tensor(given), use_cache=False).logits


def logits(name: str) -> float:
    """Returns the distance of the logits."""
    torch = need("torch")
    given = tokens((2, 19))
    with torch.no_grad():
        want = forward(name, given).numpy()
    graphdef, state = nnx.split(loaded(name))
    got = jax.jit(lambda state, given: nnx.merge(graphdef, state)(given))(state, jnp.asarray(given))
    return relative(got, want)


def gradients(name: str) -> dict[str, float]:
    """Returns the distance of each parameter's gradient, by transformers' name on disk."""
    torch = need("torch")
    theirs, given = oracle(name), tokens((2, 11), seed=3)
    weights = np.random.default_rng(1).standard_normal((*given.shape, BASE["vocab_size"])).astype(np.float32)
    theirs.zero_grad()
    (forward(name, given) * torch.tensor(weights)).sum().backward()
    kept = {key: p.detach().clone() for key, p in theirs.named_parameters()}
    try:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for p in theirs.parameters():  # written as weights, under the names and in the layouts of files
                p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
            theirs.save_pretrained(folder)
            want = values(models.load(folder))
    finally:
        with torch.no_grad():
            for key, p in theirs.named_parameters():
                p.copy_(kept[key])
    graphdef, params, rest = nnx.split(loaded(name), nnx.Param, ...)

    @jax.jit
    def run(params):
        return jax.grad(lambda params: (nnx.merge(graphdef, params, rest)(given) * weights).sum())(params)

    got = values(nnx.merge(graphdef, run(params), rest))
    return {key: relative(got[key], want[key]) for key in want if not key.endswith(("expert_bias", "correction_bias"))}


def values(model: Decoder) -> dict[str, np.ndarray]:
    """Returns a model's parameters under transformers' names, in its layouts."""
    return {name: source.fetch() for name, source in tensors_of(model, weight_map(model.config)).items()}


def greedy(name: str, prompts: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns transformers' greedy tokens by its own cache, and the smallest lead of a token over the next best."""
    torch = need("torch")
    given = torch.tensor(prompts)
    made = oracle(name).generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits).topk(2).values
    return made.sequences[:, prompts.shape[1] :].numpy(), float((best[..., 0] - best[..., 1]).min())


def table(cases: list[str]) -> str:
    """Returns the table of these cases, or of all, in Markdown, with the versions it was made with."""
    from portable.generation import generate

    need("torch", "transformers")
    rows = ["| model | options | logits | gradients | greedy tokens |", "| --- | --- | --- | --- | --- |"]
    for name in cases or CASES:
        options = CASES[name][1]
        prompts = tokens((2, 7), seed=2)
        want, _ = greedy(name, prompts)
        got = generate(loaded(name), prompts, max_new_tokens=NEW_TOKENS).tokens
        equal = int((got == want).all(0).cumprod().sum())
        sizes = {**LATENT, **EXPERTS, **LOCAL}
        told = ", ".join(_told(key, value) for key, value in options.items() if key not in sizes)
        worst = max(gradients(name).values())
        rows.append(f"| {name} | {told} | {logits(name):.1e} | {worst:.1e} | {equal} of {NEW_TOKENS} |")
        sys.stderr.write(rows[-1] + "\n")
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("transformers", "torch", "jax", "flax"))
    return "\n".join([*rows, "", f"{versions}, {platform.machine()} {jax.default_backend()}."])


if __name__ == "__main__":
    sys.stdout.write(table(sys.argv[1:]) + "\n")

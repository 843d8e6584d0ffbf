"""The contents of transformers' config.json, read into the fields of `DecoderConfig` and written from them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from portable.checks import ConfigError
from portable.models.decoder.families import FAMILIES, REQUIRED, Family, layers
from portable.nn import Rotary
from portable.nn.rotary import KINDS

# Other names under which a key is found: transformers 5 writes the second.
_ALSO = {"num_experts": "num_local_experts", "num_local_experts": "num_experts"}
_YARN_OF_GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
# Keys of rope_parameters by our fields, and the kinds that have them.
_ROPE = {
    "factor": ("factor", ("linear", "dynamic", "yarn", "llama3")),
    "original_length": ("original_max_position_embeddings", ("yarn", "llama3")),
    **{name: (name, ("yarn",)) for name in ("beta_fast", "beta_slow", "truncate", "attention_factor")},
    **{name: (name, ("yarn",)) for name in ("mscale", "mscale_all_dim")},
    **{name: (name, ("llama3",)) for name in ("low_freq_factor", "high_freq_factor")},
}


def read(file: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a `DecoderConfig` from the contents of a config.json."""
    kind = file.get("model_type")
    if kind not in FAMILIES:
        raise ConfigError(f"DecoderConfig: model_type must be one of {', '.join(FAMILIES)}; got {kind!r}.")
    family = FAMILIES[kind]
    if (quantized := file.get("quantization_config")) is not None:
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, Mapping) else quantized
        raise ConfigError(
            f"DecoderConfig: the weights are quantized ({method}), which is not read; save them in bfloat16 first "
            "(transformers: from_pretrained(..., dequantize=True) and save_pretrained)."
        )
    keys = {ours: key if key in file else _ALSO.get(key, key) for ours, (key, _) in family.fields.items()}
    missing = [family.fields[ours][0] for ours, key in keys.items() if key not in file and _default(family, ours)[1]]
    if missing:
        raise ConfigError(f"DecoderConfig: config.json lacks {', '.join(dict.fromkeys(missing))}.")
    fields = {ours: file.get(key, _default(family, ours)[0]) for ours, key in keys.items()}
    fields |= {**family.fixed, **family.read(file), "family": kind, "rope": _read_rope(file, family, kind)}
    d, heads = fields["hidden_size"], fields["num_attention_heads"]
    fields["num_key_value_heads"] = fields["num_key_value_heads"] or heads
    if fields.get("head_dim") is None and "kv_lora_rank" not in fields and type(d) is type(heads) is int:
        fields["head_dim"] = d // heads if heads and d % heads == 0 else None  # what does not fit is told later
    return {name: _frozen(value) for name, value in fields.items()}


def _default(family: Family, ours: str) -> tuple[Any, bool]:
    default = family.fields[ours][1]
    return default, default is REQUIRED


def _read_rope(file: Mapping[str, Any], family: Family, kind: str) -> Rotary:
    given = file.get("rope_scaling") or file.get("rope_parameters")
    if given is None and kind == "gpt_oss":
        given = _YARN_OF_GPT_OSS
    given = dict(given or {})
    if any(isinstance(value, Mapping) for value in given.values()):
        raise ConfigError("DecoderConfig: rotary positions must be the same in all layers; got some for each type.")
    named = given.get("rope_type", given.get("type", "default"))
    if named not in KINDS:
        raise ConfigError(f"DecoderConfig: rope_type must be one of {', '.join(KINDS)}; got {named!r}.")
    for source in (given, file):
        if source.get("partial_rotary_factor", 1) not in (1, None):
            raise ConfigError(
                f"DecoderConfig: {kind} rotates all channels; got partial_rotary_factor="
                f"{source['partial_rotary_factor']}."
            )
    positions = file.get("max_position_embeddings", 2048)
    original = file.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    given["original_max_position_embeddings"] = original or positions
    if named == "yarn" and given.get("factor") is None:
        given["factor"] = positions / given["original_max_position_embeddings"]
    fields = {ours: given[key] for ours, (key, kinds) in _ROPE.items() if named in kinds and given.get(key) is not None}
    if named == "dynamic":  # transformers counts from the file's own length
        fields["original_length"] = positions
    interleaved = kind == "deepseek_v2" or (kind == "deepseek_v3" and file.get("rope_interleave", True))
    theta = given.get("rope_theta") or file.get("rope_theta") or family.theta
    try:
        return Rotary(theta, kind=named, interleaved=interleaved, **fields)
    except ValueError as fault:
        raise ConfigError(f"DecoderConfig: {fault}") from fault


def write(config: Any) -> dict[str, Any]:
    """Returns the contents of a config.json for a `DecoderConfig`."""
    family = FAMILIES[config.family]
    rope: dict[str, Any] = {"rope_type": config.rope.kind, "rope_theta": config.rope.theta}
    for ours, (key, kinds) in _ROPE.items():
        value = getattr(config.rope, ours)
        if config.rope.kind in kinds and value is not None:
            rope[key] = value
    written = {key: _json(getattr(config, ours)) for ours, (key, _) in family.fields.items()}
    # What is None here is not what it would be there.
    written |= {name: value for name, value in _resolved(config).items() if name in family.fields}
    written = {key: value for key, value in written.items() if value is not None or key in _NULLABLE}
    contents = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **written,
        "rope_parameters": rope,
        **({"rope_interleave": config.rope.interleaved} if config.family == "deepseek_v3" else {}),
        **family.write(config),
    }
    back = type(config)(**read(contents))
    lost = [f.name for f in dataclasses.fields(config) if _differ(config, back, f.name)]
    if lost:
        told = ", ".join(f"{name}={getattr(config, name)!r}" for name in lost)
        raise ConfigError(f"DecoderConfig: {config.family} of transformers has no word for {told}.")
    return contents


def _resolved(config: Any) -> dict[str, int]:
    return {"num_key_value_heads": config.kv_heads, "head_dim": config.head_width}


# Where transformers means something else by a missing key than by null.
_NULLABLE = {"q_lora_rank", "bos_token_id", "eos_token_id", "pad_token_id"}


def _differ(one: Any, other: Any, name: str) -> bool:
    if name == "layer_types":
        return layers(one) != layers(other)
    if name == "num_key_value_heads":
        return one.kv_heads != other.kv_heads
    if name == "head_dim":
        return one.kv_lora_rank is None and one.head_width != other.head_width
    if name == "sliding_window" and "sliding_attention" not in one.layer_types:
        return False
    return getattr(one, name) != getattr(other, name)


def _frozen(value: Any) -> Any:
    """Lists, which JSON has, as tuples."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value

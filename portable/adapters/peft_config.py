"""PEFT's adapter_config.json, read and written."""

from collections.abc import Mapping
from typing import Any

from portable.adapters.config import DoRAConfig, LoRAConfig
from portable.checks import ConfigError

# Options with one value that means what is done here; any other is refused by its name.
_ONLY: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "layer_replication": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None, [], {}),
    "ensure_weight_tying": (False, None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}
# What says where an adapter comes from, or holds settings of options that are refused where they are on.
_IGNORED = {"base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version", "auto_mapping"}
_IGNORED |= {"megatron_core", "qalora_group_size", "runtime_config", "eva_config", "lora_dropout", "use_dora"}
_IGNORED |= {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
_IGNORED |= {"modules_to_save", "layers_to_transform", "layers_pattern"}
_TYPES = (
    ("lora_alpha", int | float | None, "a number"),
    ("lora_dropout", int | float | None, "a number"),
    ("rank_pattern", dict | None, "an object"),
    ("alpha_pattern", dict | None, "an object"),
    ("target_modules", list | str | None, "a list or an expression"),
)


def from_peft(given: Mapping[str, Any], source: str = "adapter_config.json") -> LoRAConfig:
    """Returns the configuration that a file holds.

    Raises:
      ConfigError: it lacks the rank, or asks for what is not supported; every such option is named.
    """
    refused = [f"{name}={given[name]!r}" for name, known in _ONLY.items() if name in given and given[name] not in known]
    known = _IGNORED | _ONLY.keys()
    refused += [f"{name}={value!r}" for name, value in given.items() if name not in known and value]
    if refused:
        raise ConfigError(
            f"{source}: these options are not supported: {', '.join(sorted(refused))}. Merge the adapter with PEFT "
            "(merge_and_unload) and load the merged model."
        )
    if "r" not in given:
        raise ConfigError(f"{source} must hold r, the rank; it has {', '.join(sorted(given)) or 'nothing'}.")
    kind = DoRAConfig if given.get("use_dora") else LoRAConfig
    targets = given.get("target_modules")
    for name, types, what in _TYPES:
        if not isinstance(given.get(name, None), types):
            raise ConfigError(f"{source}: {name} must be {what}; got {given[name]!r}.")
    return kind(
        rank=given["r"],
        alpha=8 if given.get("lora_alpha") is None else given["lora_alpha"],
        rslora=bool(given.get("use_rslora")),
        dropout=given.get("lora_dropout") or 0.0,
        rank_pattern=given.get("rank_pattern") or {},
        alpha_pattern=given.get("alpha_pattern") or {},
        target_modules=targets if targets is None or isinstance(targets, str) else tuple(sorted(targets)),
        exclude_modules=given.get("exclude_modules") or None,
        modules_to_save=given.get("modules_to_save") or None,
    )


def to_peft(
    config: LoRAConfig,
    targets: list[str],
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    saved: list[str],
    base_model: str | None,
) -> dict[str, Any]:
    """Returns what adapter_config.json holds.

    Args:
      config: of the adapter.
      targets: modules, by PEFT's names.
      ranks, alphas: of modules that differ from the configuration's own.
      saved: modules trained whole.
      base_model: folder or hub id of the model, or None.
    """

    def plain(alpha: float) -> float:
        return int(alpha) if alpha == int(alpha) else alpha

    return {
        "peft_type": "LORA",
        "auto_mapping": None,
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": plain(config.alpha),
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": isinstance(config, DoRAConfig),
        "rank_pattern": dict(ranks),
        "alpha_pattern": {module: plain(alpha) for module, alpha in alphas.items()},
        "target_modules": targets,
        "target_parameters": None,
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }

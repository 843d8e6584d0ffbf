"""The published routers, as data: arguments of `route` by transformers' `model_type`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_TOP_K = {"top_k": "num_experts_per_tok"}
_NORM = {"renormalize": "norm_topk_prob"}
_SCALING = {"scaling": "routed_scaling_factor"}
_GROUPS = {"groups": "n_group", "group_top_k": "topk_group"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One family's router.

    Attributes:
      options: arguments of `route`, those that a config may change at transformers' defaults.
      config: argument -> key of `config.json` that sets it.
    """

    options: Mapping[str, Any]
    config: Mapping[str, str]


FAMILIES = {
    "mixtral": Family({"top_k": 2, "renormalize": True}, _TOP_K),
    "qwen2_moe": Family({"top_k": 4, "renormalize": False}, _TOP_K | _NORM),
    "qwen3_moe": Family({"top_k": 8, "renormalize": False}, _TOP_K | _NORM),
    "olmoe": Family({"top_k": 8, "renormalize": False}, _TOP_K | _NORM),
    "granitemoe": Family({"top_k": 2, "renormalize": True}, _TOP_K),
    "gpt_oss": Family({"top_k": 4, "renormalize": True}, _TOP_K),
    "deepseek_v2": Family({"scaling": 1.0, "group_score": "max"}, _TOP_K | _SCALING | _GROUPS),
    "deepseek_v3": Family(
        {
            "top_k": 8,
            "score": "sigmoid",
            "renormalize": True,
            "renormalize_eps": 1e-20,
            "groups": 8,
            "group_top_k": 4,
            "group_score": "top2",
            "scaling": 2.5,
        },
        _TOP_K | _NORM | _SCALING | _GROUPS,
    ),
    "lfm2_moe": Family(
        {"top_k": 4, "score": "sigmoid", "renormalize": True, "renormalize_eps": 1e-6, "scaling": 1.0},
        _TOP_K | _NORM | _SCALING,
    ),
    "longcat_flash": Family({"top_k": 12, "scaling": 6.0}, {"top_k": "moe_topk"} | _SCALING),
}
_METHODS = ("greedy", "group_limited_greedy")


def route_options(model_type: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `route` that a published model's `config.json` asks for.

    The bias of the selection, which deepseek_v3, lfm2_moe and longcat_flash have, is a weight and not among them.

    Args:
      model_type: as in the config: mixtral, qwen2_moe, qwen3_moe, olmoe, granitemoe, gpt_oss, deepseek_v2, deepseek_v3,
        lfm2_moe or longcat_flash.
      config: the config's keys; one that is absent or None has transformers' default.

    Returns:
      Keyword arguments of `route`.

    Raises:
      ValueError: the library has no router of that name, or a router's own key has an unknown value or is missing.

    >>> import portable
    >>> portable.ops.route_options("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": True})
    {'top_k': 4, 'renormalize': True}
    """
    if model_type not in FAMILIES:
        raise ValueError(
            f"route_options: there is no router for model_type {model_type!r}; there are: {', '.join(FAMILIES)}."
        )
    family = FAMILIES[model_type]
    options = dict(family.options) | {
        name: config[key] for name, key in family.config.items() if config.get(key) is not None
    }
    score = options.get("score", "softmax")
    if (given := config.get("scoring_func") or score) != score:
        raise ValueError(f"route_options: scoring_func of {model_type} must be {score!r}; got {given!r}.")
    if model_type == "deepseek_v3" and (method := config.get("topk_method") or "noaux_tc") != "noaux_tc":
        raise ValueError(f"route_options: topk_method of deepseek_v3 must be noaux_tc; got {method!r}.")
    if model_type == "deepseek_v2":
        method = config.get("topk_method") or "greedy"
        if method not in _METHODS:
            raise ValueError(f"route_options: topk_method must be one of {', '.join(_METHODS)}; got {method!r}.")
        if method == "greedy":
            options = {k: v for k, v in options.items() if not k.startswith("group")}
    if "top_k" not in options:
        raise ValueError(f"route_options: the config of a {model_type} must have {family.config['top_k']}.")
    return options

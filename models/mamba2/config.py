"""Configuration of Mamba-2 language models, in both formats that published checkpoints use."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from portable.checks import ConfigError
from portable.nn.norm import ACTIVATIONS

# What transformers assumes for a key that its config.json leaves out, where that differs from our default.
_TRANSFORMERS_DEFAULTS = {
    "tie_word_embeddings": False,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
_TRANSFORMERS_NEEDS = [
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "head_dim",
    "state_size",
    "n_groups",
]
# Options that transformers' model lacks. Some of its files name them (Mamba-Codestral's says
# norm_before_gate true), but the model ignores them there, so they are not read either.
_NOT_IN_TRANSFORMERS = {"rms_norm": True, "norm_before_gate": False, "D_has_hdim": False}

# mamba_ssm's names: the model's own keys, then those of the layer, inside `ssm_cfg`.
_STATE_SPACES_MODEL = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layer",
    "residual_in_fp32": "residual_in_fp32",
    "tie_word_embeddings": "tie_embeddings",
    "pad_vocab_size_multiple": "pad_vocab_size_multiple",
}
_STATE_SPACES_LAYER = {
    "head_dim": "headdim",
    "state_size": "d_state",
    "n_groups": "ngroups",
    "expand": "expand",
    "conv_kernel": "d_conv",
    "use_bias": "bias",
    "use_conv_bias": "conv_bias",
    "file_chunk_size": "chunk_size",
    "time_step_limit": "dt_limit",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_init_floor",
    "rms_norm": "rmsnorm",
    "norm_before_gate": "norm_before_gate",
    "D_has_hdim": "D_has_hdim",
    "A_init_range": "A_init_range",
}
# mamba_ssm fixes these in code and knows no key for them; they are written only where they differ.
_STATE_SPACES_EXTRA = {
    "layer_norm_epsilon": 1e-5,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rescale_prenorm_residual": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Options of mamba_ssm's layer that choose kernels or devices and change no result; d_ssm is checked apart.
_STATE_SPACES_IGNORED = {
    "layer",
    "d_ssm",
    "conv_init",
    "use_mem_eff_path",
    "process_group",
    "sequence_parallel",
    "layer_idx",
    "device",
    "dtype",
}


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of a Mamba-2 language model (arXiv:2405.21060), named as in transformers.

    Attributes:
      vocab_size: tokens the tokenizer knows; the embedding has `padded_vocab_size` rows.
      hidden_size: d, width of the residual stream.
      num_hidden_layers: blocks.
      num_heads: h; `num_heads * head_dim == expand * hidden_size`.
      head_dim: p.
      state_size: n.
      n_groups: g, heads of a group share B and C; divides `num_heads`.
      expand: inner width over `hidden_size`.
      conv_kernel: k, taps of the causal convolution.
      chunk_size: tokens a chunk of the scan holds here; None lets the op choose for the platform. It
        changes speed and rounding, not the result.
      file_chunk_size: the chunk size of the checkpoint's config file, kept only to write it back.
      layer_norm_epsilon: of all norms.
      use_bias: biases on the input and output projections.
      use_conv_bias: bias on the convolution.
      hidden_act: activation after the convolution.
      residual_in_fp32: the residual stream is float32 whatever the compute dtype.
      tie_word_embeddings: the head is the embedding, transposed.
      time_step_limit: dt is clamped to this after softplus.
      time_step_min, time_step_max, time_step_floor: of dt at initialisation.
      initializer_range: standard deviation of the embedding at initialisation.
      rescale_prenorm_residual: divide output projections by sqrt(num_hidden_layers) at initialisation.
      rms_norm: gated RMSNorm before the output projection; False: only the gate, y * silu(z).
      norm_before_gate: norm(y) * silu(z) instead of norm(y * silu(z)).
      D_has_hdim: one skip weight D per channel instead of one per head.
      A_init_range: -A is drawn uniformly from this at initialisation.
      pad_vocab_size_multiple: the embedding's rows are a multiple of this.
      bos_token_id, eos_token_id, pad_token_id: of the tokenizer; None where unknown.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int = 64
    state_size: int = 128
    n_groups: int = 1
    expand: int = 2
    conv_kernel: int = 4
    chunk_size: int | None = None
    file_chunk_size: int = 256
    layer_norm_epsilon: float = 1e-5
    use_bias: bool = False
    use_conv_bias: bool = True
    hidden_act: str = "silu"
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.1
    rescale_prenorm_residual: bool = False
    rms_norm: bool = True
    norm_before_gate: bool = False
    D_has_hdim: bool = False
    A_init_range: tuple[float, float] = (1.0, 16.0)
    pad_vocab_size_multiple: int = 1
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.name == "chunk_size" and value is not None):
                _check_count(field.name, value)
            elif field.type is bool and not isinstance(value, bool):
                raise ConfigError(f"Mamba2Config: {field.name} must be true or false, got {value!r}.")
            elif field.type is float and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise ConfigError(f"Mamba2Config: {field.name} must be a number of at least 0, got {value!r}.")
        if self.num_heads * self.head_dim != self.expand * self.hidden_size:
            raise ConfigError(
                f"Mamba2Config: num_heads * head_dim must equal expand * hidden_size; got {self.num_heads} * "
                f"{self.head_dim} and {self.expand} * {self.hidden_size}."
            )
        if self.num_heads % self.n_groups:
            raise ConfigError(
                f"Mamba2Config: n_groups must divide num_heads; got n_groups={self.n_groups}, "
                f"num_heads={self.num_heads}."
            )
        for name in ("time_step_limit", "A_init_range"):
            _check_range(name, getattr(self, name))
        if self.hidden_act not in ACTIVATIONS:
            raise ConfigError(
                f"Mamba2Config: hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}."
            )
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(self, name)
            several = name == "eos_token_id" and isinstance(value, tuple)
            if not all(i is None or type(i) is int for i in (value if several else (value,))):
                raise ConfigError(f"Mamba2Config: {name} must be a token id or null; got {value!r}.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, columns of the logits: `vocab_size` rounded up to the multiple."""
        return -(-self.vocab_size // self.pad_vocab_size_multiple) * self.pad_vocab_size_multiple

    @property
    def formats(self) -> tuple[str, ...]:
        """The checkpoint formats that can hold this configuration, the preferred one first."""
        return ("state-spaces",) if self._unknown_to_transformers() else ("transformers", "state-spaces")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of a config.json, of transformers or of state-spaces (mamba_ssm).

        Raises:
          ConfigError: fields are missing (all are named), contradict each other, or ask for what the model
            lacks.
        """
        config = {key: _plain(value) for key, value in config.items()}
        if "d_model" in config and "hidden_size" not in config:
            return cls(**_from_state_spaces(config))
        return cls(**_from_transformers(config))

    def to_dict(self, format: str = "transformers") -> dict[str, Any]:
        """Returns the contents of a config.json in `format`, "transformers" or "state-spaces".

        Raises:
          ConfigError: transformers has no key for an option of this model (`formats` says so beforehand).
        """
        if format == "state-spaces":
            return _to_state_spaces(self)
        if format != "transformers":
            raise ConfigError(f"Mamba2Config: format must be 'transformers' or 'state-spaces', got {format!r}.")
        if unknown := self._unknown_to_transformers():
            raise ConfigError(
                f"Mamba2Config: transformers' Mamba2 has no {', '.join(unknown)}; use format 'state-spaces'."
            )
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            **{name: _json(getattr(self, name)) for name in _transformers_fields()},
            "vocab_size": self.padded_vocab_size,
            **self._padding(),
            "chunk_size": self.file_chunk_size,
            # It concerns initialisation alone, but transformers 5 also divides the weights it loads where it is true.
            "rescale_prenorm_residual": False,
        }

    def _padding(self) -> dict[str, int]:
        """What transformers has no word for; it passes over keys that it does not know."""
        if self.vocab_size == self.padded_vocab_size:
            return {}
        return {"unpadded_vocab_size": self.vocab_size, "pad_vocab_size_multiple": self.pad_vocab_size_multiple}

    def _unknown_to_transformers(self) -> list[str]:
        changed = ((name, getattr(self, name)) for name in _NOT_IN_TRANSFORMERS)
        return [f"{name}={value}" for name, value in changed if value != _NOT_IN_TRANSFORMERS[name]]

    @classmethod
    def _published(cls, hidden_size: int, num_hidden_layers: int) -> Self:
        return cls(
            vocab_size=50277,
            pad_vocab_size_multiple=16,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_heads=hidden_size // 32,
            initializer_range=0.02,
            rescale_prenorm_residual=True,
        )

    @classmethod
    def mamba2_130m(cls) -> Self:
        """The configuration of state-spaces/mamba2-130m."""
        return cls._published(768, 24)

    @classmethod
    def mamba2_370m(cls) -> Self:
        """The configuration of state-spaces/mamba2-370m."""
        return cls._published(1024, 48)

    @classmethod
    def mamba2_780m(cls) -> Self:
        """The configuration of state-spaces/mamba2-780m."""
        return cls._published(1536, 48)

    @classmethod
    def mamba2_1_3b(cls) -> Self:
        """The configuration of state-spaces/mamba2-1.3b."""
        return cls._published(2048, 48)

    @classmethod
    def mamba2_2_7b(cls) -> Self:
        """The configuration of state-spaces/mamba2-2.7b."""
        return cls._published(2560, 64)


def _transformers_fields() -> list[str]:
    """The fields that mean the same under the same name in transformers' config.json."""
    ours = {"chunk_size", "file_chunk_size", "A_init_range", "pad_vocab_size_multiple", *_NOT_IN_TRANSFORMERS}
    return [f.name for f in dataclasses.fields(Mamba2Config) if f.name not in ours]


def _from_transformers(config: dict[str, Any]) -> dict[str, Any]:
    _check_present(config, _TRANSFORMERS_NEEDS)
    fields = {name: config[name] for name in _transformers_fields() if name in config}
    if (real := config.get("unpadded_vocab_size")) is not None:
        multiple = config.get("pad_vocab_size_multiple", 1)
        for name, count in {"unpadded_vocab_size": real, "pad_vocab_size_multiple": multiple}.items():
            _check_count(name, count)
        if -(-real // multiple) * multiple != fields["vocab_size"]:
            raise ConfigError(
                f"Mamba2Config: vocab_size must be unpadded_vocab_size {real} rounded up to a multiple of {multiple}; "
                f"got {fields['vocab_size']}."
            )
        fields |= {"vocab_size": real, "pad_vocab_size_multiple": multiple}
    return {**_TRANSFORMERS_DEFAULTS, **fields, "file_chunk_size": config.get("chunk_size", 256)}


def _from_state_spaces(config: dict[str, Any]) -> dict[str, Any]:
    _check_present(config, ("vocab_size", "d_model", "n_layer"))
    layer = config.get("ssm_cfg") or {}
    if not isinstance(layer, Mapping):
        raise ConfigError(f"Mamba2Config: ssm_cfg must hold options by name; got {layer!r}.")
    layer = {key: _plain(value) for key, value in layer.items()}
    if unknown := layer.keys() - set(_STATE_SPACES_LAYER.values()) - _STATE_SPACES_IGNORED:
        raise ConfigError(f"Mamba2Config: ssm_cfg has options this model does not know: {', '.join(sorted(unknown))}.")
    for name, count in {"d_model": config["d_model"], "expand": (expand := layer.get("expand", 2))}.items():
        _check_count(name, count)
    width = expand * config["d_model"]
    lacking = {
        "a LayerNorm between blocks (rms_norm false)": not config.get("rms_norm", True),
        "an MLP after each mixer (d_intermediate)": config.get("d_intermediate"),
        "attention layers (attn_layer_idx)": config.get("attn_layer_idx"),
        "a gated MLP inside the mixer (d_ssm)": layer.get("d_ssm") not in (None, width),
    }
    if asked := [what for what, there in lacking.items() if there]:
        raise ConfigError(f"Mamba2Config: the config file asks for {', '.join(asked)}, which this model has not.")
    fields = {ours: layer[theirs] for ours, theirs in _STATE_SPACES_LAYER.items() if theirs in layer}
    fields |= {ours: config[theirs] for ours, theirs in _STATE_SPACES_MODEL.items() if theirs in config}
    fields |= {name: config.get(name, fixed) for name, fixed in _STATE_SPACES_EXTRA.items()}
    fields.setdefault("pad_vocab_size_multiple", 8)
    _check_count("headdim", head_dim := layer.get("headdim", 64))
    return {**fields, "num_heads": width // head_dim}


def _to_state_spaces(config: Mamba2Config) -> dict[str, Any]:
    defaults = {f.name: f.default for f in dataclasses.fields(config)}  # the same as mamba_ssm's
    layer = {theirs: ours for ours, theirs in _STATE_SPACES_LAYER.items() if getattr(config, ours) != defaults[ours]}
    extra = {name: getattr(config, name) for name in _STATE_SPACES_EXTRA}
    return {
        **{theirs: getattr(config, ours) for ours, theirs in _STATE_SPACES_MODEL.items()},
        "d_intermediate": 0,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "fused_add_norm": True,
        "ssm_cfg": {
            "layer": "Mamba2",
            **{theirs: _json(getattr(config, ours)) for theirs, ours in layer.items()},
        },
        **{name: _json(value) for name, value in extra.items() if value != _STATE_SPACES_EXTRA[name]},
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: transformers 5 writes {"__float__": "Infinity"}, others a string."""
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        return float(value["__float__"])
    if value in ("Infinity", "-Infinity"):
        return float(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(_plain(v) for v in value)
    return value


def _json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": str(value).replace("inf", "Infinity")}
    if isinstance(value, tuple):
        return [_json(v) for v in value]
    return value


def _check_present(config: Mapping[str, Any], needed: Sequence[str]) -> None:
    if missing := [name for name in needed if config.get(name) is None]:
        raise ConfigError(
            f"Mamba2Config: the config file lacks {', '.join(missing)}; "
            f"it has {', '.join(sorted(config)) or 'nothing'}."
        )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"Mamba2Config: {name} must be an integer of at least 1, got {value!r}.")


def _check_range(name: str, value: Any) -> None:
    pair = isinstance(value, tuple) and len(value) == 2
    if not pair or not all(isinstance(v, int | float) for v in value) or not 0 <= value[0] <= value[1]:
        raise ConfigError(f"Mamba2Config: {name} must be (low, high) with 0 <= low <= high, got {value!r}.")

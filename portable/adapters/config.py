"""What is adapted and how, in PEFT's vocabulary: LoRA, rsLoRA, DoRA, S2FT and ESFT as configurations of one thing."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from portable.checks import ConfigError
from portable.ops._dora_linear.api import DROPOUTS, NORMS

INITS = ("peft", "gaussian", "random")
_Names = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which modules get an adapter; the base of every configuration.

    Names are dotted paths of the model, or of its checkpoint where it has one ("layers.0.mixer.query" is also
    "model.layers.0.self_attn.q_proj"); what is a name of both is the model's. The matrices of experts count as modules:
    "layers.0.mlp.up".

    Attributes:
      target_modules: a regular expression that matches a whole name; or names, each of which ends one ("q_proj");
        "all-linear" for every linear layer but those into a vocabulary.
      exclude_modules: the same, of names that get none. modules_to_save: ends of names of modules that are trained
        whole, beside the adapter.
      layers_to_transform: numbers of layers, the first number in a name, to which a list of targets, or all-linear, is
        limited.
      layers_pattern: the name in front of that number, or several; None for any.
      adapter_dtype: of what is trained.
    """

    target_modules: _Names = None
    exclude_modules: _Names = None
    modules_to_save: _Names = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: _Names = None
    adapter_dtype: Any = jnp.float32

    def __post_init__(self):
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern", "layers_to_transform"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str | int):
                object.__setattr__(self, name, tuple(value))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str) and value != "all-linear":
                _check_pattern(type(self).__name__, name, value)
        expression = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if expression and self.layers_to_transform is not None:
            raise ConfigError(
                f"{type(self).__name__}: layers_to_transform goes with a list of target_modules; got the expression "
                f"{self.target_modules!r}, which can name the layers itself."
            )
        object.__setattr__(self, "adapter_dtype", jnp.dtype(self.adapter_dtype))
        if not jnp.issubdtype(self.adapter_dtype, jnp.floating):
            raise ConfigError(f"{type(self).__name__}: adapter_dtype must be floating; got {self.adapter_dtype}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig(AdapterConfig):
    """LoRA (arXiv:2106.09685): W + scale * A B.

    Attributes:
      rank: of A and B. alpha: scale is alpha / rank, or alpha / sqrt(rank) with rslora (arXiv:2312.03732).
      rank_pattern, alpha_pattern: other ranks and alphas by an expression that ends a name.
      dropout: share of a layer's inputs dropped in training (`portable.adapters.dropping`).
      dropout_mode: of `portable.ops.dora_linear`.
      init: "peft" draws A uniformly in +-1/sqrt(d) and B zero (an embedding's the other way round, B normal),
        "gaussian" draws A with deviation 1/rank, "random" draws B too.
    """

    rank: int = 8
    alpha: float = 8
    rslora: bool = False
    rank_pattern: Any = ()
    alpha_pattern: Any = ()
    dropout: float = 0.0
    dropout_mode: str = "peft"
    init: str = "peft"

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        for field in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, field)
            pairs = tuple(value.items() if isinstance(value, Mapping) else value or ())
            if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
                raise ConfigError(f"{name}: {field} must be {{name: number}}; got {value!r}.")
            for pattern, _ in pairs:
                _check_pattern(name, field, pattern)
            object.__setattr__(self, field, pairs)
        for rank in (self.rank, *(rank for _, rank in self.rank_pattern)):
            if not _is(rank, int) or rank < 1:
                raise ConfigError(f"{name}: a rank must be a positive integer; got {rank!r}.")
        for alpha in (self.alpha, *(alpha for _, alpha in self.alpha_pattern)):
            if not _is(alpha, int, float) or not math.isfinite(alpha):
                raise ConfigError(f"{name}: an alpha must be a finite number; got {alpha!r}.")
        if not _is(self.dropout, int, float) or not 0 <= self.dropout < 1:
            raise ConfigError(f"{name}: dropout must lie in [0, 1); got {self.dropout}.")
        for field, known in (("dropout_mode", DROPOUTS), ("init", INITS)):
            if getattr(self, field) not in known:
                raise ConfigError(f"{name}: {field} must be one of {', '.join(known)}; got {getattr(self, field)!r}.")

    def rank_of(self, *names: str) -> int:
        """Returns the rank of a module by its names."""
        return _of_pattern(self.rank_pattern, names, self.rank)

    def alpha_of(self, *names: str) -> float:
        """Returns the alpha of a module by its names."""
        return _of_pattern(self.alpha_pattern, names, self.alpha)

    def scale(self, rank: int, alpha: float) -> float:
        """Returns what multiplies A B."""
        return alpha / rank**0.5 if self.rslora else alpha / rank


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRAConfig(LoRAConfig):
    """DoRA (arXiv:2402.09353): m * (W + scale * A B) / ||W + scale * A B||, by output channel.

    Attributes:
      norm, detach: of `portable.ops.dora_linear`.
    """

    norm: str = "auto"
    detach: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in NORMS:
            raise ConfigError(f"DoRAConfig: norm must be one of {', '.join(NORMS)}; got {self.norm!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class S2FTConfig(AdapterConfig):
    """S2FT (arXiv:2412.06289): some channels, chosen at random, of a weight are trained densely.

    Attributes:
      channels: how many. side: "in" trains rows of W [d, o], as of an output or down projection; "out" columns.
    """

    channels: int = 8
    side: str = "in"

    def __post_init__(self):
        super().__post_init__()
        if not _is(self.channels, int) or self.channels < 1:
            raise ConfigError(f"S2FTConfig: channels must be a positive integer; got {self.channels!r}.")
        if self.side not in ("in", "out"):
            raise ConfigError(f"S2FTConfig: side must be in or out; got {self.side!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESFTConfig(AdapterConfig):
    """ESFT (arXiv:2407.01906): chosen experts of each layer are trained whole.

    Attributes:
      experts: numbers of experts, the same in every layer; or {expression that ends a layer's name: numbers}.
    """

    experts: Any = ()

    def __post_init__(self):
        super().__post_init__()
        given = self.experts
        if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
            raise ConfigError(f"ESFTConfig: experts must be numbers, or {{name: numbers}}; got {given!r}.")
        pairs = (
            tuple((p, tuple(e)) for p, e in given.items()) if isinstance(given, Mapping) else ((".*", tuple(given)),)
        )
        for pattern, numbers in pairs:
            _check_pattern("ESFTConfig", "experts", pattern)
            if not numbers or len(set(numbers)) < len(numbers) or any(not _is(n, int) or n < 0 for n in numbers):
                raise ConfigError(f"ESFTConfig: experts must be distinct numbers, at least one; got {list(numbers)}.")
        object.__setattr__(self, "experts", pairs)

    def experts_of(self, *names: str) -> tuple[int, ...]:
        """Returns the experts of a layer by its names; none where no expression matches."""
        return _of_pattern(self.experts, names, ())


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def ends(pattern: str, name: str) -> bool:
    """Returns whether an expression matches a name, or what is behind one of its dots."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def _of_pattern(pairs: Sequence[tuple[str, Any]], names: Sequence[str], default: Any) -> Any:
    return next((value for pattern, value in pairs if any(ends(pattern, name) for name in names)), default)


def _check_pattern(config: str, field: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as fault:
        raise ConfigError(f"{config}: {field} has {pattern!r}, which is no regular expression ({fault}).") from None

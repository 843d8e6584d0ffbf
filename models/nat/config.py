"""Configuration of NAT and DiNAT, as transformers' config.json has it."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

from portable.checks import ConfigError
from portable.nn.norm import ACTIVATIONS

_STRIDES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


@dataclasses.dataclass(frozen=True)
class NATConfig:
    """Sizes and options of an image model of neighborhood attention, named as in transformers.

    Attributes:
      embed_dim: channels of the first level; each further level doubles them and halves the image.
      depths: blocks of each level.
      num_heads: heads of each level's attention; they divide its channels.
      kernel_size: the window, the same on both axes; odd.
      dilations: of each block of each level; None where all are 1 (NAT).
      patch_size: pixels a position of the first level stands for: 4 as published, 2 or 1 for small images.
      num_channels: of the image.
      num_labels: classes; 0 for a model without a head.
      labels: names of the classes, or empty.
      mlp_ratio: width of the hidden layer over the channels.
      qkv_bias: biases on the projections of queries, keys and values.
      hidden_act: activation of the hidden layer.
      layer_norm_eps: of the blocks' norms and the last one. The norms after convolutions have 1e-5, as everywhere.
      layer_scale_init_value: start of the learned factors on each branch; 0 for none.
      drop_path_rate: in training, how often the last block's branches are dropped for an image; earlier ones in
        proportion.
      initializer_range: standard deviation of kernels at initialisation.
    """

    embed_dim: int = 64
    depths: tuple[int, ...] = (3, 4, 6, 5)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    dilations: tuple[tuple[int, ...], ...] | None = None
    patch_size: int = 4
    num_channels: int = 3
    num_labels: int = 1000
    labels: tuple[str, ...] = ()
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    layer_scale_init_value: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self):
        counts = {"embed_dim": self.embed_dim, "kernel_size": self.kernel_size, "num_channels": self.num_channels}
        counts |= {f"{name}[{i}]": n for name in ("depths", "num_heads") for i, n in enumerate(getattr(self, name))}
        counts |= {f"dilations[{i}][{j}]": n for i, row in enumerate(self.dilations or ()) for j, n in enumerate(row)}
        for name, value in counts.items():
            self._rule(type(value) is int and value > 0, f"{name} must be a positive integer; got {value!r}")
        self._rule(bool(self.depths), "depths must name at least one level; got none")
        self._rule(
            len(self.num_heads) == len(self.depths),
            f"num_heads must have one entry for each of {len(self.depths)} levels; got {list(self.num_heads)}",
        )
        self._rule(self.embed_dim % 2 == 0, f"embed_dim must be even; got {self.embed_dim}")
        self._rule(self.kernel_size % 2 == 1, f"kernel_size must be odd; got {self.kernel_size}")
        self._rule(self.patch_size in _STRIDES, f"patch_size must be 4, 2 or 1; got {self.patch_size!r}")
        for i, heads in enumerate(self.num_heads):
            self._rule(
                self.width(i) % heads == 0,
                f"num_heads[{i}] must divide the level's {self.width(i)} channels; got {heads}",
            )
        lengths = tuple(len(row) for row in self.dilations or ())
        self._rule(
            self.dilations is None or lengths == tuple(self.depths),
            f"dilations must have one entry for each block, {list(self.depths)} by level; got {list(lengths)}",
        )
        self._rule(
            self.hidden_act in ACTIVATIONS,
            f"hidden_act must be one of {', '.join(ACTIVATIONS)}; got {self.hidden_act!r}",
        )
        for name in ("mlp_ratio", "layer_norm_eps", "layer_scale_init_value", "drop_path_rate", "initializer_range"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            self._rule(number and value >= 0, f"{name} must be a number of at least 0; got {value!r}")
        self._rule(self.drop_path_rate < 1, f"drop_path_rate must be below 1; got {self.drop_path_rate}")
        self._rule(int(self.mlp_ratio * self.embed_dim) > 0, f"mlp_ratio leaves no hidden layer; got {self.mlp_ratio}")
        self._rule(
            type(self.num_labels) is int and self.num_labels >= 0,
            f"num_labels must be an integer of at least 0; got {self.num_labels!r}",
        )
        self._rule(
            len(self.labels) in (0, self.num_labels),
            f"labels must name each of {self.num_labels} classes or none; got {len(self.labels)}",
        )

    def _rule(self, holds: bool, rule: str) -> None:
        if not holds:
            raise ConfigError(f"NATConfig: {rule}.")

    def width(self, level: int) -> int:
        """Channels of a level."""
        return self.embed_dim * 2**level

    def dilation(self, level: int, block: int) -> int:
        """Dilation of a block."""
        return 1 if self.dilations is None else self.dilations[level][block]

    @property
    def stem_strides(self) -> tuple[int, int]:
        """Strides of the two convolutions before the first level."""
        return _STRIDES[self.patch_size]

    @property
    def kind(self) -> str:
        """ "dinat" where dilations are given, else "nat"."""
        return "nat" if self.dilations is None else "dinat"

    @property
    def formats(self) -> tuple[str, ...]:
        """The checkpoint formats that can hold this configuration, the preferred one first."""
        return ("transformers", "shi-labs") if self.patch_size == 4 else ("shi-labs",)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads the contents of transformers' config.json, of model type "nat" or "dinat".

        Raises:
          ConfigError: a field is missing, contradicts another, or asks for what the model lacks.
        """
        if missing := [name for name in ("embed_dim", "depths", "num_heads", "kernel_size") if name not in config]:
            raise ConfigError(f"NATConfig: config.json lacks {', '.join(missing)}.")
        names = {f.name for f in dataclasses.fields(cls)} - {"labels", "num_labels"}
        fields = {name: _frozen(config[name]) for name in names if name in config}
        if isinstance(fields.get("patch_size"), tuple):
            sizes = set(fields["patch_size"])
            cls._rule_size(sizes)
            (fields["patch_size"],) = sizes
        if config.get("model_type") == "nat":
            fields["dilations"] = None
        elif fields.get("dilations") is None:
            fields["dilations"] = ((1, 8, 1), (1, 4, 1, 4), (1, 2, 1, 2, 1, 2), (1, 1, 1, 1, 1))  # transformers' own
        if not any("Classification" in str(name) for name in config.get("architectures") or ["Classification"]):
            return cls(**fields, num_labels=0)
        named = config.get("id2label")
        if named is None:
            return cls(**fields, num_labels=config.get("num_labels", 2))
        if not isinstance(named, Mapping):
            raise ConfigError(f"NATConfig: id2label must map numbers to names; got {named!r}.")
        order = {str(key): str(value) for key, value in named.items()}
        if set(order) != {str(i) for i in range(len(order))}:
            raise ConfigError(f"NATConfig: id2label must number its {len(order)} classes from 0; got {list(order)}.")
        return cls(**fields, num_labels=len(order), labels=tuple(order[str(i)] for i in range(len(order))))

    @classmethod
    def _rule_size(cls, sizes: set) -> None:
        if len(sizes) != 1:
            raise ConfigError(f"NATConfig: patch_size must be the same on both axes; got {sorted(sizes)}.")

    def to_dict(self, format: str = "transformers") -> dict[str, Any]:
        """Returns the contents of a config.json; "shi-labs" has none of its own and gets the same.

        Raises:
          ConfigError: transformers cannot hold this model.
        """
        if format not in ("transformers", "shi-labs"):
            raise ConfigError(f"NATConfig: format must be 'transformers' or 'shi-labs'; got {format!r}.")
        if format not in self.formats:
            raise ConfigError(
                f"NATConfig: transformers' model has patches of 4 alone; got patch_size={self.patch_size}. Use format "
                "'shi-labs'."
            )
        fields = dataclasses.asdict(self)
        del fields["labels"], fields["num_labels"]
        if self.dilations is None:
            del fields["dilations"]
        names = self.labels or [f"LABEL_{i}" for i in range(self.num_labels)]
        title = self.kind.capitalize()
        return {
            "architectures": [f"{title}ForImageClassification" if self.num_labels else f"{title}Model"],
            "model_type": self.kind,
            **{name: _json(value) for name, value in fields.items()},
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
        }

    @classmethod
    def _published(cls, embed_dim: int, heads: int, dilated: int, **options) -> Self:
        """Args: dilated: the largest dilation of each level, 8 for images of 224; 0 for NAT."""
        depths = (3, 4, options.pop("blocks", 18), 5)
        tops = (dilated, dilated // 2, dilated // 4, 1)
        rows = tuple(tuple(top if i % 2 else 1 for i in range(n)) for n, top in zip(depths, tops, strict=True))
        return cls(
            embed_dim=embed_dim,
            depths=depths,
            num_heads=tuple(heads * 2**i for i in range(4)),
            dilations=rows if dilated else None,
            **options,
        )

    @classmethod
    def nat_mini(cls) -> Self:
        """The configuration of shi-labs/nat-mini-in1k-224."""
        return cls._published(64, 2, 0, blocks=6, drop_path_rate=0.2)

    @classmethod
    def nat_tiny(cls) -> Self:
        """The configuration of shi-labs/nat-tiny-in1k-224."""
        return cls._published(64, 2, 0, drop_path_rate=0.2)

    @classmethod
    def nat_small(cls) -> Self:
        """The configuration of shi-labs/nat-small-in1k-224."""
        return cls._published(96, 3, 0, mlp_ratio=2.0, layer_scale_init_value=1e-5, drop_path_rate=0.3)

    @classmethod
    def nat_base(cls) -> Self:
        """The configuration of shi-labs/nat-base-in1k-224."""
        return cls._published(128, 4, 0, mlp_ratio=2.0, layer_scale_init_value=1e-5, drop_path_rate=0.5)

    @classmethod
    def dinat_mini(cls) -> Self:
        """The configuration of shi-labs/dinat-mini-in1k-224."""
        return cls._published(64, 2, 8, blocks=6, drop_path_rate=0.2)

    @classmethod
    def dinat_tiny(cls) -> Self:
        """The configuration of shi-labs/dinat-tiny-in1k-224."""
        return cls._published(64, 2, 8, drop_path_rate=0.2)

    @classmethod
    def dinat_small(cls) -> Self:
        """The configuration of shi-labs/dinat-small-in1k-224."""
        return cls._published(96, 3, 8, mlp_ratio=2.0, drop_path_rate=0.3)

    @classmethod
    def dinat_base(cls) -> Self:
        """The configuration of shi-labs/dinat-base-in1k-224."""
        return cls._published(128, 4, 8, mlp_ratio=2.0, layer_scale_init_value=1e-5, drop_path_rate=0.5)

    @classmethod
    def dinat_large(cls) -> Self:
        """The configuration of shi-labs/dinat-large-in22k-in1k-224."""
        return cls._published(192, 6, 8, mlp_ratio=2.0, drop_path_rate=0.35)

    @classmethod
    def dinat_large_384(cls) -> Self:
        """The configuration of shi-labs/dinat-large-in22k-in1k-384."""
        return cls._published(192, 6, 13, mlp_ratio=2.0, drop_path_rate=0.35)

    @classmethod
    def dinat_large_384_11x11(cls) -> Self:
        """The configuration of shi-labs/dinat-large-11x11-in22k-in1k-384."""
        return cls._published(192, 6, 8, kernel_size=11, mlp_ratio=2.0, drop_path_rate=0.35)

    @classmethod
    def dinat_large_in22k(cls) -> Self:
        """The configuration of shi-labs/dinat-large-in22k-224."""
        return cls._published(192, 6, 8, mlp_ratio=2.0, drop_path_rate=0.2, num_labels=21841)

    @classmethod
    def digits_dinat(cls) -> Self:
        """The configuration that `portable train digits --task image` makes for scikit-learn's 8 x 8 digits."""
        return cls(
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
            kernel_size=3,
            dilations=((1, 2), (1, 1)),
            patch_size=1,
            num_channels=1,
            num_labels=10,
            labels=tuple("0123456789"),
            mlp_ratio=2.0,
            drop_path_rate=0.1,
            initializer_range=0.1,
        )


def _frozen(value: Any) -> Any:
    """Lists, which JSON has, as tuples."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(_frozen, value))
    return value


def _json(value: Any) -> Any:
    return [_json(entry) for entry in value] if isinstance(value, tuple) else value

"""Models with published weights: `load` reads a folder or a hub id, `save` writes what others read back."""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from portable import checkpoint, nn
from portable.checkpoint import WeightMap
from portable.checks import CheckpointError, ConfigError
from portable.models import decoder, mamba2, nat


class Family(NamedTuple):
    """A kind of model: how its config.json is read, what is built from it, and where its weights lie.

    Attributes:
      config: dataclass with `from_dict`, `to_dict(format)` and `formats`, the formats that can hold it.
      model: module built by `model(config, dtype=, param_dtype=, rngs=)`, which keeps `config`.
      weight_map: (format, config) -> the rules.
      format_of: tensors' names -> the format they are in, where a file is read; raises on what is none.
    """

    config: Any
    model: Any
    weight_map: Callable[[str, Any], WeightMap]
    format_of: Callable[[Iterable[str]], str] = lambda tensors: "transformers"


# A small byte-level Mamba-2 that comes with the package, trained by scripts/train_default.py.
EMBEDDED = Path(__file__).parent.parent / "assets" / "default"
# By the model_type of config.json.
MODELS: dict[str, Family] = {
    "mamba2": Family(mamba2.Mamba2Config, mamba2.Mamba2LM, lambda format, config: mamba2.weight_map(format)),
    **dict.fromkeys(
        ("nat", "dinat"),
        Family(nat.NATConfig, nat.NAT, lambda format, config: nat.weight_map(format, config.kind), nat.format_of),
    ),
    **dict.fromkeys(
        decoder.FAMILIES,
        Family(
            decoder.DecoderConfig,
            decoder.Decoder,
            lambda format, config: decoder.weight_map(config),
            decoder.check_tensors,
        ),
    ),
}


def decoders() -> dict[str, Family]:
    """Returns those of `MODELS` that read and write tokens."""
    return {kind: family for kind, family in MODELS.items() if hasattr(family.model, "prefill")}


def load(
    folder_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    compute_dtype: Any = None,
    strict: bool = True,
) -> Any:
    """Loads a model from safetensors, in transformers' format or in the original of its authors.

    Nothing is initialised that the files hold: arrays go to the device one by one, so that memory peaks
    little above the weights themselves.

    Args:
      folder_or_hub_id: a folder with config.json and model.safetensors (or its shards and their index), or
        "owner/name" on the Hugging Face hub, which needs `pip install 'portable-jax[hf]'`.
      dtype: of all parameters; None keeps each as it is in the file.
      compute_dtype: of the computation; None means that of the parameters.
      strict: False warns of missing and unexpected tensors instead of raising; missing ones are random.

    Returns:
      The model, of the class that `MODELS` names for the file's model type.

    Raises:
      CheckpointError: the files are missing, damaged, pickled, or do not fit the model; every tensor that
        does not fit is named with the shape expected and the shape got.
      ConfigError: config.json lacks fields, or asks for what the model lacks.
      TypeError: `dtype` is not a floating-point dtype, or one that JAX has not enabled.
    """
    dtype, compute_dtype = _floating("dtype", dtype), _floating("compute_dtype", compute_dtype)
    folder = checkpoint.locate(folder_or_hub_id)
    config_dict = checkpoint.read_json(folder / "config.json")
    family = _family(config_dict, folder)
    try:
        config = family.config.from_dict(config_dict)
    except ConfigError as fault:
        raise ConfigError(f"{folder / 'config.json'}: {fault}") from fault

    def build(compute: Any) -> Any:
        return family.model(config, dtype=compute, param_dtype=dtype or compute, rngs=nnx.Rngs(0))

    source = checkpoint.Checkpoint(folder)
    return checkpoint.load_params(
        build,
        source,
        family.weight_map(family.format_of(source.entries), config),
        dtype=dtype,
        compute_dtype=compute_dtype,
        strict=strict,
    )


def save(
    model: nnx.Module,
    folder: str | os.PathLike[str],
    *,
    format: str | None = None,
    max_shard_size: int = 5 * 10**9,
) -> None:
    """Writes config.json and the weights as safetensors; `load` reads them back, and so does transformers.

    An interrupted save and a full disk leave the weights that were in the folder as they were.

    Args:
      model: one of the models in `MODELS`, stacked (`nn.stack`) or not; parameters are written in their dtypes.
      folder: is created if need be; other files in it stay.
      format: "transformers", or that of the model's authors: "state-spaces" (mamba_ssm), "shi-labs" (NAT). None
        means transformers' if it can hold the model. Options that it lacks (`config.formats` tells) are kept in the
        authors' format, which transformers cannot load; a warning says so.
      max_shard_size: bytes beyond which the weights are split into several files with an index.

    Raises:
      CheckpointError: the folder cannot be written.
      ConfigError: `format` cannot hold an option of this model.
      TypeError: the model is of no known family.
    """
    family = next((family for family in MODELS.values() if isinstance(model, family.model)), None)
    if family is None:
        known = ", ".join(dict.fromkeys(family.model.__name__ for family in MODELS.values()))
        raise TypeError(f"save: model must be one of {known}, got {type(model).__name__}.")
    config: Any = model.config  # pyright: ignore[reportAttributeAccessIssue]
    chosen: str = format or config.formats[0]
    if format is None and chosen != "transformers":
        warnings.warn(
            f"save: transformers lacks an option of this model, so {folder} is in {chosen}' format, which "
            "transformers cannot load; format= chooses it without this warning.",
            stacklevel=2,
        )
    config_dict = config.to_dict(chosen)
    tensors = checkpoint.tensors_of(nn.unstack(model), family.weight_map(chosen, config))
    if chosen == "transformers":
        largest = max(tensors.values(), key=lambda source: source.nbytes)
        config_dict = {**config_dict, "dtype": largest.dtype.name}
    checkpoint.write(Path(folder).expanduser(), config_dict, tensors, max_shard_size)


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    kind = config.get("model_type")
    if kind is None and "d_model" in config:
        # mamba_ssm names the layer, not the model, and takes the first Mamba where it is not named.
        layer = config.get("ssm_cfg") or {}
        kind = str(layer.get("layer", "Mamba1")).lower() if isinstance(layer, Mapping) else None
    if kind not in MODELS:
        raise CheckpointError(
            f"{folder / 'config.json'}: model type {kind!r} is not supported; these are: {', '.join(MODELS)}."
        )
    return MODELS[kind]


def _floating(name: str, dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise TypeError(f"load: {name} must be a floating-point dtype such as 'bfloat16', got {dtype!r}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise TypeError(f"load: {name}={found} needs jax_enable_x64: jax.config.update('jax_enable_x64', True).")
    return found

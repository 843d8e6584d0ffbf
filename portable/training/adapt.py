"""Adapters (`portable.adapters`) as a training task: only they are trained, saved and restored."""

import dataclasses
import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from portable import adapters
from portable.adapters.names import check_tied
from portable.checks import ConfigError
from portable.nn import stack
from portable.training.data import Batches
from portable.training.examples import Examples
from portable.training.options import TrainOptions
from portable.training.packing import Rows
from portable.training.step import cross_entropy, next_token, optimizer, takes_segments
from portable.training.task import cast

# What a model's folder may hold beside its weights and is of use to the merged model.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


class AdapterTask:
    """The trained tokens of examples, by a model's adapter; measured in bits per byte of what is trained.

    The model given to `fit` has the adapter already (`portable.adapters.apply`); its other weights are in no
    checkpoint. Held-out examples are measured in rows, as they are trained: a document longer than a row is in pieces.
    """

    unit: ClassVar[str] = "tokens"
    measure: ClassVar[str] = "held_out_bits_per_byte"
    unused: ClassVar[Sequence[str]] = ("bias_rate",)
    trained: ClassVar[Any] = adapters.AdapterParam
    refresh: ClassVar[Callable[[Any], None] | None] = staticmethod(adapters.refresh)

    def __init__(
        self,
        examples: Examples,
        config: adapters.AdapterConfig,
        *,
        lora_plus: float | None = None,
        packed: bool = True,
        merge: bool = False,
        base: str | None = None,
        source: str | Path | None = None,
    ):
        """Args:
        examples: to train on and to hold out.
        config: of the model's adapter.
        lora_plus: ratio of B's learning rate to that of everything else (LoRA+); None for one rate.
        packed: whether examples share rows; the model must then take segment_ids.
        merge: whether the merged model is saved too. Only that is, of an adapter that PEFT's format does not hold.
        base: folder of the model or its name on the hub, for PEFT's file. source: folder with its tokenizer's files,
          which the merged model gets too.

        Raises:
          ConfigError: nothing could be saved in the end, or lora_plus is not positive or has no B.
        """
        low_rank = isinstance(config, adapters.LoRAConfig)
        if not low_rank and not merge:
            raise ConfigError(
                f"{type(config).__name__}: PEFT's format holds LoRA and DoRA; ask for the merged model, merge=True."
            )
        if lora_plus is not None and not (low_rank and 0 < lora_plus < math.inf):
            raise ConfigError(f"lora_plus is a positive ratio for LoRA and DoRA; got {lora_plus} for {_kind(config)}.")
        self.examples, self.config, self.lora_plus, self.packed = examples, config, lora_plus, packed
        self.merge, self.base, self.source, self.low_rank = merge, base, source, low_rank
        self.rows = functools.lru_cache(1)(self._rows)

    def _rows(self, length: int) -> Rows:
        return Rows(self.examples.train, length, packed=self.packed)

    @property
    def bits_per_nat(self) -> float:
        """Factor from nats a token to bits per byte."""
        return _ratio(self.examples.train)

    def batches(self, options: TrainOptions) -> Batches:
        """Returns batches of rows, with random bits for the dropout where there is any."""
        noise = bool(getattr(self.config, "dropout", 0))
        return Batches(self.rows(options.length), options.batch_size, options.seed, noise=noise)

    def description(self) -> dict[str, Any]:
        """Returns the examples' fingerprint and the adapter's configuration."""
        config = {"kind": _kind(self.config)} | dataclasses.asdict(self.config)
        config["adapter_dtype"] = str(config["adapter_dtype"])
        about = {"adapter": config, "lora_plus": self.lora_plus, "packed": self.packed}
        return {"examples": self.examples.fingerprint} | about

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns the model with equal layers stacked.

        Raises:
          ConfigError: it takes no segments and the rows are packed, or has no adapter.
          ValueError: the adapter could not be saved in the end (`save_peft`), or not be merged.
        """
        if self.packed and not takes_segments(model):
            raise ConfigError(
                f"{type(model).__name__} takes no segment_ids, so examples packed into one row would see each other: "
                "give its __call__ that argument, or each example a row of its own (packed=False, --no-packing)."
            )
        if not jax.tree.leaves(nnx.state(model, self.trained)):
            raise ConfigError("the model has no active adapter to train: apply one first (portable.adapters.apply).")
        if self.low_rank:
            with tempfile.TemporaryDirectory() as folder:
                adapters.save_peft(model, folder)
        if self.merge:
            check_tied(model)
        # Norms that were kept for the adapter as it was would be taken for those of the trained one.
        adapters.forget(model)
        return stack(model)

    def optimizer(self, options: TrainOptions) -> optax.GradientTransformation:
        """Returns AdamW, with B's own learning rate under LoRA+."""
        return optimizer(options, self.lora_plus)

    def loss(self, model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Returns `next_token` of the batch, inputs of adapters dropped by its random bits."""
        if "noise" in batch:
            key = jax.random.wrap_key_data(jnp.asarray(batch["noise"])[0], impl="threefry2x32")
            model = adapters.dropping(model, key)
        if takes_segments(model):
            return next_token(model, batch)
        return cross_entropy(model(batch["tokens"]), batch["targets"])

    def evaluate(self, model: nnx.Module, options: TrainOptions) -> dict[str, float]:
        """Returns bits per byte and nats a token of what is trained in rows of held-out examples."""
        held = self.examples.held_out
        if not any(e.trained.any() for e in held):
            return {}
        rows, size = Rows(held, options.length, packed=self.packed), options.batch_size // options.accumulate
        # Spread over all rows, which are sorted by size.
        wanted = math.ceil(options.eval_bytes * len(rows) / max(1, sum(e.bytes for e in held)))
        count = min(len(rows), max(1, wanted))
        chosen = [rows[i * len(rows) // count] for i in range(count)]
        chosen += [chosen[0] | {"targets": np.full_like(chosen[0]["targets"], -1)}] * (-count % size)
        graphdef, state = nnx.split(model)
        nats = targets = 0.0
        for at in range(0, len(chosen), size):
            batch = jax.tree.map(lambda *x: np.stack(x), *chosen[at : at + size])
            total, seen = _score(graphdef, state, batch)
            nats, targets = nats + float(total), targets + int(seen)
        return {self.measure: nats / targets * _ratio(held), "held_out_loss": nats / targets}

    def examine(self, model: nnx.Module) -> None:
        """Nothing."""

    def save(self, model: nnx.Module, folder: Path, dtype: str | None) -> None:
        """Writes adapter/ as PEFT does and, where it was asked for, model/ with the adapter merged."""
        from portable import models

        if self.low_rank:
            adapters.save_peft(model, folder / "adapter", base_model=self.base)
        if self.merge:
            models.save(cast(adapters.merge(model), dtype), folder / "model")
            for name in _TOKENIZER if self.source is not None else ():
                if (file := Path(self.source or "") / name).is_file():
                    shutil.copyfile(file, folder / "model" / name)

    def draw(self, records: Sequence[dict], details: Any, folder: Path, steps: int) -> None:
        """Draws loss.png."""
        from portable.training.plot import loss_curve

        title = f"{folder.name}: bits per byte over {steps} steps of {_kind(self.config)}"
        loss_curve(records, folder / "loss.png", bits_per_nat=self.bits_per_nat, title=title)


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef, state, batch):
    model = nnx.merge(graphdef, state)
    options = {"segment_ids": batch["segments"]} if takes_segments(model) else {}
    return cross_entropy(model(batch["tokens"], **options), batch["targets"])


def _kind(config: adapters.AdapterConfig) -> str:
    return type(config).__name__.removesuffix("Config")


def _ratio(examples: Sequence[Any]) -> float:
    tokens = sum(int(e.trained.sum()) for e in examples)
    return tokens / max(1, sum(e.bytes for e in examples)) / math.log(2)

"""What a run learns: the loop is the same for all, a task has the batches, the loss and the measure."""

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import jax
import optax
from flax import nnx

from portable.nn import stack
from portable.training.data import Batches, Windows, pack
from portable.training.metrics import bits_per_byte, sample
from portable.training.options import TrainOptions
from portable.training.step import next_token, optimizer
from portable.training.text import Text
from portable.training.tokens import ByteTokenizer, Tokenizer


class Task(Protocol):
    """What `fit` asks of a task.

    Attributes:
      unit: what targets are, for the speed: "tokens", "images".
      measure: the entry of `evaluate` that says how good the model is.
      unused: training options without a meaning here, kept out of the run's description.
      trained: the kind of variable that is trained. refresh: called with the model once a step; see `make_step`.
      bits_per_nat: factor from the loss to bits per byte; None where there is no text.
    """

    unit: ClassVar[str]
    measure: ClassVar[str]
    unused: ClassVar[Sequence[str]]
    trained: ClassVar[Any]
    refresh: ClassVar[Callable[[Any], None] | None]

    @property
    def bits_per_nat(self) -> float | None:
        """See above."""
        ...

    def batches(self, options: TrainOptions) -> Any:
        """Returns a source whose item `step` (from 0) is that step's batch, whatever was asked before."""
        ...

    def description(self) -> dict[str, Any]:
        """Returns, as JSON has it, what of the data determines the losses."""
        ...

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns the model in the form in which it is trained."""
        ...

    def optimizer(self, options: TrainOptions) -> optax.GradientTransformation:
        """Returns what makes steps of gradients."""
        ...

    def loss(self, model: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Returns the batch's (sum of losses in nats [] float32, number of targets [] int32)."""
        ...

    def evaluate(self, model: nnx.Module, options: TrainOptions) -> dict[str, float]:
        """Returns entries of the log from the held-out part, none if there is none."""
        ...

    def examine(self, model: nnx.Module) -> Any:
        """Returns what else is to be known of a finished model, for `draw` and `Run.details`."""
        ...

    def save(self, model: nnx.Module, folder: Path, dtype: str | None) -> None:
        """Writes what was learned into the run's folder, with what it needs to be used."""
        ...

    def draw(self, records: Sequence[dict], details: Any, folder: Path, steps: int) -> None:
        """Draws the log's lines and the details into PNGs; ImportError without matplotlib."""
        ...


class WholeModel:
    """What tasks share that train all of a model."""

    trained: ClassVar[Any] = nnx.Param
    refresh: ClassVar[Callable[[Any], None] | None] = None

    def optimizer(self, options: TrainOptions) -> optax.GradientTransformation:
        """Returns AdamW."""
        return optimizer(options)


def cast(model: nnx.Module, dtype: str | None) -> nnx.Module:
    """Returns the model with all variables in a dtype, or as it is."""
    if dtype is None:
        return model
    graphdef, variables = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), variables))


class TextTask(WholeModel):
    """The next token of documents, measured in bits per byte."""

    unit: ClassVar[str] = "tokens"
    measure: ClassVar[str] = "held_out_bits_per_byte"
    unused: ClassVar[Sequence[str]] = ()
    loss = staticmethod(next_token)

    def __init__(self, text: Text, tokenizer: Tokenizer | None = None):
        """Args:
        text: documents to train on and to hold out. tokenizer: the byte tokenizer by default.
        """
        self.text, self.tokenizer = text, tokenizer or ByteTokenizer()
        self._packed = pack(text.train, self.tokenizer)

    @property
    def bits_per_nat(self) -> float:
        """Factor from nats a token to bits per byte."""
        return len(self._packed.tokens) / self._packed.bytes / math.log(2)

    def batches(self, options: TrainOptions) -> Batches:
        """Returns batches of windows."""
        return Batches(Windows(self._packed, options.length), options.batch_size, options.seed)

    def description(self) -> dict[str, Any]:
        """Returns the tokenizer's name and the text's fingerprint."""
        return {"tokenizer": self.tokenizer.name, "text": self.text.fingerprint}

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns the model with equal layers stacked."""
        return stack(model)

    def evaluate(self, model: nnx.Module, options: TrainOptions) -> dict[str, float]:
        """Returns bits per byte of a sample of the held-out text."""
        held_out = sample(self.text.held_out, options.eval_bytes)
        return {self.measure: bits_per_byte(model, held_out, self.tokenizer).bits_per_byte} if held_out else {}

    def examine(self, model: nnx.Module) -> None:
        """Nothing."""

    def save(self, model: nnx.Module, folder: Path, dtype: str | None) -> None:
        """Writes model/, with the tokenizer's file where there is one."""
        from portable import models

        models.save(cast(model, dtype), folder / "model")
        if source := getattr(self.tokenizer, "path", None):
            shutil.copyfile(source, folder / "model" / "tokenizer.json")

    def draw(self, records: Sequence[dict], details: Any, folder: Path, steps: int) -> None:
        """Draws loss.png."""
        from portable.training.plot import loss_curve

        title = f"{folder.name}: bits per byte over {steps} steps"
        loss_curve(records, folder / "loss.png", bits_per_nat=self.bits_per_nat, title=title)

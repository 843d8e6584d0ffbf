"""Images by class as a training task, and how well a model tells them apart."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from portable import files
from portable.checks import ConfigError, DataError
from portable.training.data import endless
from portable.training.images import Images, ImageSet, Preprocess
from portable.training.options import TrainOptions
from portable.training.task import WholeModel, cast


class ImageBatch(TypedDict):
    """Images of one step.

    Keys:
      images: [b, y, x, c] float32, normalised.
      labels: [b] int32.
      noise: [b, 2] uint32, the step's random bits, for the branches that are dropped.
    """

    images: np.ndarray
    labels: np.ndarray
    noise: np.ndarray


@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """What is done to images in training only.

    Attributes:
      shift: pixels an image is moved by at most, along each axis; its edge is repeated.
      flip: whether left and right are exchanged in half of the images.
      label_smoothing: share of the target given to all classes alike.
    """

    shift: int = 1
    flip: bool = False
    label_smoothing: float = 0.1

    def __post_init__(self):
        if self.shift < 0:
            raise ConfigError(f"training option shift must not be negative, got {self.shift}.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"training option label_smoothing must be at least 0 and below 1, got {self.label_smoothing}."
            )


def smoothed_cross_entropy(model: Any, batch: ImageBatch, label_smoothing: float = 0.1) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of cross entropies with smoothed labels [] float32, and the number of images [] int32."""
    key = jax.random.wrap_key_data(jnp.asarray(batch["noise"])[0], impl="threefry2x32")
    logits = model(batch["images"], key=key).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], logits.shape[-1], dtype=jnp.float32), label_smoothing)
    return jnp.sum(optax.softmax_cross_entropy(logits, targets)), jnp.asarray(len(logits), jnp.int32)


class ImageTask(WholeModel):
    """The class of images, measured by accuracy.

    The model is called as `model(images, key=key) -> logits`.
    """

    unit: ClassVar[str] = "images"
    measure: ClassVar[str] = "held_out_accuracy"
    unused: ClassVar[Sequence[str]] = ("length", "eval_bytes", "bias_rate")
    bits_per_nat: None = None

    def __init__(self, images: Images, options: ImageOptions | None = None):
        """Args:
        images: to train on and to hold out. options: what is done to them in training.
        """
        self.images, self.options = images, options or ImageOptions()

    def batches(self, options: TrainOptions) -> "ImageBatches":
        """Returns shuffled batches without end."""
        return ImageBatches(self.images.train, self.images.preprocess, self.options, options.batch_size, options.seed)

    def description(self) -> dict[str, Any]:
        """Returns the fingerprint of the images and what is done to them."""
        prepared, augmented = dataclasses.asdict(self.images.preprocess), dataclasses.asdict(self.options)
        return {"images": self.images.fingerprint, "preprocess": prepared, "augmentation": augmented}

    def prepare(self, model: nnx.Module) -> nnx.Module:
        """Returns the model as it is: blocks of a level differ in dilation."""
        return model

    def loss(self, model: Any, batch: ImageBatch) -> tuple[jax.Array, jax.Array]:
        """Returns `smoothed_cross_entropy` of the batch."""
        return smoothed_cross_entropy(model, batch, self.options.label_smoothing)

    def evaluate(self, model: nnx.Module, options: TrainOptions) -> dict[str, float]:
        """Returns accuracy and loss on the held-out images."""
        found = self.examine(model)
        return {} if found is None else {self.measure: found.accuracy, "held_out_loss": found.loss}

    def examine(self, model: nnx.Module) -> "Classification | None":
        """Returns how the held-out images are classified."""
        return classify(model, self.images.held_out, self.images.preprocess) if len(self.images.held_out) else None

    def save(self, model: nnx.Module, folder: Path, dtype: str | None) -> None:
        """Writes model/ with the classes' names in its config.json, and preprocessor_config.json."""
        from portable import models

        folder, model = folder / "model", cast(model, dtype)
        models.save(model, folder, format=model.config.formats[0])  # pyright: ignore[reportAttributeAccessIssue]
        text = json.dumps(self.images.preprocess.to_dict(), indent=2) + "\n"
        files.replace(folder / "preprocessor_config.json", text)

    def draw(self, records: Sequence[dict], details: Any, folder: Path, steps: int) -> None:
        """Draws curves.png and, of a finished run with images held out, confusion.png."""
        from portable.training.plot import accuracy_curves, confusion_matrix

        accuracy_curves(records, folder / "curves.png", title=f"{folder.name}: {steps} steps")
        if details is not None:
            confusion_matrix(details.confusion, self.images.classes, folder / "confusion.png")


class ImageBatches:
    """Shuffled, augmented batches: `batches[step]` depends on the images, the seed and the step, and nothing else."""

    def __init__(self, images: ImageSet, preprocess: Preprocess, options: ImageOptions, batch_size: int, seed: int):
        if not len(images):
            raise DataError("there is not one image to train on.")
        self._images, self._preprocess, self._options = images, preprocess, options
        self._dataset = endless(range(len(images)), seed).random_map(self._one).batch(batch_size)

    def _one(self, index: int, rng: np.random.Generator) -> ImageBatch:
        noise = rng.integers(0, 2**32, 2, np.uint32)
        pixels, shift = self._images.pixels[index], self._options.shift
        if shift:
            down, right = rng.integers(0, 2 * shift + 1, 2)
            padded = np.pad(pixels, ((shift, shift), (shift, shift), (0, 0)), "edge")
            pixels = padded[down : down + pixels.shape[0], right : right + pixels.shape[1]]
        if self._options.flip and rng.integers(2):
            pixels = pixels[:, ::-1]
        return {"images": self._preprocess(pixels), "labels": self._images.labels[index], "noise": noise}

    def __getitem__(self, step: int) -> ImageBatch:
        """Returns the batch of `step` (from 0)."""
        return self._dataset[step]


@dataclasses.dataclass(frozen=True)
class Classification:
    """How images were classified.

    Attributes:
      confusion: [classes, classes] int64; rows are what images are, columns what they were taken for.
      loss: mean cross entropy in nats.
    """

    confusion: np.ndarray
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of images classified rightly."""
        return float(self.confusion.trace() / self.confusion.sum())


def classify(model: nnx.Module, images: ImageSet, preprocess: Preprocess, *, batch_size: int = 128) -> Classification:
    """Classifies images and counts what they were taken for.

    Args:
      model: `model(images [b, y, x, c]) -> logits [b, classes]`.
      images: with their classes.
      preprocess: to the model's input.
      batch_size: images at a time.

    Raises:
      DataError: there are no images, or classes that the model does not have.
    """
    if not len(images):
        raise DataError("accuracy needs images, got none: give at least one.")
    graphdef, variables = nnx.split(model)
    classes, total, confusion = 0, 0.0, np.zeros((0, 0), np.int64)
    rows = min(batch_size, len(images))
    for start in range(0, len(images), rows):
        at = [min(i, len(images) - 1) for i in range(start, start + rows)]  # one shape, so one program
        count = min(rows, len(images) - start)
        pixels = preprocess(np.stack([images.pixels[i] for i in at]))
        logits = np.asarray(_logits(graphdef, variables, pixels), np.float64)[:count]
        labels = np.asarray(images.labels[start : start + count])
        if not classes:
            classes = logits.shape[-1]
            confusion = np.zeros((classes, classes), np.int64)
            if images.labels.max() >= classes:
                raise DataError(f"the model has {classes} classes, the images are of {images.labels.max() + 1}.")
        np.add.at(confusion, (labels, logits.argmax(-1)), 1)
        largest = logits.max(-1, keepdims=True)
        logs = np.log(np.exp(logits - largest).sum(-1)) + largest[:, 0]
        total += float((logs - logits[np.arange(count), labels]).sum())
    return Classification(confusion, total / len(images))


@functools.partial(jax.jit, static_argnums=0)
def _logits(graphdef, variables, pixels):
    return nnx.merge(graphdef, variables)(pixels)

"""Labelled images: found, opened once, split into training and held-out parts, normalised."""

import dataclasses
import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from portable.checks import CheckpointError, DataError
from portable.training import image_files

LARGEST = 64  # side that is chosen where none is given


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes the model's input: resized to a square, scaled, less the mean, over the deviation.

    Attributes:
      size: pixels a side.
      channels: 1 or 3.
      rescale: factor on the stored values.
      mean, deviation: of each channel after it.
    """

    size: int
    channels: int
    rescale: float
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Returns pixels [..., c] uint8 as normalised float32."""
        scaled = pixels.astype(np.float32) * np.float32(self.rescale)
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.deviation, np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of preprocessor_config.json, as transformers' ViTImageProcessor has it."""
        return {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": self.size, "width": self.size},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": self.rescale,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.deviation),
        }

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Reads a preprocessor_config.json.

        Raises:
          CheckpointError: it is no such file, or lacks the mean, the deviation or the size.
        """
        try:
            saved = json.loads(path.read_text("utf-8"))
            size = saved["size"]
            if isinstance(size, Mapping):
                size = size.get("height") or size["shortest_edge"]
            mean, deviation = (tuple(float(x) for x in saved[name]) for name in ("image_mean", "image_std"))
            if len(mean) != len(deviation) or min(deviation) <= 0:
                raise ValueError(f"image_mean {mean} and image_std {deviation} do not fit")
            return cls(int(size), len(mean), float(saved.get("rescale_factor", 1 / 255)), mean, deviation)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} does not say how images are prepared: {error!r}; restore it.") from error


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images with their classes.

    Attributes:
      pixels: a sequence of [size, size, c] uint8.
      labels: [n] int32, numbers of the classes.
      names: paths, or what else tells one from another.
    """

    pixels: Sequence[np.ndarray] | np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)


@dataclasses.dataclass(frozen=True)
class Images:
    """Images to train on and images never trained on.

    Attributes:
      train, held_out: the two parts.
      classes: names of the classes, by number.
      preprocess: to the model's input.
      rule: how the parts were told apart.
      fingerprint: sha256 over names, contents, classes and split; equal exactly if a run would see the same images.
      skipped: (name, reason) of every image found and not used.
    """

    train: ImageSet
    held_out: ImageSet
    classes: tuple[str, ...]
    preprocess: Preprocess
    rule: str
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """A line or two for people: sizes, the split rule, what was left out."""
        size, channels = self.preprocess.size, self.preprocess.channels
        line = f"train on {len(self.train):,} images of {len(self.classes)} classes, {size} x {size} x {channels}"
        line += f", held out {len(self.held_out):,} ({self.rule})" if len(self.held_out) else ", nothing held out"
        return line + (f"\nskipped {image_files.listed(self.skipped)}" if self.skipped else "")


def read_digits(*, hold_out: bool = True) -> Images:
    """Returns scikit-learn's 1797 handwritten digits, 8 x 8 in 17 greys, a stratified third held out.

    Args:
      hold_out: False trains on all of them.

    Raises:
      DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed: pip install 'portable-jax[train]'."
        ) from error
    images, labels = load_digits(return_X_y=True)
    pixels, labels = images.reshape(-1, 8, 8, 1).astype(np.uint8), labels.astype(np.int32)
    order, held = np.arange(len(labels)), np.arange(0)
    if hold_out:
        order, held = train_test_split(order, test_size=1 / 3, stratify=labels, random_state=0)
    names = tuple(f"digit {i}" for i in range(len(labels)))
    parts = [ImageSet(pixels[at], labels[at], tuple(names[i] for i in at)) for at in (order, held)]
    content = [(name, hashlib.sha256(image.tobytes()).hexdigest()) for name, image in zip(names, pixels, strict=True)]
    classes = tuple(str(i) for i in range(10))
    return Images(
        parts[0],
        parts[1],
        classes,
        normalisation(parts[0].pixels, 8, 1, 1 / 16),
        "a stratified third, drawn from seed 0",
        _fingerprint(parts, classes, dict(content), 8),
    )


def read_images(
    folder: str | Path,
    *,
    size: int | None = None,
    channels: int | None = None,
    preprocess: Preprocess | None = None,
    hold_out: bool = True,
    skip_broken: bool = False,
    exclude: Sequence[Path] = (),
) -> Images:
    """Reads a folder that holds a folder for each class, named as the class, with PNG, JPEG and WebP images.

    Every image is opened here, so that a broken one is found before training begins. Where the folder holds `train`
    and `val` or `test`, these are the parts; otherwise the images whose path hashes to a multiple of 20 are held
    out, if every class is then in both parts and between a fiftieth and a quarter of all are held out, and else a
    twentieth of each class, at least one. Hidden files and folders are not looked at.

    Args:
      folder: of the classes' folders.
      size: pixels a side that images are resized to; the median of their shorter sides by default, at most 64.
      channels: 1 or 3; by default 1 if all images are grey.
      preprocess: what a model was trained with; measured on the images to train on by default.
      hold_out: False trains on everything (but `val` or `test`).
      skip_broken: leave out images that cannot be used and classes without any, in place of an error.
      exclude: folders below that are not looked at.

    Raises:
      DataError: there are no classes or only one, or images are broken or too small; says which.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError("images need the package `pillow`: pip install 'portable-jax[train]'.") from error
    folder = Path(folder).expanduser()
    if size is not None and size < image_files.SMALLEST:
        raise DataError(f"--size must be at least {image_files.SMALLEST} pixels, the stem's largest patch; got {size}.")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {what}: give a folder that holds a folder of images for each class, or `digits`.")
    roots = image_files.parts(folder)
    classes = image_files.subfolders(roots[0], exclude)
    if not classes:
        raise DataError(f"{roots[0]} holds no folders: put the images of each class into a folder named as the class.")
    found = [image_files.walk(root, classes, exclude) for root in roots]
    if unknown := sorted({name for root in roots[1:] for name in image_files.subfolders(root, exclude)} - set(classes)):
        raise DataError(f"{roots[1]} holds classes that {roots[0]} lacks: {', '.join(unknown[:3])}.")
    opened, faults = image_files.open_all(folder, [path for part in found for path, _ in part])
    good = [[(path, label) for path, label in part if path in opened] for part in found]
    counts = Counter(label for _, label in good[0])
    empty = [(f"{name}/", "a class without images") for i, name in enumerate(classes) if not counts[i]]
    if (faults or empty) and not skip_broken:
        raise DataError(
            f"{folder} cannot be trained on: {image_files.listed(faults + empty)}; mend or remove them, or give "
            "--skip-broken."
        )
    kept = [i for i in range(len(classes)) if counts[i]]
    if len(kept) < 2:
        got = ", ".join(classes[i] for i in kept) or "none"
        raise DataError(f"{roots[0]} holds images of fewer than two classes ({got}): there is nothing to tell apart.")
    number = {old: new for new, old in enumerate(kept)}
    good = [[(path, number[label]) for path, label in part if label in number] for part in good]
    classes = tuple(classes[i] for i in kept)
    if len(roots) > 1:
        rule = f"the folder {roots[1].name}"
        good[1] = good[1] if hold_out else []
    else:
        good, rule = image_files.split(good[0], folder) if hold_out else ([good[0], []], "")
    infos = [opened[path] for part in good for path, _ in part]
    side = size or (preprocess and preprocess.size)
    side = side or max(image_files.SMALLEST, min(LARGEST, int(statistics.median(min(i.size) for i in infos))))
    depth = channels or (1 if all(info.grey for info in infos) else 3)
    names = [tuple(path.relative_to(folder).as_posix() for path, _ in part) for part in good]
    pixels = [image_files.Files([path for path, _ in part], side, depth) for part in good]
    labels = [np.asarray([label for _, label in part], np.int32) for part in good]
    parts = [ImageSet(*part) for part in zip(pixels, labels, names, strict=True)]
    content = {path.relative_to(folder).as_posix(): info.digest for path, info in opened.items()}
    if preprocess is None:
        prepared = normalisation(parts[0].pixels, side, depth, 1 / 255)
    else:
        prepared = dataclasses.replace(preprocess, size=side)
    return Images(
        parts[0], parts[1], classes, prepared, rule, _fingerprint(parts, classes, content, side), (*faults, *empty)
    )


def normalisation(pixels: Sequence[np.ndarray] | np.ndarray, size: int, channels: int, rescale: float) -> Preprocess:
    """Returns the preparation with each channel's mean and deviation over the images [n, size, size, c]."""
    count, total, squares = 0, np.zeros(channels), np.zeros(channels)
    for image in pixels:
        scaled = np.asarray(image, np.float64) * rescale
        count += scaled.shape[0] * scaled.shape[1]
        total += scaled.sum((0, 1))
        squares += (scaled**2).sum((0, 1))
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    deviation = np.where(deviation < rescale / 2, 1.0, deviation)  # all images the same: nothing to scale
    rounded = [tuple(round(float(x), 6) for x in values) for values in (mean, deviation)]
    return Preprocess(size, channels, rescale, *rounded)


def _fingerprint(parts: Sequence[ImageSet], classes: Sequence[str], content: Mapping[str, str], size: int) -> str:
    digest = hashlib.sha256(f"{list(classes)} {size}\n".encode())
    for part in parts:
        digest.update(f"{len(part)}\n".encode())
        for name, label in zip(part.names, part.labels, strict=True):
            digest.update(f"{name}\n{label}\n{content[name]}\n".encode())
    return digest.hexdigest()

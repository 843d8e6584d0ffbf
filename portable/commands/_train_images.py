"""`portable train --task image`: a model that tells the images of folders apart."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from portable.checks import ConfigError
from portable.commands import _training
from portable.training.options import TrainOptions

DEFAULTS: dict[str, Any] = {"steps": 700, "batch_size": 64, "learning_rate": 5e-3, "weight_decay": 0.05}
_SIZES = ("embed_dim", "depths", "kernel_size", "patch_size", "drop_path")
ONLY = ("size", "skip_broken", "shift", "flip", "label_smoothing", *_SIZES)


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the task."""
    images = parser.add_argument_group("images (--task image)")
    images.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="pixels a side that images are resized to (default: that of --init, or the median of their shorter sides, "
        "at most 64)",
    )
    images.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be used")
    images.add_argument("--shift", type=int, metavar="N", help="move images by up to N pixels (default: size / 8)")
    images.add_argument("--flip", action="store_true", help="exchange left and right in half of the images")
    images.add_argument("--label-smoothing", type=float, metavar="X", help="share for all classes (default 0.1)")
    model = parser.add_argument_group("model of images (default: a new DiNAT that fits --size)")
    model.add_argument("--embed-dim", type=int, metavar="N", help="channels of the first level (default 32)")
    model.add_argument("--depths", metavar="N,N", help="blocks of each level (default 2 of each)")
    model.add_argument("--kernel-size", type=int, metavar="N", help="the window (default 3, from 112 pixels on 7)")
    model.add_argument(
        "--patch-size", type=int, metavar="N", help="pixels a position (default 1, from 24 on 2, 112: 4)"
    )
    model.add_argument("--drop-path", type=float, metavar="X", help="how often a branch is left out (default 0.1)")


def run(args: argparse.Namespace, options: TrainOptions) -> int:
    """Trains, or continues a run; returns 0, or 130 when stopped by Ctrl-C."""
    from portable import training
    from portable.training.progress import reporter

    loaded, prepared = _init(args)
    images = _read(args, loaded, prepared)
    shift = images.preprocess.size // 8 if args.shift is None else args.shift
    smoothing = 0.1 if args.label_smoothing is None else args.label_smoothing
    task = training.ImageTask(images, training.ImageOptions(shift, args.flip, smoothing))
    model, note = _model(args, images, loaded, options.seed)
    show = reporter(args.quiet)
    for line in (images.summary(), f"{type(model).__name__} with {parameters(model):,} parameters", *note):
        show.note(line)
    done = training.fit(
        model,
        task,
        options,
        args.out,
        reporter=show,
        max_minutes=args.max_minutes,
        save_dtype=args.save_dtype,
    )
    folder = Path(args.out)
    if done.status != "finished":
        return _training.left(done, options, show)
    held = ""
    if done.details is not None:
        held = f", held out {done.details.accuracy:.2%} right"
        show.note(table(done.details, images.classes))
    pictures = "curves.png and confusion.png" if held else "curves.png"
    show.note(f"finished{held}; model in {folder / 'model'}, {pictures} in {folder}")
    return 0


def table(found: Any, classes: tuple[str, ...], most: int = 20) -> str:
    """Returns a line for each class: images, how many were right, what the others were taken for.

    Args:
      found: a `Classification`.
      classes: their names.
      most: classes shown at most, the worst ones.
    """
    shown = sorted(range(len(classes)), key=lambda i: found.confusion[i, i] / max(1, found.confusion[i].sum()))
    shown = sorted(shown[:most]) if len(classes) > most else range(len(classes))
    width = max(5, *(len(classes[i]) for i in shown))
    lines = [f"{'class':<{width}}  images  right"]
    for i in shown:
        row = found.confusion[i]
        others = [(int(row[j]), classes[j]) for j in row.argsort()[::-1] if j != i and row[j]]
        wrong = "  taken for " + ", ".join(f"{name} ({n})" for n, name in others[:3]) if others else ""
        lines.append(f"{classes[i]:<{width}}  {row.sum():6,}  {row[i] / max(1, row.sum()):5.1%}{wrong}".rstrip())
    if len(classes) > most:
        lines.append(f"... the worst {most} of {len(classes)} classes")
    return "\n".join(lines)


def parameters(model: Any) -> int:
    """Returns how many numbers a model learns."""
    import jax
    from flax import nnx

    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def _init(args: argparse.Namespace) -> tuple[Any, Any]:
    """Returns the model that --init names and how its images are prepared, as far as there is one."""
    if not args.init:
        return None, None
    import jax.numpy as jnp

    from portable import checkpoint, models
    from portable.models.nat import NAT
    from portable.training.images import Preprocess

    given = ["--" + name.replace("_", "-") for name in _SIZES[:-1] if getattr(args, name) is not None]
    if given:
        raise ConfigError(f"--init brings its own sizes, got {', '.join(given)} too: leave them out.")
    loaded = models.load(args.init, dtype=jnp.float32)
    if not isinstance(loaded, NAT):
        raise ConfigError(f"--init {args.init} is {type(loaded).__name__}, not a model of images: give a NAT or DiNAT.")
    path = checkpoint.locate(args.init) / "preprocessor_config.json"
    prepared = Preprocess.from_file(path) if path.exists() else None
    if prepared is not None and prepared.channels != loaded.config.num_channels:
        raise ConfigError(f"{path} is for {prepared.channels} channels, the model for {loaded.config.num_channels}.")
    return loaded, prepared


def _read(args: argparse.Namespace, loaded: Any, prepared: Any):
    from portable import training

    hold_out, channels = not args.no_held_out, loaded and loaded.config.num_channels
    if args.data == "digits":  # a folder of this name is ./digits
        if args.size not in (None, 8):
            raise ConfigError(f"the digits are 8 x 8 pixels, got --size {args.size}: leave it out.")
        if channels not in (None, 1):
            raise ConfigError(f"--init {args.init} is for images of {channels} channels, the digits have 1.")
        return training.read_digits(hold_out=hold_out)
    return training.read_images(
        args.data,
        size=args.size,
        channels=channels,
        preprocess=prepared,
        hold_out=hold_out,
        skip_broken=args.skip_broken,
        exclude=[Path(args.out)],
    )


def _model(args: argparse.Namespace, images: Any, loaded: Any, seed: int) -> tuple[Any, list[str]]:
    """Returns the model to train, and what is to be said of it."""
    import jax.numpy as jnp
    from flax import nnx

    from portable.models.nat import NAT

    drop = {} if args.drop_path is None else {"drop_path_rate": args.drop_path}
    classes, note = images.classes, []
    if loaded is None:
        config = new_config(args, images)
    else:
        config = dataclasses.replace(loaded.config, num_labels=len(classes), labels=classes, **drop)
        note = [f"weights of {args.init}"]
    model = NAT(config, dtype=jnp.dtype(args.dtype), rngs=nnx.Rngs(seed))
    if loaded is not None:
        weights = nnx.state(loaded)
        if (loaded.config.num_labels, loaded.config.labels) != (len(classes), classes):
            weights = nnx.State({name: value for name, value in weights.items() if name != "head"})
            note[0] += f"; the head is new: it was for {loaded.config.num_labels} classes, here are {len(classes)}"
            note[0] += " of other names" if loaded.config.num_labels == len(classes) else ""
        nnx.update(model, weights)
    return model, note


def new_config(args: argparse.Namespace, images: Any):
    """Returns the sizes of a new DiNAT: windows, every other one as wide as its level's image allows."""
    from portable.models.nat import NATConfig

    size = images.preprocess.size
    patch = args.patch_size or (4 if size >= 112 else 2 if size >= 24 else 1)
    kernel = args.kernel_size or (7 if size >= 112 else 3)
    side, sides = -(-size // patch), []
    while not sides or (side >= kernel and len(sides) < 4):
        sides.append(side)
        side = -(-side // 2)
    try:
        depths = tuple(int(n) for n in args.depths.split(",")) if args.depths else (2,) * len(sides)
    except ValueError as error:
        raise ConfigError(f"--depths must be numbers with commas between, such as 2,2; got {args.depths!r}.") from error
    sides = [-(-size // (patch * 2**level)) for level in range(len(depths))]
    width = 32 if args.embed_dim is None else args.embed_dim
    return NATConfig(
        embed_dim=width,
        depths=depths,
        num_heads=tuple(max(1, width // 16) * 2**level for level in range(len(depths))),
        kernel_size=kernel,
        dilations=tuple(
            tuple(max(1, side // max(1, kernel)) if block % 2 else 1 for block in range(depth))
            for side, depth in zip(sides, depths, strict=True)
        ),
        patch_size=patch,
        num_channels=images.preprocess.channels,
        num_labels=len(images.classes),
        labels=images.classes,
        mlp_ratio=2.0,
        initializer_range=0.1,  # the usual 0.02 is for wide models; branches of a narrow one would begin near zero
        drop_path_rate=0.1 if args.drop_path is None else args.drop_path,
    )

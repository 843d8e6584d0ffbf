"""The curves of a run, and the confusion matrix of its classes, as pictures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def loss_curve(records: Sequence[dict], path: str | Path, *, bits_per_nat: float, title: str) -> None:
    """Draws training and held-out bits per byte over steps into a PNG.

    Args:
      records: lines of the log.
      path: the file to write.
      bits_per_nat: factor from `loss` (nats a token) to bits per byte.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [r["step"] for r in records]
    train = [r["loss"] * bits_per_nat for r in records]
    held = [(r["step"], r["held_out_bits_per_byte"]) for r in records if "held_out_bits_per_byte" in r]

    figure = Figure(figsize=(8, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, train, color="#4878a8", alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(train), color="#1f4e79", linewidth=1.8, label="training, smoothed")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c4541b", markersize=4, linewidth=1.2, label="held out")
        axes.annotate(
            f"{held[-1][1]:.3f}",
            held[-1],
            xytext=(6, 6),
            textcoords="offset points",
            color="#c4541b",
            fontsize=9,
        )
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_title(title, loc="left", fontsize=11)
    axes.margins(x=0.02)
    if train:  # the first steps of a fresh model would flatten everything after them
        lowest = min(smooth(train) + [bits for _, bits in held])
        axes.set_ylim(max(0.0, 0.85 * lowest), max(min(8.5, 1.05 * max(train)), 1.2 * lowest))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


def accuracy_curves(records: Sequence[dict], path: str | Path, *, title: str) -> None:
    """Draws the losses, and the accuracy on held-out images where there are any, over steps into a PNG.

    Args:
      records: lines of the log.
      path: the file to write.
      title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    train = [r["loss"] for r in records]
    held = [(r["step"], r["held_out_loss"], r["held_out_accuracy"]) for r in records if "held_out_accuracy" in r]
    figure = Figure(figsize=(10 if held else 6, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    left, *right = figure.subplots(1, 2 if held else 1, squeeze=False)[0]
    steps = [r["step"] for r in records]
    left.plot(steps, train, color="#4878a8", alpha=0.25, linewidth=0.8)
    left.plot(steps, smooth(train), color="#1f4e79", linewidth=1.8, label="training (augmented), smoothed")
    left.set(xlabel="step", ylabel="loss, nats an image")
    left.set_title(title, loc="left", fontsize=11)
    if held:
        at, losses, accuracies = zip(*held, strict=True)
        left.plot(at, losses, "o-", color="#c4541b", markersize=4, linewidth=1.2, label="held out")
        right[0].plot(at, accuracies, "o-", color="#c4541b", markersize=4, linewidth=1.2, label="held out")
        right[0].annotate(
            f"{accuracies[-1]:.2%}",
            (at[-1], accuracies[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color="#c4541b",
            fontsize=9,
        )
        right[0].set(xlabel="step", ylabel="accuracy")
        right[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes in (left, *right):
        axes.margins(x=0.02)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    left.set_ylim(bottom=0)
    figure.savefig(path, format="png")


def confusion_matrix(confusion: Any, labels: Sequence[str], path: str | Path, *, title: str | None = None) -> None:
    """Draws what images are against what they were taken for into a PNG; the numbers too, up to 25 classes.

    Colours are shares of a row, so that rare classes are seen as well as frequent ones.

    Args:
      confusion: [classes, classes] counts; a row for each true class.
      labels: names of the classes.
      path: the file to write.
      title: above the picture; by default the accuracy.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    confusion = np.asarray(confusion)
    n, count = len(confusion), confusion.sum()
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(14.0, max(4.0, 2.2 + 0.42 * n))
    figure = Figure(figsize=(side + 1.2, side), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= 25:
        for row, column in np.argwhere(confusion):
            dark = shares[row, column] > 0.5
            axes.text(
                column,
                row,
                str(confusion[row, column]),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    every = max(1, -(-n // 50))  # beyond fifty names they would run into each other
    shown = [name if len(name) <= 18 else name[:17] + "…" for name in labels[::every]]
    upright = max(map(len, shown), default=0) > 3 or n > 25
    axes.set_xticks(range(0, n, every), shown, rotation=90 if upright else 0, fontsize=8)
    axes.set_yticks(range(0, n, every), shown, fontsize=8)
    axes.set(xlabel="taken for", ylabel="is")
    right = int(confusion.trace())
    axes.set_title(title or f"{right:,} of {count:,} right: {right / max(1, count):.2%}", loc="left", fontsize=11)
    bar = figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02, format=PercentFormatter(1.0))
    bar.set_label("share of the row", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    figure.savefig(path, format="png")


def smooth(values: Sequence[float], share: float = 0.02) -> list[float]:
    """Returns means over `share` of the series (at least 10) around each value.

    Towards the start the window shrinks on both sides, so that the curve follows the first fast fall; towards the
    end only on the right, so that it does not run into the noise of the last value.
    """
    half = max(5, round(len(values) * share / 2))
    sums = list(itertools.accumulate(values, initial=0.0))
    out = []
    for i in range(len(values)):
        before = min(half, i)
        end = min(i + before + 1, len(values))
        out.append((sums[end] - sums[i - before]) / (end - i + before))
    return out

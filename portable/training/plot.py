"""The loss curve of a run as a picture."""

import itertools
from collections.abc import Sequence
from pathlib import Path


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

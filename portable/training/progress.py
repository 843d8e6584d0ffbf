"""What a person sees of a run: a bar on a terminal, plain lines elsewhere, or nothing."""

import dataclasses
import sys
from typing import TextIO


@dataclasses.dataclass(frozen=True)
class Report:
    """Where a run stands.

    Attributes:
      step, steps: done and planned.
      loss: nats a token or an image, mean since the last report.
      bits_per_byte: the same loss in bits per byte of text; None where there is no text.
      rate: tokens or images a second since the last report; None before there is one.
      seconds_left: at that rate.
      held_out: what the held-out part says, when it was just measured: bits per byte of text, accuracy on images.
      unit: of the rate.
    """

    step: int
    steps: int
    loss: float
    bits_per_byte: float | None
    rate: float | None
    seconds_left: float | None
    held_out: float | None = None
    unit: str = "tokens"

    @property
    def quality(self) -> str:
        """`held_out` for people."""
        if self.held_out is None:
            return "-"
        return f"{self.held_out:.2%}" if self.bits_per_byte is None else f"{self.held_out:.3f}"


class Silent:
    """Shows nothing; the base of those that do."""

    def start(self, step: int, steps: int) -> None:
        """The run begins or continues after `step`."""

    def advance(self, step: int) -> None:
        """A step was handed to the device; costs nothing."""

    def report(self, report: Report) -> None:
        """Losses were fetched."""

    def note(self, text: str) -> None:
        """Something a person should know."""

    def close(self) -> None:
        """The run is over."""


class Lines(Silent):
    """One plain line a report, for files and pipes."""

    def __init__(self, file: TextIO | None = None):
        self._file = file or sys.stdout

    def report(self, report: Report) -> None:
        parts = [f"step {report.step}/{report.steps}", f"loss {report.loss:.4f}"]
        if report.bits_per_byte is not None:
            parts.append(f"{report.bits_per_byte:.3f} bits/byte")
        if report.held_out is not None:
            parts.append(f"held out {report.quality}")
        if report.rate is not None:
            parts += [f"{report.rate:,.0f} {report.unit}/s", f"{duration(report.seconds_left)} left"]
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        print(text, file=self._file, flush=True)


class Bar(Silent):
    """A rich progress bar with loss, bits per byte of text, tokens or images a second and time left."""

    def __init__(self, console=None):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss [cyan]{task.fields[loss]}"),
            TextColumn("{task.fields[bits]}held out [magenta]{task.fields[held_out]}"),
            TextColumn("[green]{task.fields[rate]}"),
            TextColumn("{task.fields[left]} left"),
            console=console or Console(),
        )
        self._task = None

    def start(self, step: int, steps: int) -> None:
        self._task = self._progress.add_task(
            "", total=steps, completed=step, loss="-", bits="", held_out="-", rate="-", left="-"
        )
        self._progress.start()

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)  # pyright: ignore[reportArgumentType]

    def report(self, report: Report) -> None:
        fields = {"loss": f"{report.loss:.4f}"}
        if report.bits_per_byte is not None:
            fields["bits"] = f"[cyan]{report.bits_per_byte:.3f}[/] bits/byte "
        if report.held_out is not None:
            fields["held_out"] = report.quality
        if report.rate is not None:
            fields |= {"rate": f"{report.rate:,.0f}[/] {report.unit}/s", "left": duration(report.seconds_left)}
        self._progress.update(self._task, completed=report.step, **fields)  # pyright: ignore[reportArgumentType]

    def note(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def reporter(quiet: bool = False) -> Silent:
    """Returns a bar when standard output is a terminal, else plain lines; nothing when quiet."""
    if quiet:
        return Silent()
    return Bar() if sys.stdout.isatty() else Lines()


def duration(seconds: float | None) -> str:
    """Returns 12 s, 3:05 min or 1:02 h."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02} h"

"""Rows of a benchmark's verdict, and the table that shows them."""

import dataclasses
import operator
import sys
from collections.abc import Sequence
from typing import Any

_HOLDS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "=": operator.eq}


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
      what: what was measured.
      ours, theirs: both sides as text with units; `against` names the other side.
      value: the number that is judged, and `value_text` how it reads where it is not a plain ratio.
      relation, bar: `value relation bar` must hold; a bar of None is shown without a verdict.
      others: the same number from other statistics (minima, processor time), by name.
    """

    what: str
    ours: str
    against: str
    theirs: str
    value: float
    relation: str = ">="
    bar: float | None = None
    value_text: str | None = None
    others: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether the bar holds; None where there is no bar."""
        return None if self.bar is None else bool(_HOLDS[self.relation](self.value, self.bar))

    def record(self) -> dict[str, Any]:
        """The row for a results file."""
        return {**dataclasses.asdict(self), "passed": self.passed}


def show(title: str, rows: Sequence[Row], others: Sequence[str] = ()) -> None:
    """Prints the rows as a table, a column for each of `others`, and how many bars hold."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    table = Table(title=title, title_justify="left", box=None, header_style="bold", padding=(0, 1))
    for column in ("", "ours", "against", "", "ratio", *others, "bar", ""):
        table.add_column(column, justify="left" if column in ("", "against") else "right")
    for row in rows:
        verdict = {True: "[green]pass[/]", False: "[bold red]FAIL[/]", None: ""}[row.passed]
        bar = "" if row.bar is None else f"{row.relation} {row.bar:g}"
        value = row.value_text or f"{row.value:.2f}"
        extra = [f"{row.others[name]:.2f}" if name in row.others else "" for name in others]
        table.add_row(row.what, row.ours, row.against, row.theirs, value, *extra, bar, verdict)
    console.print(table)
    judged = [row for row in rows if row.passed is not None]
    console.print(f"{sum(row.passed is True for row in judged)} of {len(judged)} bars hold.")


def markdown(rows: Sequence[Row]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| | ours | against | theirs | ratio | goal | |", "| --- | ---: | --- | ---: | ---: | ---: | --- |"]
    for row in rows:
        what = f"&emsp;{row.what.strip()}" if row.what.startswith(" ") else row.what
        goal = "" if row.bar is None else f"{row.relation} {row.bar:g}"
        verdict = {True: "reached", False: "**missed**", None: ""}[row.passed]
        cells = (what, row.ours, row.against, row.theirs, row.value_text or f"{row.value:.2f}", goal, verdict)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)

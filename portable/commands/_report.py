"""How a command shows a report: a table that fits the terminal, plain lines in a pipe, JSON for programs."""

import json
import sys
from collections.abc import Iterable

from portable.reports import Report


def show(reports: Iterable[Report], *, as_json: bool) -> None:
    """Prints reports.

    Args:
      reports: what `portable.info` and `portable.explain` return.
      as_json: one JSON object {title: rows} in place of the tables.
    """
    if as_json:
        print(json.dumps({report.title: report.rows for report in reports}, indent=2))
    elif sys.stdout.isatty():
        _tables(reports)
    else:
        print("\n\n".join(map(str, reports)))


def _tables(reports: Iterable[Report]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for report in reports:
        table = Table.grid(padding=(0, 2))
        for style in ("cyan", "green"):
            table.add_column(style=style, no_wrap=True)
        for row in report.rows:
            table.add_row(*map(Text, row))  # Text: [b, t] in a sentence is not markup
        console.print(Text(report.title, style="bold"), Padding(table, (0, 0, 1, 2)))

"""The matrix for people: records in JSON, tables for a terminal, Markdown for pages."""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from typing import Any

from portable.parity import store
from portable.parity.jobs import Result
from portable.parity.targets import TARGETS

# From the worst to the best; a group of cells shows its worst.
STYLES = {
    "failed": "bold red",
    "does not fit": "yellow",
    "cannot": "dim",
    "lowered": "cyan",
    "interpreted": "green",
    "compiled": "green",
    "ran": "bold green",
}
GREEN = ("ran", "interpreted", "compiled", "lowered", "does not fit")
# What a results file keeps of the compiled program's instructions.
OPCODES = ("dot", "convolution", "fusion", "while", "sort", "scatter", "gather", "custom-call")
_GIB = 2**30


def record(results: Iterable[Result]) -> dict[str, Any]:
    """Returns what a results file holds: the compilers' versions, the date, and a row for each job and target."""
    rows = []
    for result in results:
        row = dataclasses.asdict(result)
        row["opcodes"] = {k: v for k, v in result.opcodes.items() if k in OPCODES}
        for name in ("lower_seconds", "compile_seconds"):
            row[name] = None if row[name] is None else round(row[name], 2)
        extra = {"fits": result.fits, "spare_bytes": result.spare_bytes, "fraction": result.fraction}
        rows.append(row | extra | {"verdict": result.verdict})
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"made": today, "versions": store.versions(), "results": rows}


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Returns the results of `new`, and those of `old` that `new` did not try again.

    Results of other compilers are dropped: two accounts by different versions cannot stand side by side.
    """
    rows = {(r["job"], r["target"]): r for r in (old["results"] if old.get("versions") == new["versions"] else [])}
    rows |= {(r["job"], r["target"]): r for r in new["results"]}  # those tried again stay in their places
    return new | {"results": list(rows.values())}


def worse(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a sentence for each cell that was green in `old` and is not in `new`."""
    was = {(r["job"], r["target"]): r for r in old["results"]}
    found = []
    for row in new["results"]:
        before = was.get((row["job"], row["target"]))
        if before and before["status"] in GREEN and row["status"] not in GREEN:
            found.append(f"{row['target']} {row['job']}: was {before['status']}, now {row['verdict']}.")
        elif before and before["fits"] and row["fits"] is False:
            found.append(f"{row['target']} {row['job']}: fitted, now {row['verdict']}.")
    return found


def columns(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the targets that rows are about, in their order."""
    return [t for t in TARGETS if any(r["target"] == t for r in rows)]


def groups(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, ...], dict[str, list[dict[str, Any]]]]:
    """Returns the rows of each line of the table by target: an op's implementation, a model's piece of work."""
    found: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        labels = row["labels"]
        if labels["kind"] == "op":
            line = ("op", labels["name"], labels["implementation"])
        else:
            line = ("model", f"{labels['name']} {labels['dtype']}", f"{labels['part']} {labels['case']}")
        found.setdefault(line, {}).setdefault(row["target"], []).append(row)
    # Ops by name; models stay in the order of their families and sizes.
    return dict(sorted(found.items(), key=lambda item: item[0] if item[0][0] == "op" else item[0][:1]))


def cell(kind: str, rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Returns a cell's few words and the status that colours it."""
    if not rows:
        return "", "cannot"
    worst = min(rows, key=lambda r: list(STYLES).index(r["status"]))
    status = worst["status"]
    if status == "cannot" and any(r["status"] in GREEN for r in rows):  # some cases are within a kernel's limits
        rows = [r for r in rows if r["status"] != "cannot"]
        return cell(kind, rows)
    if status == "failed":
        return f"{sum(r['status'] == 'failed' for r in rows)} of {len(rows)} failed", status
    if status in ("ran", "interpreted"):
        return f"{max(r['ulps'] for r in rows):.1f} ulp", status
    if kind == "model" and worst["spare_bytes"] is not None:
        spare = worst["spare_bytes"] / _GIB
        return (f"{spare:.1f} GiB free" if spare >= 0 else f"{-spare:.1f} GiB short"), status
    return {"compiled": f"{len(rows)} ✓", "lowered": f"{len(rows)} lowered"}.get(status, status), status


def tables(found: dict[str, Any]) -> list[Any]:
    """Returns rich tables: the ops, and the models, each with a column for every target."""
    from rich.table import Table
    from rich.text import Text

    out = []
    for kind, title in (("op", "Ops"), ("model", "Models")):
        rows = [r for r in found["results"] if r["labels"]["kind"] == kind]
        if not rows:
            continue
        names = columns(rows)
        table = Table(title=title, title_justify="left", header_style="bold", row_styles=["", "on grey7"])
        table.add_column(kind, no_wrap=True)
        table.add_column("implementation" if kind == "op" else "work", no_wrap=True)
        for name in names:
            table.add_column(name.replace("-", "\n", 1), justify="right")
        before = ""
        for line, cells in groups(rows).items():
            shown = [cell(kind, cells.get(t, [])) for t in names]
            first = "" if line[1] == before else line[1]
            before = line[1]
            table.add_row(first, line[2], *[Text(text, STYLES[status]) for text, status in shown])
        out.append(table)
    return out


def problems(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns (status, sentence) for every cell that failed, and once for every reason why cells cannot be had."""
    out: dict[tuple[str, str], None] = {}
    for row in found["results"]:
        if row["status"] == "failed":
            out["failed", f"{row['target']} {row['job']}: {row['message']}"] = None
        elif row["status"] == "cannot":
            out["cannot", row["message"]] = None
    return list(out)


def markdown(found: dict[str, Any], *, brief: bool = False) -> str:
    """Returns the matrix as Markdown tables; `brief` leaves the references out."""
    lines = []
    for kind, title in (("op", "op"), ("model", "model")):
        rows = [r for r in found["results"] if r["labels"]["kind"] == kind]
        if not rows:
            continue
        names = columns(rows)
        lines += [f"| {title} | | {' | '.join(names)} |", f"| --- | --- |{' --- |' * len(names)}"]
        lines += [_line(kind, line, cells, names) for line, cells in groups(rows).items() if not brief or _main(line)]
        lines.append("")
    lines.append(f"Made {found['made']} with {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.")
    return "\n".join(lines)


def _line(kind: str, line: tuple[str, ...], cells: dict[str, list], names: Sequence[str]) -> str:
    shown = [cell(kind, cells.get(t, [])) for t in names]
    texts = [f"**{text}**" if status == "failed" else text for text, status in shown]
    return f"| `{line[1]}` | {line[2]} | {' | '.join(texts)} |"


def _main(line: tuple[str, ...]) -> bool:
    return line[0] == "model" or line[2] != "reference"

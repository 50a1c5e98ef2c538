"""A table of a report, and its three forms: Markdown to read, CSV and JSON to compute with."""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Measured:
    """A number over seeds; `paper` is what the paper reports for the same place."""

    mean: float | None  # None where only the paper has a number
    std: float | None  # sample standard deviation (n-1); None for one seed
    seeds: int
    paper: float | None = None


Cell = str | int | float | Measured | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    name: str  # of its CSV file
    title: str
    columns: Mapping[str, str]  # name: format of its numbers, such as ".1f"; "" for text
    rows: Sequence[Mapping[str, Cell]]
    note: str = ""
    shown: bool = True  # in Markdown; a long one is only in CSV and JSON


def over_seeds(values: Iterable[float | None], paper: float | None = None) -> Measured | None:
    """Mean and standard deviation of the values that exist; None when neither they nor the paper's number do."""
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return None if paper is None else Measured(None, None, 0, paper)
    return Measured(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else None, len(found), paper)


def markdown(table: Table) -> str:
    """A Markdown table; names to the left, numbers to the right."""
    numbers = [bool(form) for form in table.columns.values()]
    head = [list(table.columns), ["--:" if number else ":--" for number in numbers]]
    body = [[_shown(row.get(name), form) for name, form in table.columns.items()] for row in table.rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*head, *body))


def csv_text(table: Table) -> str:
    """CSV with a header; a Measured column is followed by NAME std, NAME seeds and NAME paper."""
    out = io.StringIO()
    rows = [_flat(table, row) for row in table.rows]
    writer = csv.DictWriter(
        out, list(dict.fromkeys(key for row in rows for key in row)) or list(table.columns), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def json_rows(table: Table) -> list[dict[str, Any]]:
    """One flat object a row, with the keys of the CSV."""
    return [_flat(table, row) for row in table.rows]


def _shown(cell: Cell, form: str) -> str:
    if cell is None:
        return "-"
    if not isinstance(cell, Measured):
        return str(cell).replace("|", "\\|") if isinstance(cell, str) else format(cell, form)
    text = "-" if cell.mean is None else format(cell.mean, form)
    if cell.std is not None:
        text += f" ± {format(cell.std, form)}"
    return text if cell.paper is None else f"{text} ({format(cell.paper, form)})"


def _flat(table: Table, row: Mapping[str, Cell]) -> dict[str, Any]:
    """The row with each Measured column spread over several, the same ones in every row of the table."""
    flat: dict[str, Any] = {}
    for name in table.columns:
        cell, column = row.get(name), [r.get(name) for r in table.rows]
        measured = [c for c in column if isinstance(c, Measured)]
        flat[name] = cell.mean if isinstance(cell, Measured) else cell
        if measured:
            flat[f"{name} std"] = cell.std if isinstance(cell, Measured) else None
            flat[f"{name} seeds"] = cell.seeds if isinstance(cell, Measured) else None
        if any(c.paper is not None for c in measured):
            flat[f"{name} paper"] = cell.paper if isinstance(cell, Measured) else None
    return flat

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
    body = [
        [_shown(row.get(name), form, len(str(row.get("seeds", "")).split(", "))) for name, form in table.columns.items()]
        for row in table.rows
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (*head, *body))


def csv_text(table: Table) -> str:
    """CSV with a header; a Measured column is followed by NAME std, NAME seeds and NAME paper."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _flat_columns(table), lineterminator="\n")
    writer.writeheader()
    writer.writerows(json_rows(table))
    return out.getvalue()


def json_rows(table: Table) -> list[dict[str, Any]]:
    """One flat object a row, with the keys of the CSV."""
    columns = _flat_columns(table)
    return [_flat(row, columns) for row in table.rows]


def _shown(cell: Cell, form: str, seeds: int) -> str:
    """`seeds` are those of the row: a number that only some of them have says so."""
    if cell is None:
        return "-"
    if not isinstance(cell, Measured):
        return str(cell).replace("|", "\\|") if isinstance(cell, str) else format(cell, form)
    text = "-" if cell.mean is None else format(cell.mean, form)
    if cell.std is not None:
        text += f" ± {format(cell.std, _form_of_std(text, form))}"
    if 0 < cell.seeds < seeds:
        text += f" [{cell.seeds} of {seeds} seeds]"
    return text if cell.paper is None else f"{text} ({format(cell.paper, form)})"


def _form_of_std(mean: str, form: str) -> str:
    """As many decimals as the mean shows, where the form does not say how many."""
    return f".{len(mean.partition('.')[2])}f" if form.endswith("g") and "e" not in mean else form


def _flat_columns(table: Table) -> dict[str, tuple[str, str]]:
    """Names of the columns with each Measured one spread over several, the same ones in every row: (column, field of Measured)."""
    flat: dict[str, tuple[str, str]] = {}
    for name in table.columns:
        flat[name] = name, "mean"
        measured = [cell for row in table.rows if isinstance(cell := row.get(name), Measured)]
        if measured:
            flat |= {f"{name} std": (name, "std"), f"{name} seeds": (name, "seeds")}
        if any(cell.paper is not None for cell in measured):
            flat[f"{name} paper"] = name, "paper"
    return flat


def _flat(row: Mapping[str, Cell], columns: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, (name, field) in columns.items():
        cell = row.get(name)
        flat[key] = getattr(cell, field) if isinstance(cell, Measured) else cell if field == "mean" else None
    return flat

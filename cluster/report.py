"""`softrl report`: from a folder of runs to tables and figures.

    RUNS_DIR/*/  -->  OUT/report.md       every table and figure, to read
                      OUT/report.json     every table, and which runs stand behind them
                      OUT/tables/*.csv    OUT/figures/*.png

Nothing is kept between reports: all numbers come from config.yaml, metrics.jsonl and eval/ of the runs.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from cluster import report_tables, report_training
from cluster.report_figures import Drawing, draw_all, save
from cluster.report_format import Table, csv_text, json_rows, markdown
from cluster.report_runs import Arm, LeftOut, Run, RunGroup, build_arms, group_runs, read_runs
from configs.errors import InputError
from rollout.files import cannot_write, replace_file


def report(runs_dir: Path, out: Path | None) -> None:
    """Write the report of the runs below `runs_dir` to `out`, by default runs_dir/report, and say what it holds.

    Raises InputError when there are no runs, or `out` is a file; RunError when it cannot be written. A run that cannot be read is
    left out, and named.
    """
    out = out or runs_dir / "report"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; give --out a folder")
    runs, unread = read_runs(runs_dir)
    groups, repeated = group_runs(runs)
    arms = build_arms(groups)
    studies = report_training.find_studies(groups)
    left_out, notes = unread + repeated, [note for run in runs for note in run.notes]
    tables = [table for table in _tables(groups, arms, studies) if table.rows]
    try:
        for folder in (out / "tables", out / "figures"):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out, error) from error
    for table in tables:
        _write(out / "tables" / f"{table.name}.csv", csv_text(table))
    drawn = save(draw_all(groups, arms, studies), out / "figures")
    figures = {f"figures/{name}": drawing for name, drawing in drawn.items()}
    _write(out / "report.json", json.dumps(_as_json(groups, tables, figures, left_out, notes), indent=1) + "\n")
    _write(out / "report.md", _as_markdown(groups, tables, figures, left_out, notes))
    console = Console()
    for line in _remarks(left_out, notes):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    counted = f"{sum(len(group.runs) for group in groups)} runs in {len(groups)} groups"
    console.print(Text(f"{counted}: {len(tables)} tables and {len(figures)} figures in {out / 'report.md'}"), soft_wrap=True)


def _tables(groups: Sequence[RunGroup], arms: Sequence[Arm], studies: Sequence[report_training.Study]) -> list[Table]:
    """In the order in which a reader wants them."""
    return [
        report_tables.accuracy_table(arms),
        report_tables.settings_table(arms),
        report_tables.pass_at_k_table(arms),
        report_tables.out_of_domain_table(arms),
        report_tables.mixture_table(arms),
        report_tables.mixture_by_index_table(arms),
        report_training.training_table(groups),
        report_training.cost_table(groups),
        *(report_training.study_table(key, [s for s in studies if s.key == key]) for key in report_training.STUDIED),
    ]


def _as_json(
    groups: Sequence[RunGroup],
    tables: Sequence[Table],
    figures: dict[str, Drawing],
    left_out: Sequence[LeftOut],
    notes: Sequence[str],
) -> dict[str, Any]:
    return {
        "groups": [
            {
                "label": group.label,
                "settings": dict(group.settings),
                "runs": [
                    {
                        "name": run.folder.name,
                        "seed": run.config.run.seed,
                        "steps": len(run.metrics),
                        "tested_step": run.tested_step,
                    }
                    for run in group.runs
                ],
            }
            for group in groups
        ],
        "left_out": [{"name": run.name, "reason": run.reason} for run in left_out],
        "notes": list(notes),
        "tables": {table.name: {"title": table.title, "note": table.note, "rows": json_rows(table)} for table in tables},
        "figures": {path: {"title": drawing.title, "note": drawing.note} for path, drawing in figures.items()},
    }


def _as_markdown(
    groups: Sequence[RunGroup],
    tables: Sequence[Table],
    figures: dict[str, Drawing],
    left_out: Sequence[LeftOut],
    notes: Sequence[str],
) -> str:
    parts = ["# Report", *(f"- {line}" for line in _remarks(left_out, notes)), "## Runs"]
    for group in groups:
        runs = (f"{run.folder.name} ({len(run.metrics)} steps{_tested(run)})" for run in group.runs)
        differences = f" [{group.differences}]" if "#" in group.label else ""
        parts.append(f"- {Path(group.model).name}, {group.train}, {group.label}{differences}: {', '.join(runs)}")
    for table in tables:
        if table.shown:
            parts += [f"## {table.title}", *([table.note] if table.note else []), markdown(table)]
        else:
            parts += [f"## {table.title}", f"[tables/{table.name}.csv](tables/{table.name}.csv)"]
    for path, drawing in figures.items():
        parts += [f"## {drawing.title}", drawing.note, f"![{drawing.title}]({path})"]
    text = "\n\n".join(parts)
    return text.replace("\n\n- ", "\n- ") + "\n"


def _tested(run: Run) -> str:
    return "" if run.tested_step is None else f", tested at {run.tested_step}"


def _remarks(left_out: Sequence[LeftOut], notes: Sequence[str]) -> list[str]:
    return [*(f"left out {run.name}: {run.reason}" for run in left_out), *(f"note {note}" for note in notes)]


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda partial: partial.write_text(text))

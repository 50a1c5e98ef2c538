"""What a terminal shows of a run: a panel that is redrawn, or, where nothing can be redrawn (a file, a pipe), one line a step.

It reads the rows of metrics.jsonl and nothing else. `eval/SETTING` and `reward/correct` are shares of right answers.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from configs.schema import Config, Mode

HISTORY = 40  # steps in the sparkline
PACE = 10  # steps that the ETA averages over
SPARKS = "▁▂▃▄▅▆▇█"
PARTS = {"wait for rollouts": "yellow", "learn": "green", "push": "magenta"}  # of a step's time
BAR, PANEL = 30, 100  # characters


class LiveView:
    """Context manager; safe to use where no terminal is attached. `console` is for tests and for other outputs than stdout."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console()
        self.rows: list[Mapping[str, float]] = []
        self.evals: dict[str, tuple[int, float]] = {}  # setting: (step, share right)
        self._last_step = time.monotonic()
        redraws = self.console.is_terminal and not self.console.options.ascii_only
        # Twice a second: enough to show that it lives, and nothing taken from two cores that have a model to train.
        self._live = Live(console=self.console, get_renderable=self.panel, refresh_per_second=2) if redraws else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        else:
            self.note(f"{self.config.run.name}: {describe(self.config)}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Show a row of metrics.jsonl: `step` (finished optimiser steps), `time/step` (seconds), and whatever was measured."""
        self.rows.append(metrics)
        self._last_step = time.monotonic()
        for key, value in metrics.items():
            if key.startswith("eval/"):
                self.evals[key.removeprefix("eval/")] = int(metrics["step"]), value
        if self._live is None:
            self.note(self.line())
        else:
            self._live.refresh()

    def note(self, text: str) -> None:
        """One line that stays: above the panel on a terminal."""
        self.console.print(Text(text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table that stays. The first column is names, the others are numbers."""
        self.console.print(make_table(title, columns, rows))

    # ------------------------------------------------------------------ one line a step

    def line(self) -> str:
        """The newest row in one line of ASCII."""
        row, total = self.rows[-1], self.config.run.steps
        split = ", ".join(f"{name} {share:.0%}" for name, share in time_split(row).items())
        parts = [
            f"step {int(row['step'])}/{total}",
            f"reward {_number(row, 'reward/mean', '.1f')}",
            f"correct {_number(row, 'reward/correct', '.1%')}",
            f"rollout {_number(row, 'rollout/tokens_per_s', ',.0f')} tok/s",
            f"learner {_number(row, 'learner/tokens_per_s', ',.0f')} tok/s",
            f"residual {_number(row, 'learner/residual_mean', '.4f')}",
            f"{row['time/step']:.1f} s" + (f" ({split})" if split else ""),
        ]
        parts += [f"{setting} {value:.1%}" for setting, (step, value) in self.evals.items() if step == row["step"]]
        if (left := self.seconds_left()) is not None:
            parts.append(f"ETA {duration(left)}")
        return " | ".join(parts)

    # ------------------------------------------------------------------ the panel

    def panel(self) -> RenderableType:
        """Progress, the newest row and the latest evaluations, as wide as the terminal but at most PANEL characters."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column()
        grid.add_row("step", self._progress())
        if self.rows:
            self._add_measurements(grid, self.rows[-1])
        if self.evals:
            last = max(step for step, _ in self.evals.values())
            found = "   ".join(f"{setting} {value:.1%}" for setting, (_, value) in self.evals.items())
            grid.add_row("eval", f"{found}   (step {last})")
        width = min(self.console.width, PANEL)
        return Panel(grid, title=f"[bold]{self.config.run.name}[/bold]", subtitle=describe(self.config), width=width)

    def _add_measurements(self, grid: Table, row: Mapping[str, float]) -> None:
        rewards = [r["reward/mean"] for r in self.rows[-HISTORY:] if "reward/mean" in r]
        grid.add_row("reward", Text.assemble((_number(row, "reward/mean", ".1f"), "bold"), "  ", (sparkline(rewards), "cyan")))
        grid.add_row("correct", f"{_number(row, 'reward/correct', '.1%')} of the samples")
        rollout, learner = (_number(row, f"{who}/tokens_per_s", ",.0f") for who in ("rollout", "learner"))
        grid.add_row("tokens/s", f"rollout {rollout}   learner {learner}")
        if "learner/residual_mean" in row:  # hard steps have none
            grid.add_row("residual", f"{row['learner/residual_mean']:.4f}   (1 on-policy)")
        if split := time_split(row):
            bar, begin = Text(f"{row['time/step']:.1f} s  "), 0.0
            for name, share in split.items():
                bar.append("━" * (round((begin + share) * BAR) - round(begin * BAR)), style=PARTS[name])
                begin += share
            legend = Text("  ").join(Text(f"{name} {share:.0%}", style=PARTS[name]) for name, share in split.items())
            grid.add_row("step time", Group(bar, legend))

    def _progress(self) -> RenderableType:
        done, total = int(self.rows[-1]["step"]) if self.rows else 0, self.config.run.steps
        since, left = duration(time.monotonic() - self._last_step), self.seconds_left()
        ahead = f"starting, {since}"
        if self.rows:
            ahead = "done" if left is None else f"step {done + 1} for {since}   ETA {duration(left)}"
        line = Table.grid(padding=(0, 2))
        line.add_row(f"{done}/{total}", ProgressBar(total=total, completed=done, width=BAR), ahead)
        return line

    def seconds_left(self) -> float | None:
        """By the mean time of the last steps; None before the first and after the last one."""
        times = [row["time/step"] for row in self.rows[-PACE:]]
        left = self.config.run.steps - int(self.rows[-1]["step"]) if self.rows else 0
        return left * sum(times) / len(times) if left > 0 else None


def describe(config: Config) -> str:
    """Mode, noise, model and batch in a line."""
    policy, rollout = config.policy, config.rollout
    noise = "" if policy.mode is Mode.hard else f", gamma {policy.gamma:g}"
    batch = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples"
    return f"{policy.mode} (tau {policy.tau:g}{noise}), {config.model.path}, {batch}"


def time_split(row: Mapping[str, float]) -> dict[str, float]:
    """Shares of a step: the learner waiting for rollouts, the push of weights, and what is left, which is learning."""
    if "time/wait_rollout" not in row:
        return {}
    step = row["time/step"]
    wait, push = row["time/wait_rollout"] / step, row.get("push/seconds", 0.0) / step
    return {"wait for rollouts": wait, "learn": max(0.0, 1.0 - wait - push), "push": push}


def sparkline(values: Sequence[float]) -> str:
    """Bars from the lowest to the highest value; a flat line for equal ones."""
    if not values:
        return ""
    low, high = min(values), max(values)
    top = len(SPARKS) - 1
    return "".join(SPARKS[round((value - low) / (high - low) * top) if high > low else top // 2] for value in values)


def duration(seconds: float) -> str:
    """Two units: "8 s", "4 min 10 s", "2 h 05 min", "3 d 4 h"."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 3600:
        return f"{s // 60} min {s % 60:02d} s"
    if s < 86400:
        return f"{s // 3600} h {s % 3600 // 60:02d} min"
    return f"{s // 86400} d {s % 86400 // 3600} h"


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """Names on the left, numbers right-aligned."""
    table = Table(title=title or None, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _number(row: Mapping[str, Any], key: str, form: str) -> str:
    return format(row[key], form) if key in row else "-"

"""The figures of a report, as PNG files: pass@k, entropy by CoT index, training curves, studies.

A colour is a way of training, the same in every figure; groups that share it differ in the line's style. Figures are made without
pyplot, so nothing global is set and no display is needed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from numpy.typing import NDArray

from cluster.paper_numbers import BASE, COLUMNS, paper_number
from cluster.report_runs import Arm, Run, RunGroup, trained_arm
from cluster.report_tables import datasets, pass_curve, scores
from cluster.report_training import STUDIED, Study
from configs.schema import EVAL_SETTINGS, Mode
from rollout.eval_statistics import IndexMeans
from rollout.files import replace_file

# Okabe and Ito's palette: told apart in print and by colour-blind readers.
COLOURS = {BASE: "#6e6e6e", Mode.hard: "#0072B2", Mode.fuzzy: "#E69F00", Mode.soft: "#009E73"}
STYLES = ("-", "--", "-.", ":")
PANEL = (4.2, 3.2)  # inches
DPI = 150
BAND = 0.15  # opacity of an interval
CHARACTERS_AN_INCH = 13  # of the legend's font
SMOOTHED = 100  # points a training curve is averaged down to, at most

MARKED = 20  # points at most of a curve that shows each of them

TRAINING_PANELS = {  # metric: title and factor
    "reward/mean": ("reward", 1),
    "reward/correct": ("right samples, %", 100),
    "validation": ("right in validation, %", 100),
    "rollout/cot_length_mean": ("CoT tokens", 1),
    "learner/cot_entropy_mean": ("entropy of a CoT step at its temperature, nats", 1),
    "learner/grad_norm": ("gradient norm before the clip", 1),
}


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure and where it belongs."""

    name: str  # of its file, without .png
    title: str
    note: str  # what its marks mean
    figure: Figure


def draw_all(groups: Sequence[RunGroup], arms: Sequence[Arm], studies: Sequence[Study]) -> Iterator[Drawing]:
    """Every figure that has something to show."""
    for model, train in dict.fromkeys((arm.model, arm.train) for arm in arms):
        here = [arm for arm in arms if (arm.model, arm.train) == (model, train)]
        family = [group for group in groups if (group.model, group.train) == (model, train)]
        where = f"{Path(model).name}, trained on {train}"
        for dataset in datasets(here):
            yield from pass_at_k_figure(here, dataset, f"{where}, tested on {dataset}")
            yield from entropy_figure(here, dataset, f"{where}, tested on {dataset}")
        yield from training_figure(family, where)
    for study in studies:
        yield from study_figure(study)


def save(drawings: Iterable[Drawing], folder: Path) -> dict[str, Drawing]:
    """Write folder/NAME.png of each; returns them by file name. Raises RunError when one cannot be written."""
    saved: dict[str, Drawing] = {}
    for drawing in drawings:
        name, number = f"{drawing.name}.png", 1
        while name in saved:  # two models of one name in different folders
            number += 1
            name = f"{drawing.name}_{number}.png"
        replace_file(folder / name, partial(drawing.figure.savefig, format="png", dpi=DPI))
        saved[name] = drawing
    return saved


# --- the four kinds --------------------------------------------------------------------------------------------------


def pass_at_k_figure(arms: Sequence[Arm], dataset: str, where: str) -> Iterator[Drawing]:
    """pass@k over k, a panel for each sampled setting; the paper's numbers are open circles, bands are 95 % over problems."""
    settings = [s for s in EVAL_SETTINGS if any(_samples(arm, dataset, s) > 1 for arm in arms)]
    if not settings:
        return
    figure, panels = _panels(len(settings), f"pass@k: {where}", share_y=True)
    for axes, setting in zip(panels, settings, strict=True):
        for arm, style in _styled(arms):
            if _samples(arm, dataset, setting) == 0:
                continue
            low, mean, high = pass_curve(arm.summaries(dataset, setting))
            k = np.arange(1, len(mean) + 1)
            axes.plot(k, 100 * mean, label=arm.label, **style, **_points(mean))
            axes.fill_between(k, 100 * low, 100 * high, color=style["color"], alpha=BAND, linewidth=0)
            _mark_paper(axes, arm, dataset, setting)
        axes.set_xscale("log", base=2)
        _plain_ticks(axes.xaxis)
        axes.set(title=setting.replace("_", " "), xlabel="k")
    panels[0].set_ylabel("pass@k, %")
    note = "Mean over problems and seeds; bands: 95 % bootstrap intervals over problems; open circles: the paper."
    yield _drawing(figure, panels, "pass@k", where, note)


def entropy_figure(arms: Sequence[Arm], dataset: str, where: str) -> Iterator[Drawing]:
    """Mean entropy of the mixture at each CoT index, over the samples of all seeds that reached it."""

    def profile(arm: Arm, setting: str) -> IndexMeans:
        return IndexMeans.merged(summary.entropy for summary in arm.summaries(dataset, setting))

    settings = [s for s in EVAL_SETTINGS if any(len(profile(arm, s).counts) for arm in arms)]
    if not settings:
        return
    figure, panels = _panels(len(settings), f"entropy by CoT index: {where}", share_y=True)
    for axes, setting in zip(panels, settings, strict=True):
        for arm, style in _styled(arms):
            if len(entropy := profile(arm, setting).mean):
                axes.plot(np.arange(len(entropy)), entropy, label=arm.label, **style, **_points(entropy))
        axes.set(title=setting.replace("_", " "), xlabel="CoT index")
        _whole_steps(axes)
    panels[0].set_ylabel("entropy, nats")
    note = "Mean over the samples of all seeds that reached the index, at the setting's temperature; a hard thought records none."
    yield _drawing(figure, panels, "entropy", where, note)


def training_figure(groups: Sequence[RunGroup], where: str) -> Iterator[Drawing]:
    """Metrics over steps: the mean over seeds, and from the lowest to the highest seed. Validation begins before the first step."""

    def series(run: Run, key: str) -> dict[int, float]:
        name = f"eval/{run.config.selecting_setting}" if key == "validation" else key
        found = {int(row["step"]): row[name] for row in run.metrics if name in row}
        return {0: run.base_validation} | found if key == "validation" and run.base_validation is not None else found

    keys = [key for key in TRAINING_PANELS if any(series(run, key) for group in groups for run in group.runs)]
    if not keys:
        return
    figure, panels = _panels(len(keys), f"training: {where}", share_y=False)
    for axes, key in zip(panels, keys, strict=True):
        title, factor = TRAINING_PANELS[key]
        for group, style in _styled([trained_arm(group) for group in groups], groups):
            steps, values = over_steps([series(run, key) for run in group.runs])
            if len(steps):
                values = factor * values
                axes.plot(steps, values.mean(axis=0), label=group.label, **style, **_points(steps))
                axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=BAND, linewidth=0)
        axes.set(title=title, xlabel="step")
        _whole_steps(axes)
        if key == "learner/grad_norm":
            axes.set_yscale("log")
    yield _drawing(figure, panels, "training", where, "Mean over seeds; bands: from the lowest to the highest seed.")


def study_figure(study: Study) -> Iterator[Drawing]:
    """Accuracy on each test set over the key's values; bars are standard deviations over seeds."""
    arms = [trained_arm(group) for group in study.groups]
    tests = datasets(arms)
    if not tests:
        return
    first = study.groups[0]
    kind, where = STUDIED[study.key], f"{Path(first.model).name}, trained on {first.train}, {study.label}"
    figure, panels = _panels(len(tests), f"{kind}: {where}", share_y=False)
    for axes, dataset in zip(panels, tests, strict=True):
        for (setting, k), style in zip(COLUMNS, STYLES, strict=False):
            found = [(study.value(g), scores(arm, dataset, setting, k)) for g, arm in zip(study.groups, arms, strict=True)]
            points = [(value, m.mean, m.std or 0.0) for value, m in found if m is not None and m.mean is not None]
            if points:
                x, y, bars = zip(*points, strict=True)
                label = f"{setting.replace('_', ' ')} pass@{k}"
                axes.errorbar(
                    x, y, bars, marker="o", capsize=3, linestyle=style, label=label, color=COLOURS[first.config.policy.mode]
                )
        values = [study.value(group) for group in study.groups]
        if min(values) > 0:  # a gamma of 0 has no place on a logarithmic axis
            axes.set_xscale("log")
        axes.set_xticks(values)
        _plain_ticks(axes.xaxis)
        axes.set(title=dataset, xlabel=study.key)
    panels[0].set_ylabel("%")
    yield _drawing(figure, panels, kind, where, "Mean over seeds; bars: standard deviations over seeds.")


# --- parts -----------------------------------------------------------------------------------------------------------


def over_steps(runs: Sequence[Mapping[int, float]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The steps that all runs have [T] and their values [runs, T], averaged over windows of steps where there are many."""
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    width = -(-len(steps) // SMOOTHED) or 1
    windows = [steps[i : i + width] for i in range(0, len(steps), width)]
    values = [[float(np.mean([run[step] for step in window])) for window in windows] for run in runs]
    return np.array([np.mean(window) for window in windows]), np.array(values)


def _samples(arm: Arm, dataset: str, setting: str) -> int:
    """The most samples of any problem."""
    return max((int(summary.drawn.max()) for summary in arm.summaries(dataset, setting)), default=0)


def _points(curve: NDArray[np.float64]) -> dict[str, Any]:
    """A mark at each point of a short curve: one of a single point would be no line at all."""
    return {"marker": "o", "markersize": 3.5} if len(curve) <= MARKED else {}


def _whole_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _mark_paper(axes: Axes, arm: Arm, dataset: str, setting: str) -> None:
    if arm.like_paper:
        for k in [k for s, k in COLUMNS if s == setting]:
            if (number := paper_number(arm.model, arm.train, dataset, arm.trained, setting, k)) is not None:
                axes.plot([k], [number], marker="o", markerfacecolor="none", linestyle="none", color=COLOURS[arm.trained])


def _styled(arms: Sequence[Arm], items: Sequence[Any] | None = None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each of `items`, or each arm itself, with the colour of its training and a style of its own among those of that colour."""
    used: dict[str, int] = {}
    for arm, item in zip(arms, items or arms, strict=True):
        place = used[arm.trained] = used.get(arm.trained, -1) + 1
        yield item, {"color": COLOURS[arm.trained], "linestyle": STYLES[place % len(STYLES)], "linewidth": 1.6}


def _panels(count: int, title: str, share_y: bool) -> tuple[Figure, list[Axes]]:
    """A grid of at most three columns, without a hole if it can be."""
    columns = 2 if count == 4 else min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=share_y)
    panels = list(grid.flat)
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.title.set_fontsize(10)
    for axes in panels[count:]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure, panels[:count]


def _plain_ticks(axis: Any) -> None:
    """Numbers as they are on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _drawing(figure: Figure, panels: Sequence[Axes], kind: str, where: str, note: str) -> Drawing:
    """One legend below all panels, each line once."""
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    columns = max(1, int(figure.get_figwidth() * CHARACTERS_AN_INCH / (max(map(len, lines), default=0) + 8)))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return Drawing(re.sub(r"[^A-Za-z0-9.-]+", "_", f"{kind}_{where}"), f"{kind}: {where}", note, figure)

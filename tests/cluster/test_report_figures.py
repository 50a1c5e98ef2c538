"""A small study gives every table and figure; figures show the numbers of the tables, and no more."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cluster.report import report
from cluster.report_figures import COLOURS, Drawing, draw_all, over_steps, save
from cluster.report_runs import build_arms, group_runs, read_runs
from cluster.report_tables import pass_curve
from cluster.report_training import find_studies
from configs.errors import InputError, RunError
from tests.cluster.evaluations import write_run

LLAMA = ["model.path=meta-llama/Llama-3.2-3B-Instruct", "task.train=gsm8k", "task.test=gsm8k:test"]
SETTINGS = ["hard_greedy", "hard_sample", "soft_greedy", "soft_sample", "fuzzy_greedy", "fuzzy_sample"]


def evaluation(seed: int, skill: float) -> dict[str, list[list[bool]]]:
    """Six settings on 12 problems, eight samples where they are sampled; some are right."""
    right = np.random.default_rng(seed).random((12, 8)) < skill
    return {s: [row[: 1 if s.endswith("greedy") else 8].tolist() for row in right] for s in SETTINGS}


def steps(seed: int, seconds: float) -> list[dict[str, float]]:
    rows = []
    for i in range(12):
        row = {
            "time/step": seconds,
            "rollout/tokens": 1e4,
            "learner/tokens": 1e4,
            "push/bytes": 1.2e10,
            "learner/grad_norm": 50.0 + i,
        }
        row |= {"reward/mean": 10.0 + i + seed, "reward/correct": i / 20, "rollout/cot_length_mean": 90.0 - i}
        rows.append(row | ({"eval/hard_greedy": i / 15} if i % 3 == 2 else {}))
    return rows


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three modes by two seeds, two more noises and one more group size."""
    runs = tmp_path_factory.mktemp("study")
    for seed in (0, 1):
        for i, mode in enumerate(("hard", "fuzzy", "soft")):
            tests = {0: evaluation(9 + seed, 0.3), 12: evaluation(20 + 3 * seed + i, 0.5 + 0.1 * i)}
            keys = [*LLAMA, f"policy.mode={mode}", f"run.seed={seed}"]
            write_run(runs, f"{mode}_{seed}", keys, metrics=steps(seed, 10.0 + i), tests=tests)
    for gamma in (0.1, 1.0):
        write_run(runs, f"gamma_{gamma}", [*LLAMA, f"policy.gamma={gamma}"], metrics=steps(2, 12.0), tests={9: evaluation(3, 0.6)})
    write_run(
        runs, "large_groups", [*LLAMA, "rollout.samples_per_prompt=32"], metrics=steps(2, 30.0), tests={9: evaluation(4, 0.7)}
    )
    return runs


def drawings(runs: Path) -> dict[str, Drawing]:
    groups, _ = group_runs(read_runs(runs)[0])
    found = list(draw_all(groups, build_arms(groups), find_studies(groups)))
    assert len({drawing.name for drawing in found}) == len(found)
    return {drawing.name.partition("_Llama")[0]: drawing for drawing in found}


def test_a_small_study_gives_every_table_and_figure(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report"
    report(study, out)
    assert "9 runs in 6 groups" in capsys.readouterr().out
    tables = {path.stem for path in (out / "tables").iterdir()}
    assert tables == {
        *("accuracy", "settings", "pass_at_k", "mixtures", "mixture_by_index", "training", "cost"),
        *("study_rollout_samples_per_prompt", "study_policy_gamma"),
    }
    text = (out / "report.md").read_text()
    linked = re.findall(r"\]\((\S+)\)", text)
    assert {path.partition("/")[0] for path in linked} == {"tables", "figures"}
    assert all((out / path).is_file() for path in linked)
    assert "(75.9)" in text and "(97.9)" in text
    figures = list((out / "figures").iterdir())
    assert len(figures) == 5 == len([path for path in linked if path.startswith("figures/")])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in figures)
    content = json.loads((out / "report.json").read_text())
    assert set(content["tables"]) == tables and len(content["groups"]) == 6
    assert not [path for path in study.iterdir() if path.name == "report"]


def test_a_report_is_the_same_when_it_is_made_again(study: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        report(study, tmp_path / name)
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / n).rglob("*") if p.suffix in (".md", ".json", ".csv")} for n in ("one", "two")
    )
    assert one == two


def test_runs_without_evaluations_give_training_tables_and_curves(tmp_path: Path) -> None:
    write_run(tmp_path, "soft", metrics=steps(0, 1.0))
    report(tmp_path, None)
    out = tmp_path / "report"
    assert {path.stem for path in (out / "tables").iterdir()} == {"training", "cost"}
    assert [path.name.partition("_")[0] for path in (out / "figures").iterdir()] == ["training"]


def test_lines_are_the_curves_of_the_tables(study: Path) -> None:
    drawing = drawings(study)["pass_k"]
    groups, _ = group_runs(read_runs(study)[0])
    panels = {axes.get_title(): axes for axes in drawing.figure.axes}
    assert list(panels) == ["hard sample", "soft sample", "fuzzy sample"]
    for arm in build_arms(groups):
        (line,) = [line for line in panels["soft sample"].lines if line.get_label() == arm.label]
        assert np.allclose(line.get_ydata(), 100 * pass_curve(arm.summaries("gsm8k:test", "soft_sample"))[1])
        assert line.get_color() == COLOURS[arm.trained]
    circles = [
        (float(x), float(y)) for line in panels["hard sample"].lines if line.get_marker() == "o" for x, y in line.get_xydata()
    ]
    assert (1.0, 74.3) in circles and (32.0, 97.9) in circles  # the paper's


def test_the_entropy_figure_has_the_soft_settings_alone(study: Path) -> None:
    axes = {a.get_title(): a for a in drawings(study)["entropy"].figure.axes if a.get_visible()}
    assert list(axes) == ["soft greedy", "soft sample", "fuzzy greedy", "fuzzy sample"]
    for line in axes["soft sample"].lines:
        assert line.get_ydata().tolist() == pytest.approx([0.6931, 1.3863])


def test_a_seed_that_stopped_early_does_not_bend_the_mean() -> None:
    x, y = over_steps([{1: 1.0, 2: 2.0, 3: 9.0}, {1: 3.0, 2: 4.0}])
    assert x.tolist() == [1, 2] and y.tolist() == [[1, 2], [3, 4]]
    x, y = over_steps([{i: float(i) for i in range(1, 1001)}])
    assert len(x) == 100 and x[0] == 5.5 and y[0, 0] == 5.5 and y[0, -1] == 995.5


def test_what_cannot_be_written_is_one_line(study: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file: is a file; give --out a folder"):
        report(study, tmp_path / "file")
    with pytest.raises(RunError, match=r"cannot be written"):
        report(study, tmp_path / "file" / "below")
    with pytest.raises(RunError, match=r"cannot be written"):
        save([drawings(study)["training"]], tmp_path / "nowhere")


def test_figures_of_one_name_do_not_replace_each_other(study: Path, tmp_path: Path) -> None:
    drawing = drawings(study)["training"]
    assert list(save([drawing, drawing], tmp_path)) == [f"{drawing.name}.png", f"{drawing.name}_2.png"]
    assert len(list(tmp_path.iterdir())) == 2

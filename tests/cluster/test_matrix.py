"""A matrix is checked as a whole before its first run starts, and never repeats what is there."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import matrix as module
from cluster.evaluation import write_summary
from cluster.matrix import BEGUN, FINISHED, NEW, bases, evaluated, expand, matrix, read_matrix
from configs.errors import InputError, RunError
from configs.load import dump_config
from configs.schema import Mode
from tests.cluster.evaluations import write_run

CONFIGS = Path(__file__).parents[2] / "configs"
STUDY: dict[str, Any] = {
    "recipes": [str(CONFIGS / "demo.yaml")],
    "axes": {"policy.mode": ["hard", "soft"], "run.seed": [0, 1]},
    "set": {"run.name": "${policy.mode}_${run.seed}", "eval.settings": ["hard_greedy", "soft_greedy"]},
}


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "study.yaml"
    content = {**STUDY, **changes}
    content["set"] = {"run.dir": str(folder / "runs"), **content["set"]}
    path.write_text(yaml.safe_dump(content))
    return path


def test_it_is_the_product_of_its_axes(tmp_path: Path) -> None:
    path = write(tmp_path)
    runs = list(expand(path, read_matrix(path)))
    assert [run.config.run.name for run in runs] == ["hard_0", "hard_1", "soft_0", "soft_1"]
    assert [run.config.policy.mode for run in runs] == [Mode.hard, Mode.hard, Mode.soft, Mode.soft]
    assert {run.config.policy.tau for run in runs} == {1.0, 0.5}  # each mode has its own
    assert all(run.config.eval.settings == ["hard_greedy", "soft_greedy"] for run in runs)
    assert bases(runs) == {"hard_0", "hard_1"}  # the untrained model is evaluated once a seed


def test_values_of_every_kind_reach_the_config(tmp_path: Path) -> None:
    task = {"path": "a, b.jsonl", "question": "q", "answer": "a: #"}
    fixed = {
        "task.test": task,
        "engine.enforce_eager": True,
        "learner.lr": 1e-6,
        "engine.threads": None,
        "task.prompt": "x: {question}",
    }
    path = write(tmp_path, axes={}, set=fixed)
    [run] = expand(path, read_matrix(path))
    config = run.config
    assert (config.task.test, config.engine.enforce_eager, config.learner.lr) == (task, True, 1e-6)
    assert config.engine.threads is None and config.task.prompt == "x: {question}"


@pytest.mark.parametrize("name", ["small", "paper"])
def test_the_shipped_matrices_have_a_folder_for_every_run(name: str) -> None:
    path = CONFIGS / "matrix" / f"{name}.yaml"
    runs = list(expand(path, read_matrix(path)))
    assert len({run.folder for run in runs}) == len(runs) == {"small": 6, "paper": 45}[name]
    assert {run.folder.parent.name for run in runs} == {name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipies": []}, "unknown key recipies: expected one of recipes, set, axes, eval"),
        ({"recipes": []}, "recipes = .*expected a list of recipes"),
        ({"axes": {"run.seed": 3}}, r"axes.run.seed = 3: expected a list of values"),
        ({"axes": {"run.seed": [1, 1]}}, "none twice"),
        ({"axes": {"run.sed": [1]}}, "unknown key run.sed: did you mean run.seed"),
        ({"axes": {"run.name": ["a", "b"]}}, "run.name stands in set and in axes"),
        ({"set": {"run.name": "same"}}, "run.name = same is that of two runs .*name the axes in it"),
        ({"set": {"run.dir": "${policy.mode}", **STUDY["set"]}}, "run.dir = soft: expected one folder for all runs"),
        ({"eval": {"setings": "all"}}, "unknown key eval.setings"),
        ({"eval": {"problems": "many"}}, "eval.problems = many: expected a whole number"),
        ({"recipes": ["no.yaml"]}, "no.yaml: no such file"),
    ],
)
def test_a_mistake_stops_all_of_it(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        matrix(write(tmp_path, **changes), dry_run=False, resume=False)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix(write(tmp_path), dry_run=True, resume=False)
    shown = capsys.readouterr().out
    assert "4 runs" in shown and "soft_1" in shown and "nothing was started" in shown
    assert not (tmp_path / "runs").exists()


def finish(run: module.MatrixRun, state: str) -> None:
    """What is left of a run that ended so."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    (run.folder / "status.json").write_text(json.dumps({"state": state}))


def test_finished_runs_are_skipped_and_begun_ones_want_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are noted instead of run; tests/end_to_end runs them."""
    path = write(tmp_path)
    runs = list(expand(path, read_matrix(path)))
    finish(runs[0], "done")
    finish(runs[1], "interrupted")
    assert [run.state() for run in runs] == [FINISHED, BEGUN, NEW, NEW]
    with pytest.raises(InputError, match="run hard_1 was begun and is not finished; go on with it by --resume"):
        matrix(path, dry_run=False, resume=False)
    started = []

    def note(_: object, *command: str) -> bool:
        started.append(command)
        return len(started) != 2

    monkeypatch.setattr(module, "_softrl", note)
    with pytest.raises(RunError, match=r"1 of 4 runs failed: soft_0; .*--resume"):
        matrix(path, dry_run=False, resume=True)
    assert [command[0] for command in started] == ["train"] * 3
    assert ["--resume" in command for command in started] == [True, False, False]
    assert (tmp_path / "runs" / "report" / "report.md").exists()


def test_a_run_made_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    finish(next(expand(path, read_matrix(path))), "done")
    changed = write(tmp_path, set={**STUDY["set"], "learner.lr": 0.5})
    with pytest.raises(InputError, match=r"learner.lr = .*a resumed run keeps it, this command has 0.5"):
        matrix(changed, dry_run=True, resume=False)


def test_an_evaluation_is_done_when_nothing_of_it_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path, axes={}, set={"run.name": "one", "eval.samples": 3})
    [run] = expand(path, read_matrix(path))
    wanted = {"settings": ["hard_greedy", "soft_sample"], "datasets": ["arithmetic:test"], "problems": 2}
    assert not evaluated(run, 4, wanted)
    right = {"hard_greedy": [[True]] * 2, "soft_sample": [[True] * 3] * 2}
    write_run(tmp_path / "runs", "one", tests={4: right}, dataset="arithmetic:test")
    write_summary(tmp_path / "runs" / "one" / "eval" / "test_000004")
    assert evaluated(run, 4, wanted)
    assert not evaluated(run, 4, wanted | {"problems": 3})
    assert not evaluated(run, 4, wanted | {"settings": "all"})
    assert not evaluated(run, 4, wanted | {"datasets": ["arithmetic:test", "arithmetic:far"]})
    run.config.eval.samples = 4
    assert not evaluated(run, 4, wanted)

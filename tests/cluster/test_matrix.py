"""A matrix is checked as a whole before its first run starts, and never repeats what is there."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import matrix_runs
from cluster.controller import HeldOutTests
from cluster.eval_sets import EvalSets
from cluster.evaluation import evaluation_plan, write_summary
from cluster.matrix import checked, expand, matrix, read_matrix
from cluster.matrix_runs import BEGUN, FINISHED, NEW, MatrixRun, SharedEngines, bases, evaluated
from configs.errors import InputError, Interrupted, RunError
from configs.load import dump_config
from configs.schema import Config, Mode
from rollout.tasks import load_task
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
        (
            {"set": {**STUDY["set"], "eval.settings": ["soft_sample"]}},
            r"eval.settings = \[soft_sample\]: expected a greedy one too",
        ),
        ({"eval": {"setings": "all"}}, "unknown key eval.setings"),
        ({"eval": {"problems": "many"}}, "eval.problems = many: expected a whole number"),
        ({"eval": {"problems": 0}}, "eval.problems = 0: expected at least 1"),
        ({"eval": {"settings": ["hard_gredy"]}}, "eval.settings = .*did you mean hard_greedy"),
        ({"eval": {"datasets": ["gsm9k"]}}, "unknown task 'gsm9k'; did you mean 'gsm8k'"),
        ({"eval": {"datasets": ["choices=no.jsonl"]}}, "no.jsonl: no such file"),
        ({"keep_checkpoints": "no way"}, "keep_checkpoints = no way: expected true or false"),
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


def finish(run: MatrixRun, state: str) -> None:
    """What is left of a run that ended so, its tests and the weights of its best validation, at step 4."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(dump_config(run.config))
    (run.folder / "status.json").write_text(json.dumps({"state": state}))
    for name in ("step_000005", "best"):
        (run.folder / "checkpoints" / name).mkdir(parents=True)
        (run.folder / "checkpoints" / name / "controller.json").write_text('{"step": 4}')
        (run.folder / "checkpoints" / name / "__0_0.distcp").write_bytes(b"weights")


def test_it_completes_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings and evaluations are noted instead of run, and one fails; tests/end_to_end runs them."""
    path = write(tmp_path, eval={"datasets": ["arithmetic:test"], "problems": 2, "settings": "all"}, keep_checkpoints=False)
    runs = list(expand(path, read_matrix(path)))
    finish(runs[0], "done")
    finish(runs[1], "interrupted")
    assert [run.state() for run in runs] == [FINISHED, BEGUN, NEW, NEW]
    with pytest.raises(InputError, match="run hard_1 was begun and is not finished; go on with it by --resume"):
        matrix(path, dry_run=False, resume=False)
    trained, tested = [], []

    def train(config: Config, resume: bool, tests: HeldOutTests, engines: object) -> None:
        trained.append((config.run.name, resume, tests.base, len(tests.config.eval.settings), len(tests.sets.tasks[0][1])))
        if config.run.name == "soft_0":
            raise RunError("no more")
        run = next(run for run in runs if run.folder.name == config.run.name)
        if run.state() == NEW:
            finish(run, "done")

    def run_evaluation(config: Config, checkpoint: Path | None, sets: EvalSets, out: Path) -> None:
        tested.append((out.name, checkpoint and checkpoint.name, len(config.eval.settings)))

    monkeypatch.setattr(matrix_runs, "train", train)
    monkeypatch.setattr(matrix_runs, "run_evaluation", run_evaluation)
    monkeypatch.setattr(matrix_runs, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(SharedEngines, "for_run", lambda *_: None)
    with pytest.raises(RunError, match=r"1 of 4 runs failed: soft_0; .*--resume"):
        matrix(path, dry_run=False, resume=True)
    assert trained == [("hard_1", True, True, 6, 2), ("soft_0", False, False, 6, 2), ("soft_1", False, False, 6, 2)]
    # what training would have left tested, were it not noted only; the untrained model once a seed
    assert tested == [(f"hard_{seed}", which, 6) for seed in (0, 1) for which in ("best", None)] + [("soft_1", "best", 6)]
    assert (tmp_path / "runs" / "report" / "report.md").exists()
    kept = sorted(str(file.relative_to(tmp_path / "runs")) for file in tmp_path.glob("runs/*/checkpoints/**/*") if file.is_file())
    assert kept == [f"{name}/checkpoints/best/controller.json" for name in ("hard_0", "hard_1", "soft_1")]


def test_ctrl_c_starts_no_further_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    trained = []

    def train(config: Config, *_: object) -> None:
        trained.append(config.run.name)
        raise Interrupted("runs/hard_0: interrupted; go on with --resume")

    monkeypatch.setattr(matrix_runs, "train", train)
    monkeypatch.setattr(matrix_runs, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(SharedEngines, "for_run", lambda *_: None)
    with pytest.raises(Interrupted, match=r"study.yaml: interrupted; go on with --resume"):
        matrix(path, dry_run=False, resume=False)
    assert trained == ["hard_0"]


def test_a_run_made_with_other_settings_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path = write(tmp_path)
    finish(next(expand(path, read_matrix(path))), "done")
    changed = write(tmp_path, set={**STUDY["set"], "learner.lr": 0.5})
    with pytest.raises(InputError, match=r"learner.lr = .*a resumed run keeps it, this command has 0.5"):
        matrix(changed, dry_run=True, resume=False)


def test_an_evaluation_is_done_when_nothing_of_it_is_missing(tmp_path: Path) -> None:
    def run_of(settings: object = ("hard_greedy", "soft_sample"), problems: int = 2, **fixed: object) -> MatrixRun:
        evaluation = {"settings": settings if settings == "all" else list(settings), "datasets": tasks, "problems": problems}
        path = write(tmp_path, axes={}, set={"run.name": "one", "eval.samples": 3, **fixed}, eval=evaluation)
        content = read_matrix(path)
        [run] = checked(path, content, list(expand(path, content)))
        return run

    tasks = ["arithmetic:test"]
    assert not evaluated(run_of(), 4)
    right = {"hard_greedy": [[True]] * 2, "soft_sample": [[True] * 3] * 2}
    first = run_of()
    plan = evaluation_plan(first.test_config, 4, "arithmetic:test", first.sets.tasks[0][1], sigma=0.25)
    write_run(tmp_path / "runs", "one", tests={4: right}, plan=plan)
    write_summary(tmp_path / "runs" / "one" / "eval" / "test_000004")
    assert evaluated(run_of(), 4)
    assert not evaluated(run_of(problems=3), 4)
    assert not evaluated(run_of("all"), 4)
    assert not evaluated(run_of(**{"eval.samples": 4}), 4)
    with pytest.raises(InputError, match=r"max_cot_tokens = .*: this evaluation has 3"):
        evaluated(run_of(**{"eval.max_cot_tokens": 3}), 4)
    [(task, problems)] = first.sets.tasks
    changed = EvalSets([(task, [replace(problems[0], question="Why?"), *problems[1:]])], [])
    with pytest.raises(InputError, match=r"problem 0 of arithmetic:test had another question or answer"):
        evaluated(replace(first, sets=changed), 4)
    tasks.append("arithmetic:far")
    assert not evaluated(run_of(), 4)


def test_files_of_data_sets_may_lie_beside_the_matrix(tmp_path: Path) -> None:
    row = {"question": "Is ice cold?", "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "own.jsonl").write_text(json.dumps(row) + "\n")
    path = write(tmp_path, axes={}, set={"run.name": "one"}, eval={"datasets": ["choices=own.jsonl"]})
    content = read_matrix(path)
    [run] = checked(path, content, list(expand(path, content)))
    assert [(name, len(items)) for name, items in run.sets.choices] == [("own", 1)] and run.sets.tasks == []


def test_without_a_number_of_problems_it_is_tested_on_all_of_them(tmp_path: Path) -> None:
    def problems(**changes: Any) -> int:
        path = write(tmp_path, axes={}, set={"run.name": "one", "eval.problems": 3}, **changes)
        content = read_matrix(path)
        [run] = checked(path, content, list(expand(path, content)))
        return len(run.sets.tasks[0][1])

    assert problems() == 3 and problems(eval={"problems": 5}) == 5
    assert problems(eval={"datasets": ["arithmetic:test"]}) == len(load_task("arithmetic:test"))


def test_the_small_study_needs_nothing_from_elsewhere() -> None:
    path = CONFIGS / "matrix" / "small.yaml"
    content = read_matrix(path)
    runs = checked(path, content, list(expand(path, content)))
    assert {name for run in runs for name, _ in run.sets.choices} == {"everyday"}
    assert {len(run.test_config.eval.settings) for run in runs} == {6} and {run.test_config.eval.samples for run in runs} == {4}

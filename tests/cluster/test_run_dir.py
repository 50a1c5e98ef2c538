"""A run folder is made once, resumed only as the same run, and never holds half a file or a step twice."""

import asyncio
import json
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.controller import recorded_end
from cluster.run_dir import RunDir
from cluster.waits import wait
from configs.errors import InputError, RunError
from configs.load import load_config
from configs.schema import Config
from tests.full_disk import files_of_at_most


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {{name: first, dir: {tmp_path / 'runs'}, steps: 10}}\ntask: {{prompt: 'Q: {{question}} A: ${{run.name}}'}}\n"
    )
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; what a kill left of a line is no row."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def checkpoint(run: RunDir, step: int) -> Path:
    """A whole checkpoint, as far as the run folder is concerned."""
    folder = run.checkpoints / f"step_{step:06d}"
    folder.mkdir(parents=True)
    (folder / ".metadata").touch()
    (folder / "controller.json").write_text("{}")
    return folder


def interrupted(config: Config, *, at: int, rows: int) -> Path:
    """A run that was killed after `rows` steps, with a checkpoint at step `at`."""
    with RunDir.create(config, resume=False) as run:
        for step in range(1, rows + 1):
            run.metrics.write(step, {"reward/mean": 10.0 * step})
            if step == at:
                checkpoint(run, step)
    return run.folder


# New runs


def test_a_new_run_writes_its_config_so_that_it_reads_back_equal(recipe: Path) -> None:
    config = load_config(recipe, ["policy.mode=fuzzy"])
    with RunDir.create(config, resume=False) as run:
        assert load_config(run.folder / "config.yaml") == config
        assert run.step == 0 and run.resume_from is None and run.created
    (start,) = read_lines(run.folder / "events.jsonl")
    assert start["kind"] == "start" and datetime.fromisoformat(start["time"]).utcoffset() is not None


def test_an_existing_folder_is_refused_with_the_two_ways_out(recipe: Path) -> None:
    config = load_config(recipe)
    with RunDir.create(config, resume=False) as run:
        checkpoint(run, 5)
        run.metrics.write(1, {"reward/mean": 1.0})
    with pytest.raises(
        InputError, match=r"runs/first: this run folder exists already; go on with it by --resume, or set another run.name"
    ):
        RunDir.create(config, resume=False)
    assert len(read_lines(run.folder / "metrics.jsonl")) == 1


def test_without_a_checkpoint_a_run_is_resumed_from_its_start(recipe: Path) -> None:
    config = load_config(recipe)
    with RunDir.create(config, resume=False) as run:
        run.metrics.write(1, {"reward/mean": 1.0})
    with RunDir.create(config, resume=True) as run:
        assert run.step == 0 and run.resume_from is None and not run.created
    assert not (run.folder / "metrics.jsonl").read_text()
    assert len((run.folder / "metrics.superseded.jsonl").read_text().splitlines()) == 1


def test_an_empty_folder_is_as_good_as_none_and_a_file_is_not(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    RunDir.create(config, resume=False).__exit__()
    (tmp_path / "runs" / "second").touch()
    with pytest.raises(InputError, match=r"runs/second: a file stands where"):
        RunDir.create(load_config(recipe, ["run.name=second"]), resume=False)


def test_a_folder_that_cannot_be_made_is_one_line(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    with pytest.raises(RunError, match=r"runs/first: cannot be written \(Not a directory\)"):
        RunDir.create(load_config(recipe), resume=False)


# Resuming


def test_resume_without_a_run_lists_the_runs_there_are(recipe: Path) -> None:
    with pytest.raises(InputError, match=r"runs/first: no such run to resume; no runs in "):
        RunDir.create(load_config(recipe), resume=True)
    RunDir.create(load_config(recipe), resume=False).__exit__()
    with pytest.raises(InputError, match=r"runs/second: no such run to resume; runs there: first;"):
        RunDir.create(load_config(recipe, ["run.name=second"]), resume=True)


def test_resume_goes_back_to_the_checkpoint_and_each_step_stands_once(recipe: Path) -> None:
    config = load_config(recipe)
    folder = interrupted(config, at=3, rows=5)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 6, "rew')  # killed in the middle of a line
    with open(folder / "events.jsonl", "ab") as file:
        file.write(b'{"time": "20')
    before = (folder / "metrics.jsonl").read_bytes()
    with RunDir.create(config, resume=True) as run:
        assert run.step == 3 and run.resume_from == folder / "checkpoints" / "step_000003" and not run.created
        assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3]
        for step in (4, 5, 6):
            run.metrics.write(step, {"reward/mean": -1.0})
    assert [row["step"] for row in read_lines(folder / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    kept = b"".join((folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:3])
    assert kept + (folder / "metrics.superseded.jsonl").read_bytes() == before + b"\n"  # nothing was lost
    events = read_lines(folder / "events.jsonl")
    assert [event["kind"] for event in events] == ["start", "resume"] and events[1]["superseded_rows"] == 3


def test_a_half_written_checkpoint_is_not_one(recipe: Path) -> None:
    config = load_config(recipe)
    folder = interrupted(config, at=3, rows=5)
    (folder / "checkpoints" / "step_000005").mkdir()
    (folder / "checkpoints" / ".step_000006.partial").mkdir()
    with RunDir.create(config, resume=True) as run:
        assert run.step == 3


def test_resume_finds_a_checkpoint_that_a_kill_left_moved_aside(recipe: Path) -> None:
    config = load_config(recipe)
    folder = interrupted(config, at=3, rows=5)
    whole = folder / "checkpoints" / "step_000003"
    whole.rename(whole.with_name(".step_000003.replaced"))
    (whole.parent / ".step_000003.partial").mkdir()
    with RunDir.create(config, resume=True) as run:
        assert run.step == 3 and run.resume_from == whole
    assert list(whole.parent.iterdir()) == [whole]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("policy.tau=0.3", r"policy.tau = 0.5: a resumed run keeps it, this command has 0.3"),
        ("run.seed=1", "run.seed = 0"),
        ("run.steps=20", "run.steps = 10"),  # the cosine schedule ends there
        ("model.path=org/other", "model.path = smollm2-135m"),
        ("engine.dtype=float32", "engine.dtype = bfloat16"),
        ("learner.lr=1e-3", "learner.lr = 6e-06"),
        ("task.train=arithmetic:train", "task.train = gsm8k"),
    ],
)
def test_a_resumed_run_learns_what_it_learned(recipe: Path, override: str, says: str) -> None:
    folder = interrupted(load_config(recipe), at=3, rows=5)
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(InputError, match=rf"runs/first/config.yaml: {says}") as caught:
        RunDir.create(load_config(recipe, [override]), resume=True)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == files  # refused before anything was touched


def test_cadence_and_sizes_may_change_and_are_noted(recipe: Path) -> None:
    folder = interrupted(load_config(recipe), at=3, rows=5)
    overrides = [
        "checkpoint.every=7",
        "eval.problems=9",
        "push.timeout_s=5",
        "engine.count=2",
        "learner.ranks=2",
    ]
    config = load_config(recipe, overrides)
    with RunDir.create(config, resume=True):
        assert load_config(folder / "config.yaml") == config
    changed = read_lines(folder / "events.jsonl")[-1]["changed"]
    assert changed["checkpoint.every"] == [50, 7] and len(changed) == len(overrides)


def test_two_processes_cannot_write_to_one_run(recipe: Path) -> None:
    config = load_config(recipe)
    interrupted(config, at=3, rows=5)
    other = "import sys; from configs.load import load_config; from cluster.run_dir import RunDir\n"
    other += "RunDir.create(load_config(sys.argv[1]), resume=True)"
    with RunDir.create(config, resume=True):
        second = subprocess.run([sys.executable, "-c", other, str(recipe)], capture_output=True, text=True)
        assert "another process writes to this run" in second.stderr
    assert subprocess.run([sys.executable, "-c", other, str(recipe)]).returncode == 0


# How a run ends


@pytest.mark.parametrize(
    ("error", "reason"),
    [(InputError("task: too long"), "task: too long"), (RunError("an engine died\nthere"), "an engine died")],
)
def test_a_resumed_run_says_how_it_ended(recipe: Path, error: Exception, reason: str) -> None:
    folder = interrupted(load_config(recipe), at=3, rows=5)
    with pytest.raises(type(error)), RunDir.create(load_config(recipe), resume=True) as run, recorded_end(run):
        raise error
    assert read_status(run)["state"] == "failed"
    event = read_lines(folder / "events.jsonl")[-1]
    assert (event["kind"], event["reason"]) == ("failed", reason)


def test_bad_input_leaves_no_new_run_but_never_takes_what_was_learned(recipe: Path) -> None:
    config = load_config(recipe)
    with pytest.raises(InputError), RunDir.create(config, resume=False) as run, recorded_end(run):
        raise InputError("model.path: no such model")
    assert not run.folder.exists()
    with pytest.raises(InputError), RunDir.create(config, resume=False) as run, recorded_end(run):
        run.metrics.write(1, {"reward/mean": 1.0})
        raise InputError("eval: of another evaluation")
    assert len(read_lines(run.folder / "metrics.jsonl")) == 1 and read_status(run)["state"] == "failed"


# Metrics, events, status


def test_metrics_are_plain_finite_numbers_and_can_be_tailed(recipe: Path) -> None:
    with RunDir.create(load_config(recipe), resume=False) as run:
        row = run.metrics.write(1, {"reward/mean": np.float32(0.5), "queue/depth": np.int64(3)})
        assert json.loads((run.folder / "metrics.jsonl").read_text()) == row == {"step": 1, "reward/mean": 0.5, "queue/depth": 3}
        for bad in (float("nan"), float("inf"), np.float32("nan")):
            with pytest.raises(RunError, match=r"step 2: learner/loss = (nan|inf): not finite"):
                run.metrics.write(2, {"reward/mean": 1.0, "learner/loss": bad})
        assert len(read_lines(run.folder / "metrics.jsonl")) == 1


def test_a_full_disk_is_one_line_and_leaves_whole_lines(recipe: Path) -> None:
    with RunDir.create(load_config(recipe), resume=False) as run:
        run.metrics.write(1, {"reward/mean": 1.0})
        status = (run.folder / "status.json").read_text()
        size = (run.folder / "metrics.jsonl").stat().st_size
        with files_of_at_most(size + 10):
            with pytest.raises(RunError, match=r"metrics.jsonl: cannot be written \(File too large\)"):
                run.metrics.write(2, {"reward/mean": 1.0})
            with pytest.raises(RunError, match=r"status.json: cannot be written"):
                run.status("training", step=2)
        assert (run.folder / "metrics.jsonl").stat().st_size == size
        assert (run.folder / "status.json").read_text() == status
        run.metrics.write(2, {"reward/mean": 2.0})
        assert [row["step"] for row in read_lines(run.folder / "metrics.jsonl")] == [1, 2]


def read_status(run: RunDir) -> dict:
    return json.loads((run.folder / "status.json").read_text())


def test_status_says_who_waits_for_whom_since_when(recipe: Path) -> None:
    with RunDir.create(load_config(recipe), resume=False) as run:
        run.status("training", step=4)
        with run.waiting("learner", "groups of step 4", 60.0), run.waiting("controller", "push 4", 5.0):
            status = read_status(run)
            assert status["state"] == "training" and status["step"] == 4
            assert [(w["name"], w["for"], w["deadline_s"]) for w in status["waiting"]] == [
                ("learner", "groups of step 4", 60.0),
                ("controller", "push 4", 5.0),
            ]
            assert datetime.fromisoformat(status["waiting"][0]["since"]) <= datetime.fromisoformat(status["updated"])
        assert read_status(run)["waiting"] == []
        since = read_status(run)["since"]
        run.status("training", step=5)
        assert read_status(run)["since"] == since


def test_a_wait_past_its_deadline_is_named(recipe: Path) -> None:
    with RunDir.create(load_config(recipe), resume=False) as run:
        with pytest.raises(RunError, match=r"controller: waited 0.01 s for engine-0 to start"):
            asyncio.run(wait(run.waiting, "controller", "engine-0 to start", 0.01, asyncio.sleep(60)))
        with pytest.raises(ZeroDivisionError), run.waiting("a", "b", 1.0):
            _ = 1 / 0
        assert read_status(run)["waiting"] == []


def test_json_files_below_the_folder_are_written_whole(recipe: Path) -> None:
    with RunDir.create(load_config(recipe), resume=False) as run:
        path = run.write_json("eval/step_000005.json", {"hard_greedy": np.float64(0.5)})
        assert json.loads(path.read_text()) == {"hard_greedy": 0.5}
        with pytest.raises(TypeError):
            run.write_json("eval/step_000005.json", {"x": object()})
        assert json.loads(path.read_text()) == {"hard_greedy": 0.5} and len(list(path.parent.iterdir())) == 1

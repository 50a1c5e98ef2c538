"""What `softrl` says and leaves behind when its input is wrong: one line, exit code 2, nothing written."""

import json
from pathlib import Path

import pytest

from cluster import cli, controller
from configs.errors import RunError

DEMO = str(Path(__file__).parents[2] / "configs" / "demo.yaml")


def softrl(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The command in this process, where the libraries are imported already; returns the exit code."""
    monkeypatch.setattr("sys.argv", ["softrl", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A good data file of eight problems."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"q": f"What is {i} + 1?", "a": str(i + 1)}) + "\n" for i in range(8)))
    return path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["policy.taau=1"], ["policy.taau", "policy.tau"]),
        (["policy.mode=sofft"], ["policy.mode", "sofft", "soft"]),
        (["learner.lr=-1"], ["learner.lr", "-1"]),
        (["engine.max_model_len=64"], ["engine.max_model_len", "64"]),
        (["model.path=/no/such/folder"], ["/no/such/folder"]),
        (["task.train={path: /no/such.jsonl, question: q, answer: a}"], ["/no/such.jsonl"]),
        (["rollout.prompts_per_step=100000"], ["rollout.prompts_per_step", "100000"]),
        (["--replay", "/no/such/rollouts"], ["/no/such/rollouts"]),
        (["--resume"], ["no such run to resume"]),
        (["--resume", "--replay", "x"], ["--replay", "--resume"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], says: list[str]
) -> None:
    where = [f"run.dir={tmp_path / 'runs'}", "run.name=bad"]
    assert softrl(monkeypatch, "train", DEMO, *where, *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("softrl: ") and all(word in lines[0] for word in says), lines
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ('{"q": "What is 2 + 2?"}', "'a'"),
        ('{"q": "What is 2 + 2?", "a": ', "JSON"),
        ('["What is 2 + 2?", "4"]', "object"),
        ('{"q": "What is 2 + 2?", "a": "  "}', "'a'"),
    ],
)
def test_a_broken_line_of_data_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, data: Path, broken: str, says: str
) -> None:
    data.write_text(data.read_text() + broken + "\n")
    task = f"task.train={{path: {data}, question: q, answer: a}}"
    assert softrl(monkeypatch, "train", DEMO, f"run.dir={tmp_path / 'runs'}", task) == 2
    line = capsys.readouterr().err.strip()
    assert f"{data}:9" in line and says in line, line
    assert not (tmp_path / "runs").exists()


def test_a_run_that_exists_is_not_touched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    there = tmp_path / "runs" / "mine" / "metrics.jsonl"
    there.parent.mkdir(parents=True)
    there.write_text('{"step": 1}\n')
    assert softrl(monkeypatch, "train", DEMO, f"run.dir={tmp_path / 'runs'}", "run.name=mine") == 2
    line = capsys.readouterr().err
    assert "--resume" in line and "run.name" in line
    assert [path.read_text() for path in there.parent.iterdir()] == ['{"step": 1}\n']


def test_dry_run_prints_the_recipe_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["softrl", "train", DEMO, f"run.dir={tmp_path / 'runs'}", "--dry-run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    shown = capsys.readouterr().out
    assert "nothing was started" in shown and "mode: soft" in shown
    assert not (tmp_path / "runs").exists()


def test_a_failed_run_is_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise RunError("step 3: the loss is nan")

    monkeypatch.setattr(controller, "train", fail)
    assert softrl(monkeypatch, "train", DEMO, f"run.dir={tmp_path / 'runs'}") == 1
    assert capsys.readouterr().err.strip() == "softrl: step 3: the loss is nan"

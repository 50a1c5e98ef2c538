"""A small study from its file to its report: trained, evaluated, interrupted, gone on with, reported and shown."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from cluster.evaluation_records import read_plan, read_records
from configs.schema import EVAL_SETTINGS
from tests.end_to_end.commands import DEADLINE_S, ROOT, SOFTRL, events, hear_ctrl_c, softrl

pytestmark = [pytest.mark.slow, pytest.mark.study, pytest.mark.timeout(1500)]

QUESTIONS = [("What falls from clouds?", "rain", "bread"), ("What do cows eat?", "stones", "grass"), ("Is ice cold?", "yes", "no")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """Where the commands are run: a matrix of two runs, a multiple-choice set, and the recipes."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "configs").symlink_to(ROOT / "configs")
    rows = [
        {"question": question, "choices": {"text": [a, b], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
        for i, (question, a, b) in enumerate(QUESTIONS)
    ]
    (folder / "arc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fixed = {
        "run.name": "${policy.mode}_seed${run.seed}",
        "run.steps": 2,
        "model.path": str(tiny_llama),
        "model.dtype": "float32",
        "rollout.prompts_per_step": 2,
        "rollout.samples_per_prompt": 4,
        "policy.max_cot_tokens": 12,
        "policy.max_answer_tokens": 5,
        "engine.max_num_seqs": 16,
        "engine.kv_cache_gib": 0.25,
        "eval.every": 0,
        "eval.settings": ["hard_greedy"],
        "eval.problems": 4,
        "eval.samples": 3,
        "eval.max_cot_tokens": 20,
    }
    evaluation = {"settings": ["hard_greedy", "soft_sample"], "datasets": ["arithmetic:test", "arc_easy=arc.jsonl"], "problems": 6}
    study = {"recipes": ["configs/demo.yaml"], "axes": {"policy.mode": ["hard", "soft"]}, "set": fixed, "eval": evaluation}
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The runs of the finished matrix."""
    softrl(folder, ["matrix", "study.yaml"])
    return folder / "runs" / "study"


def test_a_matrix_trains_evaluates_and_reports(runs: Path) -> None:
    for name in ("hard_seed0", "soft_seed0"):
        assert json.loads((runs / name / "status.json").read_text())["state"] == "done"
        for step in (0, 2) if name == "hard_seed0" else (2,):  # the untrained model is evaluated once a seed
            [plan] = [read_plan(path) for path in (runs / name / "eval" / f"test_{step:06d}").glob("*.json")]
            assert plan.problems == 6 and plan.max_cot_tokens == 20 and dict(plan.samples) == {"hard_greedy": 1, "soft_sample": 3}
            assert [row["items"] for row in json.loads((runs / name / "eval" / f"out_of_domain_{step:06d}.json").read_text())] == [
                3
            ]
    engines = [event["engines"] for name in ("hard_seed0", "soft_seed0") for event in events(runs / name, "started")]
    assert engines[0] == engines[1] and engines[0][0]["pid"] > 0  # the second run found the first one's engine
    tables = json.loads((runs / "report" / "report.json").read_text())["tables"]
    assert {"accuracy", "settings", "pass_at_k", "out_of_domain", "mixtures", "mixture_by_index", "training"} <= tables.keys()
    trained = {row["trained"] for row in tables["settings"]["rows"]}
    assert {"hard", "soft"} < trained and len(trained) >= 3
    assert {row["missing"] for row in tables["settings"]["rows"]} == {0}


def test_a_finished_matrix_starts_nothing(folder: Path, runs: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    assert "run 1 of" not in (said := softrl(folder, ["matrix", "study.yaml"]).stdout) and "2 runs in 2 groups" in said
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")} == before


def test_an_interrupted_evaluation_goes_on(folder: Path, runs: Path) -> None:
    run = runs / "soft_seed0"
    records = run / "eval" / "test_000002" / "arithmetic_test.jsonl"
    recorded = len(records.read_text().splitlines())
    checkpoint = ["--checkpoint", str(run / "checkpoints" / "best")]
    command = ["eval", str(run / "config.yaml"), *checkpoint, "--settings", "all", "--problems", "12", "eval.samples=6"]
    process = subprocess.Popen(
        [SOFTRL, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    deadline = time.monotonic() + DEADLINE_S
    while len(records.read_text().splitlines()) < recorded + 10:
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or hung, before it was to be interrupted"
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "the same command goes on" in errors
    left = records.read_text()
    planned = 12 * 3 * (1 + 6)
    assert len(left.splitlines()) < planned
    shown = softrl(folder, command).stdout
    assert all(setting in shown for setting in EVAL_SETTINGS) and "@6" in shown
    assert records.read_text().startswith(left[: left.rindex("\n") + 1])  # what was there is not drawn again
    found = list(read_records(records))
    assert len(records.read_text().splitlines()) == len(found) == planned
    assert {(r.problem, r.setting, r.sample) for r in found} == {
        (p, s, i) for p in range(12) for s in EVAL_SETTINGS for i in range(1 if "greedy" in s else 6)
    }
    assert not list(run.glob(".weights_*"))


def test_a_checkpoint_is_evaluated_while_its_run_goes_on(folder: Path, runs: Path) -> None:
    fixed = yaml.safe_load((folder / "study.yaml").read_text())["set"]
    long = fixed | {"run.name": "long", "run.steps": 5000, "checkpoint.every": 10, "checkpoint.keep": 9}
    overrides = [f"{key}={value}" for key, value in long.items() if key != "eval.settings"]
    run = folder / "runs" / "long"
    process = subprocess.Popen(
        [SOFTRL, "train", "configs/demo.yaml", *overrides],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=hear_ctrl_c,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not (checkpoint := run / "checkpoints" / "step_000010").exists():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or hung, before its first checkpoint"
        time.sleep(0.1)
    steps = len((run / "metrics.jsonl").read_text().splitlines())
    softrl(folder, ["eval", str(run / "config.yaml"), "--checkpoint", str(checkpoint), "--problems", "2"])
    assert process.poll() is None and len((run / "metrics.jsonl").read_text().splitlines()) > steps + 1
    assert json.loads((run / "eval" / "test_000010.json").read_text())[0]["problems"] == 2
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=120)


def test_a_transcript_is_shown(folder: Path, runs: Path) -> None:
    run = str(runs / "soft_seed0")
    shown = softrl(folder, ["show", run, "--problem", "1", "--setting", "soft_sample"]).stdout
    assert "soft_sample: problem 1 of test_000002_arithmetic_test" in shown and "top of the mixture" in shown
    softrl(folder, ["show", run, "--problem", "1", "--html", "page.html"])
    page = (folder / "page.html").read_text()
    assert page.count("<section ") == len(EVAL_SETTINGS) and "entropy" in page and "://" not in page
    assert "was not kept" in softrl(folder, ["show", run, "--problem", "11"], expect=2).stderr


def test_the_six_settings_give_the_same_numbers_twice(folder: Path) -> None:
    """SmolLM2-135M, from one command to the next."""
    small = ["eval.samples=2", "engine.max_num_seqs=16", "engine.kv_cache_gib=0.25"]
    command = ["eval", "configs/demo.yaml", "--settings", "all", "--problems", "3", *small]
    found = []
    for name in ("one", "two"):
        softrl(folder, [*command, "--out", name])
        found.append(
            {record.key: record for record in read_records(folder / name / "eval" / "test_000000" / "arithmetic_test.jsonl")}
        )
    assert found[0] == found[1] and len(found[0]) == 3 * 3 * (1 + 2)

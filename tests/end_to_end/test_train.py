"""`softrl` as its user runs it: the real model, the real engine, Ray, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rollout.models import resolve_model

ROOT = Path(__file__).parents[2]
SOFTRL = str(Path(sys.executable).with_name("softrl"))
SMALL = [
    "model.dtype=float32",
    "run.steps=4",
    "run.seed=3",
    "rollout.prompts_per_step=3",
    "rollout.samples_per_prompt=4",
    "policy.max_cot_tokens=12",
    "policy.max_answer_tokens=5",
    "engine.max_num_seqs=12",
    "engine.kv_cache_gib=0.25",
    "checkpoint.every=2",
    "checkpoint.keep=9",
    "push.verify_every=2",
    "eval.every=0",
    "eval.problems=12",
    "eval.settings=[hard_greedy]",
]
DEADLINE_S = 600
REPLAYED = ("reward/mean", "reward/correct", "rollout/tokens", "learner/loss", "learner/grad_norm", "learner/residual_mean")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def softrl(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([SOFTRL, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def stop_after(run: Path, step: int, how: signal.Signals, *arguments: str) -> int:
    """Start a run, send it a signal once `step` is in metrics.jsonl, and return its exit code."""
    process = subprocess.Popen(
        [SOFTRL, "train", "configs/demo.yaml", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not ((run / "metrics.jsonl").exists() and len(rows(run)) >= step):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or hung, before it was to be stopped"
        time.sleep(0.05)
    os.kill(process.pid, how)
    return process.wait(timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def whole(runs: Path) -> Path:
    """An uninterrupted run of four steps."""
    softrl("train", "configs/demo.yaml", f"run.dir={runs}", "run.name=whole", *SMALL)
    return runs / "whole"


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    promised = (
        "reward/mean reward/correct rollout/tokens_per_s rollout/soft_fraction rollout/dropped_mass_p99 learner/tokens_per_s "
        "learner/residual_mean learner/mismatch_s_mean learner/mismatch_s_p99 learner/grad_norm push/seconds push/pause_seconds "
        "push/bytes time/step time/wait_rollout time/wait_learner queue/depth queue/staleness_mean record/bytes_per_token "
        "engine/preemptions"
    )
    assert set(promised.split()) <= found[0].keys()
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["best", "step_000002", "step_000004"]
    evaluations = {"validation_000000.json", "validation_000004.json", "test_000000.json", "test_000004.json"}
    assert {path.name for path in (whole / "eval").iterdir()} == evaluations


def test_float32_engine_and_learner_agree(whole: Path) -> None:
    for row in rows(whole):
        assert row["learner/mismatch_s_p99"] < 0.05
        assert row["learner/residual_mean"] == pytest.approx(1.0, abs=5 * (2 / (576 * 12 * 12)) ** 0.5)
    assert [event["version"] for event in events(whole, "push_verified")] == [0, 2, 4, 4]  # the last one before the test
    assert all(event["logprob_distance"] <= 1e-4 for event in events(whole, "push_verified"))


def test_killed_and_resumed_is_the_uninterrupted_run(runs: Path, whole: Path) -> None:
    name = [f"run.dir={runs}", "run.name=killed", *SMALL]
    assert stop_after(runs / "killed", 3, signal.SIGKILL, *name) == -signal.SIGKILL
    softrl("train", "configs/demo.yaml", *name, "--resume")
    resumed = rows(runs / "killed")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4]
    for ours, theirs in zip(resumed, rows(whole), strict=True):
        assert ours["reward/mean"] == theirs["reward/mean"]
        for key in REPLAYED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


def test_interrupted_run_says_so_and_can_go_on(runs: Path) -> None:
    name = [f"run.dir={runs}", "run.name=interrupted", *SMALL]
    assert stop_after(runs / "interrupted", 2, signal.SIGINT, *name) == 1
    assert json.loads((runs / "interrupted" / "status.json").read_text())["state"] == "interrupted"
    assert events(runs / "interrupted", "interrupted")
    assert (runs / "interrupted" / "checkpoints" / "step_000002").exists()


def test_run_that_exists_is_not_overwritten(whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    refused = softrl("train", "configs/demo.yaml", f"run.dir={whole.parent}", "run.name=whole", *SMALL, expect=2)
    assert "--resume" in refused.stderr and "run.name" in refused.stderr
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_exported_checkpoint_is_an_ordinary_model_that_has_learned(whole: Path, tmp_path: Path) -> None:
    """That its logits are the learner's, bit for bit, is shown in tests/learner."""
    softrl("export", str(whole / "checkpoints" / "step_000004"), str(tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = tokenizer("User: What is 12 + 5? Assistant: 12 + 5 =", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, base = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (tmp_path / "model", resolve_model("smollm2-135m"))
        )
    assert torch.isfinite(trained).all()
    assert 1e-4 < (trained - base).abs().max() < 5


def test_rollouts_can_be_written_and_learned_from_alone(runs: Path, whole: Path, tmp_path: Path) -> None:
    written = tmp_path / "rollouts"
    softrl("rollout", "configs/demo.yaml", "--out", str(written), *SMALL, "run.steps=1")
    softrl("train", "configs/demo.yaml", f"run.dir={runs}", "run.name=replay", *SMALL, "--replay", str(written))
    replayed, first = rows(runs / "replay")[0], rows(whole)[0]
    assert replayed["reward/mean"] == first["reward/mean"]
    assert replayed["learner/loss"] == pytest.approx(first["learner/loss"], rel=1e-4)
    assert replayed["learner/grad_norm"] == pytest.approx(first["learner/grad_norm"], rel=1e-4)


def test_learning_rate_zero_moves_nothing(runs: Path) -> None:
    small = [*SMALL, "learner.lr=0", "run.steps=20", "push.verify_every=1", "policy.max_cot_tokens=4"]
    softrl("train", "configs/demo.yaml", f"run.dir={runs}", "run.name=still", *small, "checkpoint.every=20")
    distances = [event["logprob_distance"] for event in events(runs / "still", "push_verified")]
    assert len(distances) == 22
    assert max(distances) - min(distances) < 5e-5  # 20 pushes later the engine holds the weights it started with
    assert all(row["learner/mismatch_s_p99"] < 0.05 for row in rows(runs / "still"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["policy.taau=1"], ["policy.taau", "policy.tau"]),
        (["policy.mode=sofft"], ["policy.mode", "sofft", "soft"]),
        (["engine.max_model_len=64"], ["engine.max_model_len", "64"]),
        (["model.path=/no/such/folder"], ["/no/such/folder"]),
        (["task.train={path: /no/such.jsonl, question: q, answer: a}"], ["/no/such.jsonl"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(runs: Path, arguments: list[str], says: list[str]) -> None:
    refused = softrl("train", "configs/demo.yaml", f"run.dir={runs}", "run.name=bad", *arguments, expect=2)
    line = refused.stderr.strip().splitlines()[-1]
    assert line.startswith("softrl: ") and all(word in line for word in says), refused.stderr
    assert not (runs / "bad").exists()


def test_dry_run_starts_nothing(runs: Path) -> None:
    shown = softrl("train", "configs/demo.yaml", f"run.dir={runs}", "run.name=dry", "--dry-run")
    assert "nothing was started" in shown.stdout and "mode: soft" in shown.stdout
    assert not (runs / "dry").exists()

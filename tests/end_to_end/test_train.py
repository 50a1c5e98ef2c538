"""A training run as README's reader starts it: the real model, the real engine, Ray, killed, resumed, exported and replayed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.placement import QUIET, cores
from rollout.engine_args import engine_environment
from rollout.models import resolve_model
from tests.end_to_end.commands import DEADLINE_S, SMALL, events, reader_folder, readme, rows, softrl, stop_once_saved

REPLAYED = ("reward/mean", "reward/correct", "rollout/tokens", "learner/loss", "learner/grad_norm", "learner/residual_mean")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reader_folder(tmp_path_factory.mktemp("reader"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """An uninterrupted run of three steps."""
    softrl(folder, readme("train", "run.name=first"), *SMALL, "run.name=whole")
    return folder / "runs" / "whole"


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """The model that `softrl export` made of the run that was killed and resumed."""
    softrl(folder, readme("export"))
    return folder / "my-model"


def test_a_run_leaves_what_it_promises(whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == [1, 2, 3]
    promised = (
        "reward/mean reward/correct rollout/tokens_per_s rollout/soft_fraction rollout/dropped_mass_p99 learner/tokens_per_s "
        "learner/residual_mean learner/mismatch_s_mean learner/mismatch_s_p99 learner/grad_norm push/seconds push/pause_seconds "
        "push/bytes time/step time/wait_rollout time/wait_learner queue/depth queue/staleness_mean record/bytes_per_token "
        "engine/preemptions"
    )
    assert set(promised.split()) <= found[0].keys()
    assert json.loads((whole / "status.json").read_text())["state"] == "done"
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["best", "step_000002", "step_000003"]
    evaluations = {"validation_000000", "validation_000003", "test_000000", "test_000003"}  # folders of records, and summaries
    assert {path.name for path in (whole / "eval").iterdir()} == evaluations | {f"{name}.json" for name in evaluations}


def test_float32_engine_and_learner_agree(whole: Path) -> None:
    for row in rows(whole):
        assert row["learner/mismatch_s_p99"] < 0.05
        assert row["learner/residual_mean"] == pytest.approx(1.0, abs=5 * (2 / (576 * 12 * 12)) ** 0.5)
    assert [event["version"] for event in events(whole, "push_verified")] == [0, 2]
    assert all(event["logprob_distance"] <= 1e-4 for event in events(whole, "push_verified"))


def test_killed_and_resumed_is_the_uninterrupted_run(folder: Path, whole: Path) -> None:
    run = folder / "runs" / "first"
    assert stop_once_saved(run, 2, signal.SIGKILL, readme("train", "run.name=first"), *SMALL) == -signal.SIGKILL
    softrl(folder, readme("train", "run.name=first", "--resume"), *SMALL)
    resumed = rows(run)
    assert [row["step"] for row in resumed] == [1, 2, 3]
    for ours, theirs in zip(resumed, rows(whole), strict=True):
        assert ours["reward/mean"] == theirs["reward/mean"]
        for key in REPLAYED:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["step"], key)


def test_exported_checkpoint_is_an_ordinary_model_that_has_learned(exported: Path) -> None:
    """That its logits are the learner's, bit for bit, is shown in tests/learner."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer("User: What is 12 + 5? Assistant: 12 + 5 =", return_tensors="pt").input_ids
    with torch.no_grad():
        trained, base = (
            AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(ids).logits
            for source in (exported, resolve_model("smollm2-135m"))
        )
    assert torch.isfinite(trained).all()
    assert 1e-4 < (trained - base).abs().max() < 5


STOCK_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", max_model_len=64, kv_cache_memory_bytes=2**26, enforce_eager=True)
ids = json.loads(sys.argv[2])
[output] = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
print(json.dumps([row[token].logprob for token, row in zip(ids[1:], output.prompt_logprobs[1:])]))
"""


def test_exported_checkpoint_is_served_by_vllm_without_our_plugin(exported: Path) -> None:
    ids = AutoTokenizer.from_pretrained(exported)("What is 12 + 5? It is 17.").input_ids
    alone = {"VLLM_PLUGINS": "", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment = os.environ | QUIET | engine_environment(cores(None)) | alone
    served = subprocess.run(
        [sys.executable, "-c", STOCK_VLLM, str(exported), json.dumps(ids)],
        env=environment, capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert served.returncode == 0, served.stderr[-3000:]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(torch.tensor([ids])).logits[0, :-1]
    expected = logits.log_softmax(1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert torch.tensor(json.loads(served.stdout.splitlines()[-1])) == pytest.approx(expected.numpy(), abs=1e-4)


def test_runs_are_reported_and_their_thoughts_shown(folder: Path, exported: Path) -> None:
    softrl(folder, readme("report"))
    assert "first" in (folder / "runs" / "report" / "report.md").read_text()
    assert "hard_greedy: problem 0 of test_000003_arithmetic_test" in softrl(folder, readme("show", "--problem")).stdout


def test_rollouts_can_be_written_and_learned_from_alone(folder: Path, whole: Path) -> None:
    one_step = [*SMALL, "run.steps=1", "run.seed=1"]
    softrl(folder, readme("rollout", "--out"), *one_step)
    softrl(folder, readme("train", "--replay"), *one_step)
    replayed, first = rows(folder / "runs" / "second")[0], rows(whole)[0]
    assert replayed["reward/mean"] == first["reward/mean"]
    assert replayed["learner/loss"] == pytest.approx(first["learner/loss"], rel=1e-4)
    assert replayed["learner/grad_norm"] == pytest.approx(first["learner/grad_norm"], rel=1e-4)

"""The README's commands as its reader runs them: the real model, the real engine, Ray, killed and resumed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.placement import QUIET, cores
from configs.load import load_config
from rollout.engine_args import engine_environment
from rollout.models import resolve_model

ROOT = Path(__file__).parents[2]
SOFTRL = str(Path(sys.executable).with_name("softrl"))
SMALL = [
    "run.steps=3",
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

# Every softrl command that README shows, up to the two spaces before its explanation.
README = [
    shlex.split(line)[1:]
    for block in (ROOT / "README.md").read_text().split("```")[1::2]
    for line in re.findall(r"^(softrl .*?)(?:  .*)?$", block, re.MULTILINE)
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def readme(*words: str) -> list[str]:
    """The README's one command that has all the words and no other option."""
    options = {word for word in words if word.startswith("--")}
    [command] = [c for c in README if set(words) <= set(c) and {w for w in c if w.startswith("--")} == options]
    return command


def softrl(where: Path, command: list[str], *overrides: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([SOFTRL, *command, *overrides], cwd=where, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == expect, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [event for event in found if event["kind"] == kind]


def hear_ctrl_c() -> None:
    """In a new process: a shell that runs the tests in the background has made it deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop_once_saved(run: Path, step: int, how: signal.Signals, command: list[str], *overrides: str) -> int:
    """Start a run, send it a signal once the checkpoint of `step` is there, and return its exit code. Nothing may outlive it."""
    process = subprocess.Popen(
        [SOFTRL, *command, *overrides],
        cwd=run.parents[1],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=hear_ctrl_c,
    )
    deadline = time.monotonic() + DEADLINE_S
    while not ((run / "events.jsonl").exists() and step in [event["step"] for event in events(run, "checkpoint")]):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or hung, before it was to be stopped"
        time.sleep(0.05)
    others = psutil.Process(process.pid).children(recursive=True)
    ours = [other for other in others if "Agent" not in other.name()]  # Ray's own agents take some minutes to notice
    os.kill(process.pid, how)
    code = process.wait(timeout=120)
    _, left = psutil.wait_procs(ours, timeout=60)
    assert not left
    return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands are run: an empty folder but for the recipes."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "configs").symlink_to(ROOT / "configs")
    return folder


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


def test_learning_rate_zero_moves_nothing_and_ctrl_c_leaves_a_run(folder: Path, tiny_llama: Path) -> None:
    """In bfloat16, where the residual still has to hold."""
    run = folder / "runs" / "still"
    still = ["run.name=still", f"model.path={tiny_llama}", "model.dtype=bfloat16", "learner.lr=0", "run.steps=90"]
    command = readme("train", "run.name=first")
    often = ["push.verify_every=1", "checkpoint.every=20"]
    assert stop_once_saved(run, 20, signal.SIGINT, command, *SMALL, *still, *often) == 1
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert events(run, "interrupted")
    distances = [event["logprob_distance"] for event in events(run, "push_verified")]
    assert len(distances) >= 21
    assert max(distances) - min(distances) < 1e-6  # 20 pushes later the engine holds the weights it started with
    residuals = [row["learner/residual_mean"] for row in rows(run)]
    assert sum(residuals) / len(residuals) == pytest.approx(1.0, abs=0.02)


def test_bench_writes_the_ratios(folder: Path, tiny_llama: Path) -> None:
    softrl(folder, readme("bench", "--json"), "--sequences", "4", f"model.path={tiny_llama}")
    figures = json.loads((folder / "rollout.json").read_text())
    assert all(figures[key] > 0 for key in ("soft_over_hard", "soft_over_plain_loop", "soft_tokens_per_s", "hard_tokens_per_s"))


def test_the_other_commands_of_the_readme(folder: Path) -> None:
    assert "nothing was started" in softrl(folder, readme("train", "--dry-run")).stdout
    assert "vllm" in softrl(folder, readme("doctor")).stdout
    recipe, *overrides = readme("train", "policy.mode=fuzzy")[1:]
    assert load_config(folder / recipe, overrides).policy.tau == 1e-4  # its model and data are on the hub
    assert len(README) == 11  # a command that is added is run above

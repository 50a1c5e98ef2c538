"""README's other commands, and a run that is interrupted, on a tiny model where the model does not matter."""

import json
import signal
from pathlib import Path

import pytest

from configs.load import load_config
from tests.end_to_end.commands import README, SMALL, events, reader_folder, readme, rows, softrl, stop_once_saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reader_folder(tmp_path_factory.mktemp("reader"))


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
    softrl(folder, readme("bench", "--json"), "--profile", "--sequences", "4", f"model.path={tiny_llama}")
    figures = json.loads((folder / "rollout.json").read_text())
    assert all(figures[key] > 0 for key in ("soft_over_hard", "soft_over_plain_loop", "soft_tokens_per_s", "hard_tokens_per_s"))
    soft, hard = figures["profile"]["soft"], figures["profile"]["hard"]
    assert 0 < soft["advance_ms"] < soft["step_ms"] and soft["overlay_ms"] > 0
    mixing = soft["mixing"]
    assert mixing["rows"] == figures["sequences"] and 0 < mixing["steps"] < soft["steps"]
    assert mixing["noise_ms"] > 0 < mixing["mixture_ms"] < mixing["step_ms"] - mixing["noise_ms"]
    assert hard["mixing"] is None and hard["advance_ms"] > 0


def test_the_other_commands_of_the_readme(folder: Path) -> None:
    assert "nothing was started" in softrl(folder, readme("train", "--dry-run")).stdout
    assert "vllm" in softrl(folder, readme("doctor")).stdout
    recipe, *overrides = readme("train", "policy.mode=fuzzy")[1:]
    assert load_config(folder / recipe, overrides).policy.tau == 1e-4  # its model and data are on the hub
    assert len(README) == 12  # a command that is added is run above; `serve` is in test_serve.py

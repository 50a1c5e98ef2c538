"""The learner's benchmark steps the real learner on batches of the recipe's shape, and its parts are the whole."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from cluster import bench_learner
from cluster.bench_learner import MODES, PARTS, make_groups, one_rank, print_learner, run_step, time_parts
from configs.schema import Config, Mode
from learner.learner import Learner
from tests.learner.tiny import VOCAB, save_tiny_model, tiny_config

PROMPTS = [[3, 14, 15], [9, 2]]


@pytest.fixture
def config() -> Config:
    made = tiny_config(lr=0.0, micro_batch_tokens=128)
    made.rollout.prompts_per_step, made.rollout.samples_per_prompt = 2, 3
    made.policy.max_cot_tokens, made.policy.max_answer_tokens = 5, 2
    return made


@pytest.fixture
def learner(tmp_path: Path, config: Config) -> Iterator[Learner]:
    torch.set_num_threads(1)
    with one_rank() as device:
        yield Learner(config, save_tiny_model(tmp_path / "model"), 0, 1, device)


def test_batches_have_the_recipes_shape_and_soft_and_hard_the_same(config: Config) -> None:
    soft, hard = (make_groups(config, mode, PROMPTS, [7, 8], VOCAB, 0.1) for mode in MODES)
    for group, twin, prompt in zip(soft, hard, PROMPTS, strict=True):
        assert len(group.samples) == 3 and len({sample.reward for sample in group.samples}) > 1  # there is something to learn
        for a, b in zip(group.samples, twin.samples, strict=True):
            assert a.trajectory.input_ids().tolist() == b.trajectory.input_ids().tolist()
            assert a.trajectory.prompt_ids.tolist() == prompt and a.trajectory.generated == 5 + 2 + 2
            assert a.trajectory.mode is Mode.soft and b.trajectory.mode is Mode.hard
            sums = [a.trajectory.support_probs[i:j].sum() for i, j in zip(*_bounds(a.trajectory.support_offsets), strict=True)]
            assert sums == pytest.approx([1.0] * 5)


def _bounds(offsets: object) -> tuple[list[int], list[int]]:
    found = list(offsets)  # type: ignore[call-overload]
    return found[:-1], found[1:]


def test_a_step_learns_and_changes_nothing_and_its_parts_are_named(config: Config, learner: Learner) -> None:
    before = dict(learner.full_tensors(torch.float32))
    for mode in MODES:
        groups = make_groups(config, mode, PROMPTS, [7, 8], VOCAB, 0.1)
        first, second = (run_step(learner, groups) for _ in range(2))
        assert first["learner/grad_norm"] == second["learner/grad_norm"] > 0
        assert first["learner/tokens"] == 2 * 3 * 9
        parts = time_parts(learner, groups)
        assert tuple(parts) == PARTS and all(seconds > 0 for seconds in parts.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in learner.full_tensors(torch.float32))


def test_figures_are_plain_and_printed(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    class Words:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [ord(letter) % VOCAB for letter in text[-9:]]

    monkeypatch.setattr(bench_learner, "load_tokenizer", lambda _: Words())
    config.model.path, config.task.train = str(save_tiny_model(tmp_path / "model")), "arithmetic:train"
    config.learner.threads = 1
    monkeypatch.setattr(bench_learner, "resolve_model", Path)
    figures = json.loads(json.dumps(bench_learner.bench_learner(config, rounds=2)))
    assert len(figures["rounds"]["soft"]) == 2 and figures["soft_over_hard"] > 0
    assert min(figures["peak_bytes"].values()) >= figures["resting_bytes"] > 0  # equal where memory freed before was enough
    assert figures["batch"]["tokens"] == 2 * 3 * (5 + 9 + 2)
    console = Console(record=True, width=140)
    print_learner(figures, console)
    text = console.export_text()
    assert "soft over hard" in text and "logprobs" in text and "2 prompts of 9 tokens x 3 samples" in text

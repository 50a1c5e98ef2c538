"""A micro-batch that is measured fits what is free, is the same on every rank, and stays what it was when a run resumes."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InputError, RunError
from configs.schema import Config, Mode
from learner import memory
from learner.batch import Weighted, pack, packed_rows
from learner.checkpoint import step_folder
from learner.learner import Learner
from learner.memory import MOST, Measured, at_worst, peak_bytes, probe, rows_that_fit, seen_again, shared_probe, worst_seen_again
from tests.learner.tiny import load_model, mixed_group, tiny_config

CPU = torch.device("cpu")
MEBIBYTE = 2**20


def measuring(mode: Mode = Mode.soft) -> Config:
    config = tiny_config()
    config.policy.mode, config.policy.tau, config.policy.max_cot_tokens, config.policy.max_answer_tokens = mode, 0.5, 20, 10
    return config


def test_rows_lie_on_the_line_through_what_was_measured() -> None:
    few, many = (1000, 300_000), (2000, 400_000)  # 200,000 bytes, and 100 a row
    assert rows_that_fit(few, many, 800_000.0) == 6000
    assert rows_that_fit(few, many, 200_000.0) == rows_that_fit(few, many, 100_000.0) == 0
    assert rows_that_fit(few, many, 1e9) == MOST
    assert rows_that_fit(few, (2000, 300_000), 300_100.0) == 1100  # no growth was seen: a byte a row, not none


@pytest.mark.parametrize("each", [0, 3000])
@pytest.mark.parametrize(("prompts", "prompt", "samples"), [(3, 64, 8), (1, 200, 8), (20, 226, 8), (2, 226, 4), (7, 5, 1)])
def test_a_planned_micro_batch_needs_no_more_than_is_free(each: int, prompts: int, prompt: int, samples: int) -> None:
    """Whatever a row of a prompt that is seen again costs, and however many of them there are."""
    config = measuring()
    config.engine.max_model_len, config.rollout.samples_per_prompt = 256, 8  # prompts of at most 226

    def peak(samples: list[Weighted]) -> int:
        (batch,) = pack(samples, packed_rows(samples))
        keys = batch.segments.keys.flat.numel() - batch.segments.samples.flat.numel()
        assert keys == seen_again(samples)
        return 5 * MEBIBYTE + 10_000 * batch.rows + each * keys

    runs = probe(config, 1024), probe(config, 2048), shared_probe(config, 1024)
    found = [Measured(packed_rows(run), seen_again(run), peak(run)) for run in runs]
    one = probe(config, 1)[0][0]
    real = [(replace(one, prompt_ids=np.full(prompt, i, np.int32)), 1.0) for i in range(prompts) for _ in range(samples)]
    free = peak(real)
    fit = rows_that_fit(*at_worst(found[0], found[1], found[2], worst_seen_again(config)), float(free))
    assert fit <= packed_rows(real) + 1
    if each == 0 or (prompt, samples) == (226, 8):  # as many as there are: the plan wastes nothing
        assert fit >= packed_rows(real) - 1
    if each > 0 and samples > 1:  # the line alone would have let in more than fits
        assert rows_that_fit(found[0][::2], found[1][::2], float(free)) > packed_rows(real)


def test_short_samples_after_a_shared_prompt_are_measured_without_padding() -> None:
    samples = shared_probe(measuring(), 300)
    (batch,) = pack(samples, 10_000)
    assert 300 <= batch.rows < 316 and len(samples) == 3
    assert batch.segments.keys.padded.numel() == batch.segments.keys.flat.numel() == 3 * (256 + 16)


@pytest.mark.parametrize("mode", list(Mode))
def test_what_is_measured_is_the_longest_sample_there_can_be(mode: Mode) -> None:
    samples = probe(measuring(mode), 300)
    (batch,) = pack(samples, 10_000)
    assert 300 <= batch.rows == packed_rows(samples) < 300 + 64 + 30
    assert batch.generated == 30 * len(samples)
    assert len(batch.soft.sigma) == (0 if mode is Mode.hard else 20 * len(samples))


def test_the_peak_is_what_was_alive_at_once() -> None:
    before = memory.allocated_bytes(CPU)
    peak = peak_bytes(CPU, lambda: [torch.ones(64 * MEBIBYTE // 4) for _ in range(2)])
    assert abs(peak - before - 128 * MEBIBYTE) < 8 * MEBIBYTE


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Stands for a GPU: a list whose entry is what is free. Of the rows that really ran, a hundred take a mebibyte."""
    free = [0.0]

    def peak(_: torch.device, work: partial[object]) -> int:
        work()
        return 5 * MEBIBYTE + packed_rows(work.args[0]) * MEBIBYTE // 100

    monkeypatch.setattr(memory, "peak_bytes", peak)
    monkeypatch.setattr(memory, "allocated_bytes", lambda _: 0)
    monkeypatch.setattr(memory, "free_bytes", lambda _: free[0] / memory.SHARE)
    return free


def test_what_is_free_is_what_is_used_and_too_little_is_refused(tied_dir: Path, gpu: list[float]) -> None:
    learner = Learner(measuring(), tied_dir, 0, 1, CPU)

    def measured(free: float) -> int:
        gpu[0] = free
        return learner.measure_micro_batch()

    assert measured(1e15) == MOST
    assert measured(45 * MEBIBYTE) == pytest.approx(4000, abs=1)
    assert measured(25 * MEBIBYTE) == pytest.approx(2000, abs=1)
    with pytest.raises(RunError, match=r"room for 0 tokens, and a sample has 94; set learner.activation_checkpointing"):
        measured(0.0)


def test_a_cpu_asks_for_a_number(tied_dir: Path) -> None:
    with pytest.raises(InputError, match="measured on GPUs only; on a CPU set a number"):
        Learner(tiny_config(micro_batch_tokens=None), tied_dir, 0, 1, CPU)


def test_measuring_leaves_no_trace_in_the_weights(tied_dir: Path, gpu: list[float]) -> None:
    group = mixed_group(load_model(tied_dir), [Mode.soft, Mode.hard, Mode.fuzzy])
    gpu[0] = 1e15
    found = []
    for measures in (False, True):
        learner = Learner(measuring(), tied_dir, 0, 1, CPU)
        if measures:
            learner.measure_micro_batch()
        learner.accumulate(group)
        learner.finish_step()
        found.append(dict(learner.full_tensors(torch.float32)))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_that_resumes_keeps_what_was_measured(tied_dir: Path, tmp_path: Path) -> None:
    first, second = (Learner(measuring(), tied_dir, 0, 1, CPU) for _ in range(2))
    for learner, tokens in ((first, 4000), (second, 2000)):  # the second has less memory
        learner.config.learner.micro_batch_tokens, learner.micro_batch_tokens = None, tokens
    first.save(step_folder(tmp_path, 1), {"next_prompt": 7})
    assert second.load(step_folder(tmp_path, 1)) == {"next_prompt": 7} and second.micro_batch_tokens == 4000
    told = Learner(measuring(), tied_dir, 0, 1, CPU)
    assert told.load(step_folder(tmp_path, 1)) == {"next_prompt": 7} and told.micro_batch_tokens == 64

"""The learning-rate schedule in closed form, and the clip."""

import math

import pytest
import torch
from torch import nn

from configs.schema import Config, Schedule
from learner.optimiser import clip_gradients, lr_at


def config(schedule: Schedule = Schedule.cosine, steps: int = 100, warmup: int = 20) -> Config:
    made = Config()
    made.run.steps = steps
    made.learner.lr, made.learner.warmup_steps, made.learner.schedule = 2e-5, warmup, schedule
    return made


def test_warm_up_is_linear_and_reaches_the_peak() -> None:
    assert [lr_at(step, config()) for step in (0, 9, 19)] == pytest.approx([1e-6, 1e-5, 2e-5])


def test_cosine_falls_from_the_peak_to_zero_at_the_last_step() -> None:
    assert lr_at(20, config()) == pytest.approx(2e-5)
    assert lr_at(60, config()) == pytest.approx(1e-5)
    assert lr_at(40, config()) == pytest.approx(2e-5 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(100, config()) == pytest.approx(0.0, abs=1e-20)
    assert 0 < lr_at(99, config()) < 1e-7
    assert lr_at(1000, config()) == pytest.approx(0.0, abs=1e-20)


def test_constant_stays() -> None:
    assert lr_at(20, config(Schedule.constant)) == lr_at(99, config(Schedule.constant)) == 2e-5


def test_a_run_shorter_than_its_warm_up_and_one_without() -> None:
    assert lr_at(4, config(steps=5)) == pytest.approx(2e-5 * 5 / 20)
    assert lr_at(0, config(warmup=0)) == 2e-5


def test_clip_scales_all_gradients_by_one_factor() -> None:
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), 3.0), torch.full((2,), 4.0)
    norm = math.sqrt(6 * 9 + 2 * 16)
    assert clip_gradients(model, 1.0) == pytest.approx(norm)
    assert float(model.weight.grad[0, 0]) == pytest.approx(3 / norm, rel=1e-5)
    assert clip_gradients(model, 100.0) == pytest.approx(1.0, rel=1e-5)
    assert float(model.bias.grad[0]) == pytest.approx(4 / norm, rel=1e-5)


def test_clip_fills_in_missing_gradients_and_leaves_a_bad_one_alone() -> None:
    model = nn.Linear(3, 2)
    model.weight.grad = torch.full((2, 3), math.inf)
    assert math.isinf(clip_gradients(model, 1.0))
    assert model.bias.grad is not None and not model.bias.grad.any()
    assert torch.isinf(model.weight.grad).all()

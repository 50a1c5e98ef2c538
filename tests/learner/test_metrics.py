"""Metrics of several ranks as one."""

import numpy as np
import pytest

from learner.metrics import StepMeter, merge


def meter(loss: float, squares: float, residual: list[float]) -> StepMeter:
    return StepMeter(
        sums={"loss": loss, "cot_grad_hidden": squares},
        values={"residual": [np.array(residual, np.float32)], "mismatch_s": [np.zeros(0, np.float32)]},
    )


def test_sums_add_norms_add_in_squares_and_samples_pool() -> None:
    metrics = merge([meter(1.0, 9.0, [1.0, 1.0, 1.0]), meter(2.0, 16.0, [5.0])])
    assert metrics == pytest.approx(
        {
            "learner/loss": 3.0,
            "learner/cot_grad_hidden": 5.0,
            "learner/residual_mean": 2.0,
            "learner/residual_max": 5.0,
        }
    )


def test_a_rank_that_only_ran_fillers_adds_nothing() -> None:
    one = meter(1.0, 9.0, [1.0, 2.0])
    assert merge([StepMeter(), one]) == merge([one]) == merge([one, StepMeter()])
    assert merge([StepMeter()]) == {}

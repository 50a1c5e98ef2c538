"""Advantages against their closed forms."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from learner.advantage import grpo, rloo

rewards = st.lists(st.sampled_from([0.0, 10.0, 100.0]), min_size=2, max_size=32)


def test_rloo_subtracts_the_mean_of_the_others() -> None:
    np.testing.assert_allclose(rloo([100.0, 10.0, 0.0, 0.0]), [100 - 10 / 3, 10 - 100 / 3, -110 / 3, -110 / 3])


def test_grpo_is_zero_mean_and_unit_variance() -> None:
    advantages = grpo([100.0, 10.0, 0.0, 0.0])
    assert advantages.mean() == pytest.approx(0.0, abs=1e-12)
    assert advantages.std(ddof=1) == pytest.approx(1.0, abs=1e-6)


@given(rewards)
def test_advantages_sum_to_zero_and_do_not_see_a_shift(r: list[float]) -> None:
    for estimate in (rloo, grpo):
        assert estimate(r).sum() == pytest.approx(0.0, abs=1e-9)
        np.testing.assert_allclose(estimate(r), estimate([x + 7.0 for x in r]), atol=1e-9)


@given(rewards)
def test_rloo_is_the_centred_reward_scaled(r: list[float]) -> None:
    g = len(r)
    np.testing.assert_allclose(rloo(r), g / (g - 1) * (np.array(r) - np.mean(r)), atol=1e-9)


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_equal_rewards_teach_nothing(estimate: object) -> None:
    assert not estimate([10.0] * 5).any()  # type: ignore[operator]


@pytest.mark.parametrize("estimate", [rloo, grpo])
def test_one_sample_has_no_baseline(estimate: object) -> None:
    with pytest.raises(InputError, match="samples_per_prompt"):
        estimate([1.0])  # type: ignore[operator]

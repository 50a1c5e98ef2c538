"""pass@k is the share of subsets that hold a right answer, its interval covers, a vote is decided the same way every time."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Mode
from rollout.eval_statistics import (
    IndexMeans,
    bootstrap_interval,
    majority_vote,
    mixture_profile,
    normalised_answer,
    pass_at_k,
)
from rollout.trajectory import Trajectory


def counts(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


# pass@k


def test_pass_at_k_is_the_share_of_all_subsets_with_a_right_sample() -> None:
    for n in range(1, 9):
        for c in range(n + 1):
            right = [True] * c + [False] * (n - c)
            (curve,) = pass_at_k(counts(c), counts(n))
            for k in range(1, n + 1):
                subsets = list(combinations(right, k))
                assert curve[k - 1] == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=5))
def test_problems_of_different_sizes_each_follow_the_closed_form(problems: list[tuple[int, float]]) -> None:
    n = [size for size, _ in problems]
    c = [round(size * share) for size, share in problems]
    curves = pass_at_k(counts(*c), counts(*n))
    assert curves.shape == (len(n), min(n))
    for curve, size, right in zip(curves, n, c, strict=True):
        expected = [1 - comb(size - right, k) / comb(size, k) for k in range(1, min(n) + 1)]
        assert np.allclose(curve, expected, rtol=0, atol=1e-12)
        assert (np.diff(curve) >= -1e-15).all()


def test_pass_at_k_of_a_hundred_thousand_samples() -> None:
    n = 100_000
    ((*_, last),) = pass_at_k(counts(1), counts(n), up_to=n // 2)
    assert last == pytest.approx(0.5, abs=1e-10)  # one right sample: k / n
    ((first, *_),) = pass_at_k(counts(n - 1), counts(n), up_to=2)
    assert first == pytest.approx(1 - 1e-5, abs=1e-15)
    assert pass_at_k(counts(0, n), counts(n, n), up_to=1).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("correct", "samples", "up_to", "message"),
    [
        ([], [], None, r"pass@k: there are no samples; expected at least one a problem"),
        ([1, 0], [2, 0], None, r"pass@k: a problem has no samples"),
        ([1, 1], [4, 3], 4, r"pass@4: expected k from 1 to 3, the fewest samples of a problem; raise eval.samples"),
        ([1], [4], 0, r"pass@0: expected k from 1 to 4"),
    ],
)
def test_zero_samples_and_k_above_n_are_one_line(correct: list[int], samples: list[int], up_to: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pass_at_k(counts(*correct), counts(*samples), up_to)


# Bootstrap


def test_the_interval_is_the_same_with_the_same_seed_and_holds_the_mean() -> None:
    values = np.random.default_rng(1).random((50, 3))
    low, high = bootstrap_interval(values, seed=7)
    again = bootstrap_interval(values, seed=7)
    other = bootstrap_interval(values, seed=8)
    assert low.tobytes() == again[0].tobytes() and high.tobytes() == again[1].tobytes()
    assert low.tobytes() != other[0].tobytes()
    assert (low < values.mean(axis=0)).all() and (values.mean(axis=0) < high).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(2)
    rounds, covered = 400, 0
    for seed in range(rounds):
        low, high = bootstrap_interval((generator.random(80) < 0.3).astype(float), seed, resamples=400)
        covered += low <= 0.3 <= high
    assert 0.91 <= covered / rounds <= 0.98  # 0.95, less a little for a percentile bootstrap of 80


def test_a_column_of_a_table_has_the_interval_of_that_column_alone() -> None:
    values = np.random.default_rng(3).random((20, 2))
    low, high = bootstrap_interval(values, seed=0)
    alone = bootstrap_interval(values[:, 1], seed=0)
    assert (low[1], high[1]) == pytest.approx(alone)
    with pytest.raises(InputError, match="bootstrap: there are no problems"):
        bootstrap_interval(np.empty(0), seed=0)


# Majority vote


@pytest.mark.parametrize(
    "same",
    [
        ["1/2", "0.5", "0.50", r"\frac{1}{2}", r"\dfrac{2}{4}", r"\frac12", " .5 ", "$1/2$"],
        ["1000", "1,000", "1000.0", "+1000", "1000.", r"1\,000"],
        ["-3", "- 3", "-3.00", r"-\frac{6}{2}"],
        [r"\left(1, 2\right)", "(1,2)", r"\text{(}1,2)"],
        [r"\text{east}", "east"],
    ],
)
def test_equivalent_texts_are_one_answer(same: list[str]) -> None:
    assert len({normalised_answer(text) for text in same}) == 1


def test_different_answers_stay_apart() -> None:
    texts = ["1", "-1", "1/3", "0.3333", "x", "2x", "(1,2)", "12", r"\sqrt{2}", "1/0", "", r"\leftarrow", "1,2"]
    assert len({normalised_answer(text) for text in texts}) == len(texts)


@given(st.text(max_size=20))
def test_any_text_can_be_voted_for(text: str) -> None:
    assert majority_vote([text]) == 0


def test_the_most_frequent_answer_wins_and_a_tie_goes_to_the_first() -> None:
    assert majority_vote(["3", "1/2", "0.5", "4"]) == 1
    assert majority_vote(["4", "3", "3", "4"]) == 0
    assert majority_vote([None, "3", None, None]) == 1  # an abstention is no vote
    assert majority_vote([None, None]) is None and majority_vote([]) is None


# Mixtures


def trajectory(steps: list[list[float]], mode: Mode = Mode.soft) -> Trajectory:
    """A trajectory whose supports have these probabilities."""
    flat = [p for step in steps for p in step]
    return Trajectory(
        prompt_ids=np.zeros(1, np.int32),
        prompt_index=0,
        sample_index=0,
        mode=mode,
        tau=0.5,
        sigma=0.1,
        noise_seed=0,
        shadow_ids=np.zeros(len(steps), np.int32),
        support_ids=np.arange(len(flat), dtype=np.int32),
        support_probs=np.array(flat, np.float32),
        support_offsets=np.concatenate([[0], np.cumsum([len(step) for step in steps])]).astype(np.int64),
        dropped_mass=np.full(len(steps), 1e-4, np.float32),
        soft_embeddings=None,
        prefill_ids=np.zeros(0, np.int32),
        answer_ids=np.zeros(0, np.int32),
        answer_logprobs=np.zeros(0, np.float32),
        stop_reason="closed",
        phrase_found=True,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )


def test_the_entropy_of_equal_probabilities_is_the_log_of_their_number() -> None:
    profile = mixture_profile(trajectory([[0.25] * 4, [1.0], [0.5, 0.5], [0.9, 0.1]]))
    assert profile.entropy == pytest.approx([np.log(4), 0.0, np.log(2), 0.325083], abs=1e-6)
    assert (profile.entropy >= 0).all()
    assert profile.support_size.tolist() == [4, 1, 2, 2]
    assert profile.dropped_mass == pytest.approx([1e-4] * 4)


def test_a_hard_sample_has_no_mixture() -> None:
    profile = mixture_profile(trajectory([[], [], []], Mode.hard))
    assert (len(profile.entropy), len(profile.support_size), len(profile.dropped_mass)) == (0, 0, 0)


def test_an_index_is_averaged_over_the_samples_that_reached_it() -> None:
    first, second = IndexMeans(), IndexMeans()
    for row in ([1.0, 3.0], [2.0], []):
        first.add(row)
    second.add([3.0, 5.0, 7.0])
    assert (first.mean.tolist(), first.counts.tolist()) == ([1.5, 3.0], [2, 1])
    both = IndexMeans.merged([first, second])
    assert (both.mean.tolist(), both.counts.tolist()) == ([2.0, 4.0, 7.0], [3, 2, 1])
    assert first.counts.tolist() == [2, 1]

"""The six settings are told apart by what is asked of the engine, and differ in nothing else."""

from pathlib import Path

import numpy as np
import pytest

from configs.errors import InputError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS, Config, Mode
from rollout.evaluation import evaluation_requests, samples_per_setting, setting_of
from rollout.tasks import Problem
from rollout.trajectory import SampleRequest

PROBLEMS = [Problem(index, f"What is {index} + 1?", str(index + 1)) for index in range(3)]
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def six(*overrides: str) -> Config:
    return load_config(DEMO, [f"eval.settings=[{', '.join(EVAL_SETTINGS)}]", "eval.samples=4", *overrides])


def requests(config: Config, sigma: float = 0.25) -> list[SampleRequest]:
    return list(evaluation_requests(config, PROBLEMS, lambda problem: np.full(4, problem.index, np.int32), sigma))


def test_a_greedy_setting_takes_one_sample_and_the_others_eval_samples() -> None:
    config = six()
    assert list(samples_per_setting(config).values()) == [1, 4, 1, 4, 1, 4]
    found = requests(config)
    assert len(found) == 3 * 15
    assert [r.prompt_index for r in found] == sorted(r.prompt_index for r in found)  # a prompt's samples share its cache
    keys = {(r.prompt_index, setting_of(r), r.sample_index) for r in found}
    assert keys == {(p, s, i) for p in range(3) for s, n in samples_per_setting(config).items() for i in range(n)}


def test_answers_are_greedy_and_only_sampled_soft_settings_have_noise() -> None:
    for request in requests(six()):
        assert request.answer_temperature == 0
        assert (request.sigma == 0.25) == (setting_of(request) in ("soft_sample", "fuzzy_sample"))
        assert (request.tau == 0) == (setting_of(request) == "hard_greedy")


def test_settings_are_compared_under_the_same_noise_and_problems_are_not() -> None:
    seeds = {}
    for request in requests(six()):
        seeds.setdefault((request.prompt_index, request.sample_index), set()).add(request.seed)
    assert all(len(of_sample) == 1 for of_sample in seeds.values())
    assert len({seed for of_sample in seeds.values() for seed in of_sample}) == 12


def test_an_evaluation_may_think_longer_than_training() -> None:
    assert {r.max_cot_tokens for r in requests(six())} == {six().policy.max_cot_tokens}
    assert {r.max_cot_tokens for r in requests(six("eval.max_cot_tokens=50"))} == {50}


def test_a_noisy_setting_without_noise_is_refused() -> None:
    with pytest.raises(InputError, match=r"eval.settings: soft_sample needs noise, but policy.gamma is 0"):
        requests(six(), sigma=0.0)
    quiet = six("eval.settings=[hard_sample, soft_greedy]", "policy.mode=hard", "policy.gamma=0")
    assert {setting_of(r) for r in requests(quiet, sigma=0.0)} == {"hard_sample", "soft_greedy"}


def test_training_samples_are_of_no_setting() -> None:
    request = requests(six())[0]
    with pytest.raises(KeyError):
        setting_of(type(request)(**{name: getattr(request, name) for name in request.__slots__} | {"mode": Mode.soft, "tau": 0.3}))

"""Requests of the paper's six inference settings (paper, section 4.2); answers are always greedy."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import EVAL_SETTINGS, Config
from rollout.tasks import Problem
from rollout.trajectory import SampleRequest, Trajectory, sample_seed

SETTING_OF = {decoding: name for name, decoding in EVAL_SETTINGS.items()}


def samples_per_setting(config: Config) -> dict[str, int]:
    """For each of `eval.settings`, `eval.samples` per problem; a greedy setting leaves nothing to chance and takes one."""
    return {setting: 1 if setting.endswith("greedy") else config.eval.samples for setting in config.eval.settings}


def evaluation_requests(
    config: Config, problems: Iterable[Problem], prompt_ids: Callable[[Problem], NDArray[np.int32]], sigma: float
) -> Iterator[SampleRequest]:
    """The requests of `samples_per_setting`, all of one problem before the next, so that an engine finds its prompt cached.

    A sample's noise depends on run seed, problem and sample alone: the settings are compared under the same noise.
    Raises InputError for a setting with noise where sigma is 0: it would be its own greedy setting, drawn many times.
    """
    drawn = samples_per_setting(config)
    for setting in drawn:
        if EVAL_SETTINGS[setting][2] and sigma == 0:
            raise InputError(f"eval.settings: {setting} needs noise, but policy.gamma is 0; raise it, or leave {setting} out")
    for problem in problems:
        ids = prompt_ids(problem)
        for setting, samples in drawn.items():
            mode, tau, noisy = EVAL_SETTINGS[setting]
            for sample in range(samples):
                yield SampleRequest(
                    prompt_ids=ids,
                    prompt_index=problem.index,
                    sample_index=sample,
                    mode=mode,
                    tau=tau,
                    sigma=sigma if noisy else 0.0,
                    seed=sample_seed(config.run.seed, "evaluation", problem.index, sample),
                    max_cot_tokens=config.eval_cot_tokens,
                    max_answer_tokens=config.policy.max_answer_tokens,
                    answer_temperature=0.0,
                )


def setting_of(drawn: SampleRequest | Trajectory) -> str:
    """Which of EVAL_SETTINGS a sample was drawn under. Raises KeyError for one of training."""
    return SETTING_OF[drawn.mode, drawn.tau, drawn.sigma > 0]

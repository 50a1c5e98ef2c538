"""Accuracy under the paper's inference settings (paper, section 4.2); answers are always greedy."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import EVAL_SETTINGS, Config
from rollout.tasks import Problem
from rollout.trajectory import Sample, SampleRequest, sample_seed


@dataclass(frozen=True, slots=True)
class Accuracy:
    setting: str
    correct: int
    samples: int
    boxed: int  # samples with a closed box, right or wrong

    @property
    def share(self) -> float:
        return self.correct / self.samples


def evaluation_requests(
    config: Config, setting: str, problems: list[Problem], prompt_ids: Callable[[Problem], NDArray[np.int32]], sigma: float
) -> list[SampleRequest]:
    """`eval.samples` requests per problem under one setting; a greedy setting has no noise and takes one."""
    mode, tau, noisy = EVAL_SETTINGS[setting]
    samples = 1 if setting.endswith("greedy") else config.eval.samples
    return [
        SampleRequest(
            prompt_ids=prompt_ids(problem),
            prompt_index=problem.index,
            sample_index=sample,
            mode=mode,
            tau=tau,
            sigma=sigma if noisy else 0.0,
            seed=sample_seed(config.run.seed, "evaluation", problem.index, sample),
            max_cot_tokens=config.policy.max_cot_tokens,
            max_answer_tokens=config.policy.max_answer_tokens,
            answer_temperature=0.0,
        )
        for problem in problems
        for sample in range(samples)
    ]


async def accuracy(setting: str, samples: AsyncIterator[Sample]) -> Accuracy:
    """Counts over scored samples."""
    correct = boxed = total = 0
    async for sample in samples:
        total += 1
        correct += sample.correct
        boxed += sample.reward > 0
    return Accuracy(setting, correct, total, boxed)

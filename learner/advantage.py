"""Rewards of one group -> advantages. Pure functions over float64 numpy arrays; the paper uses RLOO."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Advantage

GRPO_EPS = 1e-6  # keeps a group whose rewards are all equal at zero instead of 0/0


def rloo(rewards: Sequence[float]) -> NDArray[np.float64]:
    """Leave-one-out baseline (paper, section 3.3): A_g = r_g - mean of the other G-1 rewards.

    Returns float64 [G]. Raises InputError for fewer than two rewards: the baseline is the other samples.
    """
    r = _group(rewards)
    others = (r.sum() - r) / (len(r) - 1)
    return r - others


def grpo(rewards: Sequence[float]) -> NDArray[np.float64]:
    """Group-normalised advantages: (r - mean) / (std + eps), std with G-1 in the denominator (DeepSeekMath, section 4.1.2).

    Returns float64 [G]. Raises InputError for fewer than two rewards.
    """
    r = _group(rewards)
    return (r - r.mean()) / (r.std(ddof=1) + GRPO_EPS)


def _group(rewards: Sequence[float]) -> NDArray[np.float64]:
    if len(rewards) < 2:
        raise InputError(
            f"a group of {len(rewards)} sample has no other sample to compare with; set rollout.samples_per_prompt to 2 or more"
        )
    return np.asarray(rewards, dtype=np.float64)


ESTIMATORS: dict[Advantage, Callable[[Sequence[float]], NDArray[np.float64]]] = {Advantage.rloo: rloo, Advantage.grpo: grpo}

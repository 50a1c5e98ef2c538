"""checkpoints/best: the weights of the best validation so far.

Its own controller.json says of which step the weights are, how good they were, and by which validation. Nothing else does: a run
that resumes from an older step may find the best weights to be of a later one, and they stay what they are until others are better.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import Config
from learner.checkpoint import CONTROLLER
from learner.checkpoint import FOLDER as CHECKPOINTS
from rollout.rows import fingerprint
from rollout.tasks import Problem

BEST = "best"  # the folder, beside the numbered checkpoints


@dataclass(frozen=True, slots=True)
class Best:
    """What is stored with the best weights."""

    step: int
    score: float  # share right
    validation: Mapping[str, Any]  # of `validation_of`: scores of two validations do not compare

    def beats(self, other: "Best | None") -> bool:
        """Whether it takes the other's place: by a score that is not lower, or because the validation has changed."""
        return other is None or self.validation != other.validation or self.score >= other.score


def require_greedy_setting(config: Config) -> None:
    """Raises InputError where no validation could choose the best checkpoint."""
    if config.selecting_setting is None:
        settings = ", ".join(config.eval.settings)
        raise InputError(
            f"eval.settings = [{settings}]: expected a greedy one too, such as hard_greedy: it chooses the best checkpoint"
        )


def validation_of(config: Config, problems: Sequence[Problem]) -> dict[str, Any]:
    """What a resumed run may change of the validation that chooses the best checkpoint."""
    return {
        "setting": config.selecting_setting,
        "max_cot_tokens": config.eval_cot_tokens,
        "problems": len(problems),
        "fingerprint": fingerprint(*(problem.fingerprint for problem in problems)),
    }


def read_best(run: Path) -> Best | None:
    """What a run's best checkpoint is; None where there is none yet. Raises InputError for one that does not say."""
    folder = run / CHECKPOINTS / BEST
    try:
        stored = json.loads((folder / CONTROLLER).read_text())
        return Best(int(stored["step"]), float(stored["score"]), dict(stored["validation"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{folder / CONTROLLER}: expected JSON with step, score and validation ({type(error).__name__}); "
            f"remove {folder}, and the next validation chooses anew"
        ) from error

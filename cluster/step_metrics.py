"""The row of metrics.jsonl that one step writes: rollouts as they come in, then learner, push and engines."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from configs.schema import Mode
from rollout.trajectory import Group, Trajectory


class StepMetrics:
    """Collects one step; make a new one for the next."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._seconds = {"time/wait_rollout": 0.0, "time/wait_learner": 0.0}
        self._rollout_s = 0.0
        self._groups: list[Group] = []

    @contextmanager
    def timed(self, key: str) -> Iterator[None]:
        """Add the body's wall-clock seconds to "time/wait_rollout" or "time/wait_learner". Raises KeyError for another key."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[key] += time.perf_counter() - begun

    def add_group(self, group: Group) -> None:
        """Count a group when it comes: rollout tokens/s is reckoned from this object's making to the last one."""
        self._groups.append(group)
        self._rollout_s = time.perf_counter() - self._begun  # until the last group came

    def finish(self, learned: dict[str, float], pushed: dict[str, float]) -> dict[str, float]:
        """All keys of the step (design: metric keys); a quantity that the mode does not have is left out."""
        samples = [sample for group in self._groups for sample in group.samples]
        trajectories = [sample.trajectory for sample in samples]
        generated = sum(t.generated for t in trajectories)
        return {
            "reward/mean": float(np.mean([s.reward for s in samples])),
            "reward/correct": float(np.mean([s.correct for s in samples])),
            "reward/timed_out": float(sum(s.timed_out for s in samples)),
            "rollout/tokens": float(generated),
            "rollout/tokens_per_s": generated / max(self._rollout_s, 1e-9),
            "rollout/cot_length_mean": float(np.mean([t.cot_length for t in trajectories])),
            "rollout/phrase_found": float(np.mean([t.phrase_found for t in trajectories])),
            **mixture_metrics(trajectories),
            **learned,
            **pushed,
            **self._seconds,
            "time/step": time.perf_counter() - self._begun,
            "queue/depth": 0.0,  # strictly on-policy: nothing waits beyond the batch itself
            "queue/staleness_mean": 0.0,
        }


def mixture_metrics(trajectories: list[Trajectory]) -> dict[str, float]:
    """How soft the rollouts were: share of soft steps, support size, dropped mass, and the record's cost."""
    soft = [t for t in trajectories if t.mode is not Mode.hard]
    steps = sum(t.cot_length for t in soft)
    metrics: dict[str, float] = {"rollout/soft_fraction": steps / max(1, sum(t.generated for t in trajectories))}
    if steps:
        dropped = np.concatenate([t.dropped_mass for t in soft])
        metrics["rollout/dropped_mass_p99"] = float(np.quantile(dropped, 0.99))
        metrics["rollout/support_mean"] = sum(len(t.support_ids) for t in soft) / steps
        metrics["record/bytes_per_token"] = sum(record_bytes(t) for t in soft) / steps
    return metrics


def record_bytes(trajectory: Trajectory) -> int:
    """Bytes of what a soft CoT adds to a trajectory."""
    arrays: list[Any] = [
        trajectory.support_ids,
        trajectory.support_probs,
        trajectory.support_offsets,
        trajectory.soft_embeddings,
    ]
    return sum(array.nbytes for array in arrays if array is not None)

"""Sums and samples of one step's micro-batches, then one flat dictionary for all ranks. Keys are those of metrics.jsonl."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from learner.batch import PackedBatch
from learner.losses import Terms

SQUARED = ("cot_grad_hidden", "answer_grad_hidden")  # summed as squares, reported as norms
TAILS = {"residual": ("max", 1.0), "mismatch_s": ("p99", 0.99)}


@dataclass
class StepMeter:
    """What one rank saw of a step. `reduce` is collective: every rank calls it, every rank gets the same numbers."""

    sums: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)  # one entry per CoT step or answer token

    def add_batch(self, batch: PackedBatch, terms: Terms) -> None:
        """Counts a micro-batch, after its backward so that the gradients of the hidden rows are there. Fillers do not count."""
        if batch.filler:
            return
        self._add("loss", terms.loss)
        self._add("loss_cot", terms.cot_loss)
        self._add("loss_answer", terms.answer_loss)
        self._add("tokens", batch.generated)
        for name, hidden in zip(SQUARED, (terms.cot_hidden, terms.answer_hidden), strict=True):
            self._add(name, 0.0 if hidden.grad is None else hidden.grad.float().square().sum())
        self._extend("residual", terms.residual)
        self._extend("mismatch_s", terms.mismatch)
        self._extend("cot_entropy", torch.cat([terms.soft_entropy, terms.hard_entropy]))
        self._extend("answer_entropy", terms.answer_entropy)
        self._extend("answer_logprob_gap", (terms.answer_logprob - batch.answer.engine_logprob).abs())

    def reduce(self) -> dict[str, float]:
        """The `learner/...` metrics over all ranks."""
        meters: list[StepMeter] = [self] * dist.get_world_size()
        dist.all_gather_object(meters, self)
        return merge(meters)

    def _add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach() if isinstance(value, Tensor) else value)

    def _extend(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value.detach().float().cpu().numpy())


def merge(meters: Sequence[StepMeter]) -> dict[str, float]:
    """`learner/...` metrics of several ranks' meters. What nothing measured (the residual of a hard run) has no key."""
    metrics: dict[str, float] = {}
    for name in sorted({name for meter in meters for name in meter.sums}):
        total = sum(meter.sums.get(name, 0.0) for meter in meters)
        metrics[f"learner/{name}"] = total**0.5 if name in SQUARED else total
    for name in sorted({name for meter in meters for name in meter.values}):
        found = np.concatenate([part for meter in meters for part in meter.values.get(name, [])])
        if len(found):
            metrics[f"learner/{name}_mean"] = float(found.mean(dtype=np.float64))
            if name in TAILS:
                suffix, quantile = TAILS[name]
                metrics[f"learner/{name}_{suffix}"] = float(np.quantile(found, quantile))
    return metrics

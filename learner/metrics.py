"""Sums and samples of one step's micro-batches, then one flat dictionary for all ranks. Keys are those of metrics.jsonl."""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from learner.batch import PackedBatch
from learner.losses import Terms


@dataclass
class StepMeter:
    """What this rank saw of a step. `reduce` is collective: every rank calls it, every rank gets the same numbers."""

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
        for name, hidden in (("cot_grad_hidden", terms.cot_hidden), ("answer_grad_hidden", terms.answer_hidden)):
            self._add(name, 0.0 if hidden.grad is None else hidden.grad.float().square().sum())
        self._extend("residual", terms.residual)
        self._extend("mismatch_s", terms.mismatch)
        self._extend("cot_entropy", torch.cat([terms.soft_entropy, terms.hard_entropy]))
        self._extend("answer_entropy", terms.answer_entropy)
        self._extend("answer_logprob_gap", (terms.answer_logprob - batch.answer.engine_logprob).abs())

    def reduce(self) -> dict[str, float]:
        """`learner/...` metrics over all ranks; a quantity that nothing measured (the residual of a hard run) has no key."""
        ranks: list[StepMeter | None] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, self)
        meters = [meter for meter in ranks if meter is not None]
        sums = {name: sum(meter.sums.get(name, 0.0) for meter in meters) for meter in meters for name in meter.sums}
        values = {
            name: np.concatenate([part for meter in meters for part in meter.values[name]])
            for name in (meters[0].values if meters else ())
        }
        metrics = {f"learner/{name}": total for name, total in sums.items() if not name.endswith("_grad_hidden")}
        metrics |= {f"learner/{name}": total**0.5 for name, total in sums.items() if name.endswith("_grad_hidden")}
        for name, found in values.items():
            if len(found):
                metrics[f"learner/{name}_mean"] = float(found.mean(dtype=np.float64))
        for name, tail in (("residual", 1.0), ("mismatch_s", 0.99)):
            if len(values.get(name, ())):
                metrics[f"learner/{name}_{'max' if tail == 1.0 else 'p99'}"] = float(np.quantile(values[name], tail))
        return metrics

    def _add(self, name: str, value: Tensor | float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(value.detach() if isinstance(value, Tensor) else value)

    def _extend(self, name: str, value: Tensor) -> None:
        self.values.setdefault(name, []).append(value.detach().float().cpu().numpy())

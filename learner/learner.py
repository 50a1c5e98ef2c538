"""One rank of the learner: groups in, gradients accumulated, one optimiser step a batch. No Ray in here.

    begin_step(step)                forget the last step's numbers
    accumulate(group) x B           as groups arrive: advantages, packing, this rank's micro-batches, forward and backward
    finish_step() -> metrics        clip, AdamW, learning rate; the metrics are the same on every rank

Methods are collective: all ranks call them with the same arguments, in the same order. A fault that one rank finds (a loss that
is not finite) is therefore kept until `finish_step`, where all ranks raise it together and no weight has changed.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor

from configs.errors import InputError, RunError
from configs.schema import Config
from learner import checkpoint
from learner.advantage import ESTIMATORS
from learner.batch import PackedBatch, Weighted, pack, packed_rows, split_for_ranks
from learner.losses import Terms
from learner.memory import measured_micro_batch
from learner.metrics import StepMeter
from learner.optimiser import build_optimiser, clip_gradients, lr_at
from learner.policy import build_policy
from rollout.trajectory import Group

MEASURED = "measured_micro_batch_tokens"  # in a checkpoint: a run that resumes cuts its batches as it did


class Learner:
    """Owns a rank's shard of the policy, the optimiser and the count of finished steps."""

    def __init__(self, config: Config, model_dir: str | Path, rank: int, world_size: int, device: torch.device) -> None:
        """Loads and shards the model. The default process group must be up, with `world_size` ranks.

        Raises InputError for a model that cannot be trained, or for micro-batches that cannot be measured.
        """
        if not dist.is_initialized() or (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
            raise RunError(f"learner rank {rank} of {world_size}: torch.distributed is not initialised as such")
        if config.learner.micro_batch_tokens is None and device.type == "cpu":
            raise InputError(
                "learner.micro_batch_tokens = null: what fits is measured on GPUs only; on a CPU set a number, such as 1024"
            )
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.policy = build_policy(model_dir, config, device)
        self.optimiser = build_optimiser(self.policy, config)
        self.step = 0  # finished optimiser steps
        self.begin_step(0)
        self.micro_batch_tokens = config.learner.micro_batch_tokens or self.measure_micro_batch()

    def rms_embedding(self) -> float:
        """RMS over all entries of the loaded model's E, before any training: sigma = gamma * RMS (paper, section 4.1)."""
        return self.policy.rms_embedding

    def measure_micro_batch(self) -> int:
        """Rows of a micro-batch that fit this model and these lengths (learner/memory.py). Forgets a step that was begun."""

        def run(samples: list[Weighted]) -> None:
            (batch,) = pack(samples, packed_rows(samples))
            self.policy(batch.to(self.device)).loss.backward()

        found = measured_micro_batch(self.config, self.device, run)
        self.begin_step(0)
        return found

    def begin_step(self, step: int) -> None:
        """Forgets what an earlier step, finished or abandoned, left behind. `step` is the run's own count, for messages."""
        self._named_step = step
        self.optimiser.zero_grad(set_to_none=True)
        self._meter = StepMeter()
        self._pending: dict[bool, list[Weighted]] = {True: [], False: []}  # by whether there is a gradient to compute
        self._fault: str | None = None
        self._busy_s = 0.0

    def accumulate(self, group: Group) -> None:
        """Adds the group's gradient, weighted by advantage / (B G), as soon as there is a whole micro-batch to run.

        Groups smaller than a micro-batch wait for the next, because every forward and backward gathers and casts all weights.
        Raises RunError for a reward that is not finite.
        """
        with self._busy():
            # Equal rewards have no advantage: the gradient is zero, so a forward for the metrics is enough.
            learn = any(sample.reward != group.samples[0].reward for sample in group.samples)
            self._pending[learn] += self._weighted(group)
            if packed_rows(self._pending[learn]) >= self.micro_batch_tokens * self.world_size:
                self._run_pending(learn)

    def flush(self) -> None:
        """Runs the groups that still wait for a full micro-batch; gradients are complete after it."""
        for learn in (True, False):
            self._run_pending(learn)

    def finish_step(self) -> dict[str, float]:
        """Clips, steps the optimiser and returns the step's `learner/...` metrics.

        Raises RunError, on all ranks and before any weight changed, for a loss or a gradient norm that is not finite.
        """
        with self._busy():
            self.flush()
            faults: list[str | None] = [None] * self.world_size
            dist.all_gather_object(faults, self._fault)
            if fault := next((fault for fault in faults if fault), None):
                self.begin_step(self._named_step)
                raise RunError(fault)
            norm = clip_gradients(self.policy, self.config.learner.clip)
            if not math.isfinite(norm):
                self.begin_step(self._named_step)
                raise RunError(
                    f"step {self._named_step}: the gradient norm is {norm} though the losses are finite; lower learner.lr"
                )
            lr = lr_at(self.step, self.config)
            for parameter_group in self.optimiser.param_groups:
                parameter_group["lr"] = lr
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.step += 1
            metrics = self._meter.reduce()
        return metrics | {
            "learner/grad_norm": norm,
            "learner/clipped": float(norm > self.config.learner.clip),
            "learner/lr": lr,
            "learner/busy_seconds": self._busy_s,
            "learner/tokens_per_s": metrics.get("learner/tokens", 0.0) / max(self._busy_s, 1e-9),
        }

    def token_logprobs(self, sequences: Sequence[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """log p of every token given those before it, float32 [T-1] a sequence, at temperature 1 with float32 logits."""
        with torch.no_grad():
            found = [
                self.policy.next_token_logprobs(torch.as_tensor(np.asarray(ids, np.int64), device=self.device)).cpu().numpy()
                for ids in sequences
            ]
        self._reshard()
        return found

    def full_tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor in `dtype`) of every weight, named and ordered as in the Hugging Face model, without a tied head.

        Each step of the iterator is a collective gather: all ranks must drain it.
        """
        for name, parameter in self.policy.model.named_parameters():
            tensor = parameter.detach().to(dtype)
            yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def tensor_shapes(self) -> list[tuple[str, torch.Size]]:
        """Names and whole shapes of what `full_tensors` yields, in its order; no communication."""
        return [(name, parameter.shape) for name, parameter in self.policy.model.named_parameters()]

    def save(self, folder: Path, controller: Mapping[str, Any]) -> None:
        """Writes a checkpoint of this step into `folder`, whole or not at all (learner/checkpoint.py)."""
        measured = {MEASURED: self.micro_batch_tokens} if self.config.learner.micro_batch_tokens is None else {}
        checkpoint.save(folder, self.step, self.policy.model, self.optimiser, {**controller, **measured})

    def load(self, folder: Path) -> dict[str, Any]:
        """Goes on from a checkpoint; returns what the controller had stored. `rms_embedding` stays that of the base model."""
        self.step, controller = checkpoint.load(folder, self.policy.model, self.optimiser)
        self.begin_step(self.step)
        measured = controller.pop(MEASURED, None)
        if self.config.learner.micro_batch_tokens is None and measured is not None:
            self.micro_batch_tokens = measured
        return controller

    def _weighted(self, group: Group) -> list[Weighted]:
        """The group's trajectories with their weights in the loss, checked."""
        for sample in group.samples:
            name = f"step {group.step}, prompt {group.prompt_index}, sample {sample.trajectory.sample_index}"
            if not math.isfinite(sample.reward):
                raise RunError(
                    f"{name}: the reward is {sample.reward}, expected a finite number; the answer is {sample.answer_text!r}"
                )
            if not np.isfinite(sample.trajectory.support_probs).all():  # one NaN row would spread over its micro-batch
                raise RunError(f"{name}: the recorded probabilities are not finite; no weight was changed")
            ids = np.concatenate([sample.trajectory.input_ids(), sample.trajectory.support_ids])
            if len(ids) and not 0 <= ids.min() <= ids.max() < self.policy.head.shape[0]:
                raise InputError(
                    f"{name}: token ids reach {ids.min()}..{ids.max()}, the model has {self.policy.head.shape[0]} tokens; "
                    "were these rollouts written with another model?"
                )
        advantages = ESTIMATORS[self.config.learner.advantage]([sample.reward for sample in group.samples])
        scale = 1.0 / (self.config.rollout.prompts_per_step * len(group.samples))
        return [(sample.trajectory, float(a) * scale) for sample, a in zip(group.samples, advantages, strict=True)]

    def _run_pending(self, learn: bool) -> None:
        """Packs what waits and runs this rank's share of it."""
        if not self._pending[learn]:
            return
        batches = pack(self._pending[learn], self.micro_batch_tokens, self.world_size)
        self._pending[learn] = []
        for batch in split_for_ranks(batches, self.world_size)[self.rank]:
            self._run(batch.to(self.device), self._named_step, learn)

    def _run(self, batch: PackedBatch, step: int, learn: bool) -> None:
        if learn:
            terms: Terms = self.policy(batch)
            terms.loss.backward()
        else:
            with torch.no_grad():
                terms = self.policy(batch)
            self._reshard()
        self._fault = self._fault or find_fault(batch, terms, step)
        self._meter.add_batch(batch, terms)

    def _reshard(self) -> None:
        """After a forward without a backward the root unit would stay unsharded, and serve old weights after the next step."""
        self.policy.reshard()  # type: ignore[operator]

    @contextmanager
    def _busy(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._busy_s += time.perf_counter() - begin


def find_fault(batch: PackedBatch, terms: Terms, step: int) -> str | None:
    """One line naming the first sample of the micro-batch whose loss is not finite, or None."""
    if bool(torch.isfinite(terms.loss)):
        return None
    for what, steps, logprob in (
        ("soft CoT", batch.soft, terms.soft_logprob),
        ("hard CoT", batch.hard, terms.hard_logprob),
        ("answer", batch.answer, terms.answer_logprob),
    ):
        bad = torch.nonzero(~torch.isfinite(logprob * steps.weight))
        if len(bad):
            first = int(bad[0])
            sample = int(steps.sample[first])
            name = f"step {step}, prompt {batch.prompt_index[sample]}, sample {batch.sample_index[sample]}"
            value, weight = float(logprob[first]), float(steps.weight[first])
            return f"{name}: a {what} step has log-probability {value} and weight {weight}; no weight of the model was changed"
    return f"step {step}, prompt {batch.prompt_index[0]}: the loss is {float(terms.loss)}"

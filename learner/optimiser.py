"""AdamW on sharded float32 masters, the learning rate as a pure function of the step, and the gradient clip."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import Config, Schedule


def build_optimiser(policy: nn.Module, config: Config) -> torch.optim.AdamW:
    """Fused AdamW over the policy's parameters, each once even when tied. The learning rate is set anew before every step."""
    learner = config.learner
    optimiser = torch.optim.AdamW(policy.parameters(), lr=learner.lr, weight_decay=learner.weight_decay, fused=True)
    # As AdamW would in its first step; made now, they are there to be read into when a run resumes.
    for parameter in policy.parameters():
        zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimiser.state[parameter] = {"step": torch.zeros((), device=parameter.device), **zeros}
    return optimiser


def lr_at(step: int, config: Config) -> float:
    """Learning rate of optimiser step `step`, counted from 0.

    Warm-up: lr (step + 1) / warmup_steps. Then, for `cosine`, from lr at step = warmup_steps down to 0 at run.steps.
    """
    learner = config.learner
    if step < learner.warmup_steps:
        return learner.lr * (step + 1) / learner.warmup_steps
    if learner.schedule is Schedule.constant:
        return learner.lr
    span = max(1, config.run.steps - learner.warmup_steps)
    progress = min(1.0, (step - learner.warmup_steps) / span)
    return learner.lr * 0.5 * (1.0 + math.cos(math.pi * progress))


def clip_gradients(policy: nn.Module, clip: float) -> float:
    """Scales the gradients of all ranks to a global norm of at most `clip`; returns the norm before.

    Missing gradients become zero. A norm that is not finite scales nothing: the caller must not step.
    """
    parameters = list(policy.parameters())
    for parameter in parameters:
        if parameter.grad is None:  # every group of the step had equal rewards; Adam's moments must decay all the same
            parameter.grad = torch.zeros_like(parameter)
    total = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    norm = _full(total)
    if torch.isfinite(norm):
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return float(norm)


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value

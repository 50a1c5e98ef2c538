"""Tokens drawn by inverse CDF, from uniforms that belong to a request's seed and position: whatever else is in the batch."""

from itertools import repeat

import torch
from torch import Tensor

from kernels.noise import STREAM_ANSWER, STREAM_COT, uniform_rows

BLOCK = 128  # weights added up together
CPU_ELEMENTS = 1 << 19  # logits sampled from at once on a CPU: three times as fast there as all rows of a large batch


def draw_uniforms(seed: Tensor, position: Tensor, answering: Tensor) -> Tensor:
    """The uniforms float32 [R] in (0, 1) of CoT tokens and, where `answering` bool [R], of answer tokens: a stream each."""
    thought, answer = (uniform_rows(seed, position, stream) for stream in (STREAM_COT, STREAM_ANSWER))
    return torch.where(answering, answer, thought)


def sample_tokens(logits: Tensor, temperature: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sample ids [R] int64 by inverse CDF, and their log-probs [R] at temperature 1.

    logits [R, V]; temperature float32 [R], 0 is greedy; uniform float32 [R] in (0, 1), or None if all temperatures are known to be
    0. A row's sample depends on nothing but its own logits, temperature and uniform. A row that is no distribution gets some id.
    """
    rows = max(1, CPU_ELEMENTS // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    uniforms = repeat(None) if uniform is None else uniform.split(rows)
    tokens, logprobs = zip(*map(_sample_block, logits.split(rows), temperature.split(rows), uniforms), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _sample_block(logits: Tensor, temperature: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    token = logits.argmax(dim=1)
    if uniform is not None:
        greedy = temperature <= 0
        weight = logits / torch.where(greedy, 1.0, temperature)[:, None]
        weight.sub_(weight.amax(dim=1, keepdim=True)).exp_()
        token = torch.where(greedy, token, _draw(weight, uniform))
    return token, logits.gather(1, token[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """Ids [R] of unnormalised weights [R, V] at uniforms [R]: first the block that holds the uniform, then the entry in it.

    Ten times faster on a CPU than a float64 running sum over all of V, which is what exactness would otherwise take.
    """
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    of_blocks = padded.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = uniform.double() * of_blocks[:, -1]
    chosen = torch.searchsorted(of_blocks, target[:, None], right=True).clamp_max(of_blocks.shape[1] - 1)
    before = torch.where(chosen > 0, of_blocks.gather(1, (chosen - 1).clamp_min(0)), 0.0)
    inside = padded.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=1)
    within = torch.searchsorted(inside, target[:, None] - before, right=True)
    # Rounding can put the target a hair past the block's own sum: take the block's last entry with weight.
    last = (inside < inside[:, -1:]).sum(dim=1, keepdim=True)
    token = (chosen * BLOCK + torch.minimum(within, last)).squeeze(1)
    return token.clamp_max(weight.shape[1] - 1)  # weights of NaN may lead anywhere

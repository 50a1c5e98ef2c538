"""Tokens drawn by inverse CDF, from uniforms that belong to a request's seed and position: whatever else is in the batch."""

import math
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.noise import STREAM_ANSWER, STREAM_COT, uniform_rows

BLOCK = 128  # weights added up together
LN2 = math.log(2.0)  # weights are made as powers of 2, as in kernels.soft_embedding
CPU_ELEMENTS = 1 << 20  # logits sampled from at once on a CPU: what is made of them stays in its cache


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
    tokens, logprobs = zip(*map(_sample_rows, logits.split(rows), temperature.split(rows), uniforms), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _sample_rows(logits: Tensor, temperature: Tensor, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    logits, ragged = logits.float(), -logits.shape[1] % BLOCK
    blocks = (F.pad(logits, (0, ragged), value=-math.inf) if ragged else logits).unflatten(1, (-1, BLOCK))
    peaks = blocks.amax(2)
    block = peaks.argmax(1, keepdim=True)  # of the blocks, then in the block: torch's argmax of a whole row is slow
    token = (block * BLOCK + _block_of(blocks, block).argmax(1, keepdim=True)).squeeze(1)
    below_peak = blocks - peaks.amax(1)[:, None, None]
    if uniform is not None:
        greedy = temperature <= 0
        unit = torch.where(greedy, 1.0, temperature) * LN2
        token = torch.where(greedy, token, _draw((below_peak / unit[:, None, None]).exp2_(), uniform))
    own = below_peak.flatten(1).gather(1, token[:, None]).squeeze(1)
    return token, own - below_peak.div_(LN2).exp2_().sum(2).sum(1).log()


def _draw(weight: Tensor, uniform: Tensor) -> Tensor:
    """Ids [R] of unnormalised weights [R, V / BLOCK, BLOCK] at uniforms [R]: first the block that holds the uniform, then the entry
    in it. A float64 running sum over all of V, which exactness would otherwise take, is slow on a CPU.
    """
    of_blocks = weight.sum(2).double().cumsum(1)
    target = uniform.double() * of_blocks[:, -1]
    chosen = torch.searchsorted(of_blocks, target[:, None], right=True).clamp_max(of_blocks.shape[1] - 1)
    before = torch.where(chosen > 0, of_blocks.gather(1, (chosen - 1).clamp_min(0)), 0.0)
    inside = _block_of(weight, chosen).double().cumsum(1)
    within = torch.searchsorted(inside, target[:, None] - before, right=True)
    # Rounding can put the target a hair past the block's own sum: take the block's last entry with weight.
    last = (inside < inside[:, -1:]).sum(1, keepdim=True)
    return (chosen * BLOCK + torch.minimum(within, last)).squeeze(1)


def _block_of(blocks: Tensor, chosen: Tensor) -> Tensor:
    """[R, BLOCK]: the block `chosen` [R, 1] of each row of blocks [R, V / BLOCK, BLOCK]."""
    return blocks.gather(1, chosen[:, :, None].expand(-1, -1, BLOCK)).squeeze(1)

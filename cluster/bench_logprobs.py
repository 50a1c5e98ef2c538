"""The log-probabilities that benchmarks compare: made-up inputs, and one forward and backward pass of each form.

| form | what |
|---|---|
| token | kernels.token_logprob, the ordinary chunked log-probability that every RL learner computes |
| support, dense | the two forms of kernels.soft_logprob |
| torch | torch's own chunked F.linear_cross_entropy, which spares a product by taking the gradient in the forward pass |

Inputs are random, with logits like a language model's. Supports are as large and as alike as those measured on GSM8K at tau = 0.5
(1876 steps: 43 tokens on average, 410 at the 99th percentile, 2907 different ones in 256 steps). Needs nothing but torch.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.soft_logprob import soft_logprob, soft_logprob_dense
from kernels.token_logprob import token_logprob

TAU, GAMMA = 0.5, 0.33
RMS_OF_WIDTH = 3.25  # RMS of an embedding times the root of its width: SmolLM2-135M's 0.1355 at 576
SUPPORT_LOG_MEAN, SUPPORT_LOG_STD, SUPPORT_MAX = 2.81, 1.38, 741  # of the support sizes: mean 43, 99th percentile 410
COMMON_IDS, COMMON_POWER = 4000, 4  # ids are number COMMON_IDS u^COMMON_POWER, u uniform, of so many spread over the vocabulary


@dataclass(frozen=True, slots=True)
class Inputs:
    """What T soft steps, or as many answer tokens, bring to a log-probability. The first three want gradients."""

    hidden: Tensor  # [T, d]
    head: Tensor  # [V, d]
    embedding: Tensor  # [V, d]; is head when tied
    noisy: Tensor  # [T, d]
    ids: Tensor  # int32 [N]
    offsets: Tensor  # int64 [T + 1]
    tau: Tensor  # float32 [T]
    sigma: Tensor  # float32 [T]
    targets: Tensor  # int64 [T]


def make_inputs(
    tokens: int,
    vocabulary: int,
    width: int,
    *,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Random inputs with logits like a language model's, at any width: most within some 2 of 0, a few near 20."""
    g = torch.Generator(device).manual_seed(seed)
    rms = RMS_OF_WIDTH / width**0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype)

    head = normal(vocabulary, width).mul_(rms)
    embedding = head if tied else normal(vocabulary, width).mul_(rms)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g, device=device)
    hidden = 1.7 * head[targets] + 0.64 * normal(tokens, width)
    noisy = embedding[targets] + GAMMA * rms * normal(tokens, width)
    ids, offsets = make_supports(tokens, vocabulary, torch.Generator().manual_seed(seed))
    return Inputs(
        hidden=hidden.requires_grad_(),
        head=head.requires_grad_(),
        embedding=embedding.requires_grad_(),
        noisy=noisy,
        ids=ids.to(device),
        offsets=offsets.to(device),
        tau=torch.full((tokens,), TAU, device=device),
        sigma=torch.full((tokens,), GAMMA * rms, device=device),
        targets=targets,
    )


def make_supports(rows: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids int32 [N] ascending within a row, offsets int64 [R + 1]) of supports with measured sizes and overlap, on the CPU."""
    common = min(COMMON_IDS, vocabulary)
    sizes = torch.empty(rows).log_normal_(SUPPORT_LOG_MEAN, SUPPORT_LOG_STD, generator=generator)
    supports = []
    for size in sizes.round().clamp(1, min(SUPPORT_MAX, common)).int().tolist():
        chosen = torch.empty(0, dtype=torch.int64)
        while len(chosen) < size:  # an id that comes twice counts once
            drawn = (torch.rand(size - len(chosen), generator=generator).pow(COMMON_POWER) * common).long()
            chosen = torch.cat((chosen, drawn)).unique()
        supports.append((chosen * (vocabulary // common)).int())
    counts = torch.tensor([len(support) for support in supports])
    return torch.cat(supports), F.pad(counts.cumsum(0), (1, 0))


def make_logits(rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    """float32 [R, V] on the CPU, whose supports at TAU are those of `make_supports` but for their least probable tokens."""
    ids, offsets = make_supports(rows, vocabulary, generator)
    logits = torch.randn(rows, vocabulary, generator=generator) * 2.2
    # The tokens of a support have probabilities from 1 to 1e-6 in equal parts of their logarithm.
    tokens = torch.repeat_interleave(offsets.diff()), ids.long()
    logits[tokens] = 20.0 + TAU * torch.rand(len(ids), generator=generator) * torch.tensor(1e-6).log()
    return logits


def forward(form: str, inputs: Inputs) -> Tensor:
    """The sum of the log-probabilities of one form, differentiable."""
    i = inputs
    if form == "token":
        return token_logprob(i.hidden, i.head, i.targets)[0].sum()
    if form == "support":
        return soft_logprob(i.hidden, i.head, i.embedding, i.noisy, i.ids, i.offsets, i.tau, i.sigma)[0].sum()
    if form == "dense":
        return soft_logprob_dense(i.hidden, i.head, i.embedding, i.noisy, i.tau, i.sigma)[0].sum()
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(i.hidden, i.head, i.targets, reduction="sum", options=options)


def run(form: str, inputs: Inputs) -> None:
    """Forward and backward of one form; the gradients are dropped."""
    leaves = [inputs.hidden, inputs.head]
    if inputs.embedding is not inputs.head and form in ("support", "dense"):
        leaves.append(inputs.embedding)
    torch.autograd.grad(forward(form, inputs), leaves)

"""The policy-gradient loss of a micro-batch, and the two free truths that come with it. Functions of tensors, no state.

    loss = - sum_i w_i (cot_weight * sum_t log pi(CoT step t of i) + sum_j log pi(answer token j of i)),   w_i = A_i / (B G)

    soft, fuzzy   log pi = -|h~ - mean_theta|^2 / (2 sigma^2)   (paper, section 3.2; its constant has no gradient: left out)
    hard, answer  log pi = log softmax(z / tau)[token]

No importance ratio, no clip, no length normalisation. h~ is data: nothing flows back through the chain of inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from configs.schema import Support
from kernels.segments import segment_sum
from kernels.soft_embedding import mix
from kernels.soft_logprob import soft_kl, soft_logprob, soft_logprob_dense
from kernels.token_logprob import token_logprob
from learner.batch import PackedBatch, SoftSteps, TokenSteps


class Terms(NamedTuple):
    """What one micro-batch says. S soft steps, H hard steps, A answer tokens; detached but for `loss` and `*_hidden`."""

    loss: Tensor  # [] differentiable
    cot_loss: Tensor  # [] its CoT part, `cot_weight` included
    answer_loss: Tensor  # [] its answer part
    soft_logprob: Tensor  # [S] without the constant
    hard_logprob: Tensor  # [H]
    answer_logprob: Tensor  # [A]
    residual: Tensor  # [S] |h~ - mean_theta|^2 / (n0 sigma^2); on-policy a chi-square mean, 1 +- sqrt(2 / n0)
    mismatch: Tensor  # [S] |mean_theta - mean_engine| / sigma; KL(engine, learner) = mismatch^2 / 2
    soft_entropy: Tensor  # [S] nats, of the recorded mixture
    hard_entropy: Tensor  # [H] nats, of the learner at the step's tau
    answer_entropy: Tensor  # [A]
    cot_hidden: Tensor  # [S+H, d] keeps its gradient, for a norm of the CoT term apart from the answer term's
    answer_hidden: Tensor  # [A, d]


def policy_terms(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    noisy: Tensor,
    batch: PackedBatch,
    *,
    support: Support,
    engine_dtype: torch.dtype,
    cot_weight: float,
) -> Terms:
    """Loss and per-step quantities of one micro-batch.

    hidden [R, d] after the final norm; head [V, d]; embedding [V, n0]; noisy [S, n0], h~ in `engine_dtype`.
    """
    cot_hidden = _gathered(hidden, torch.cat([batch.soft.hidden_row, batch.hard.hidden_row]))
    answer_hidden = _gathered(hidden, batch.answer.hidden_row)
    soft_hidden, hard_hidden = cot_hidden.split([len(batch.soft.weight), len(batch.hard.weight)])

    soft, residual, mismatch = _soft_terms(soft_hidden, head, embedding, noisy, batch.soft, support, engine_dtype)
    hard, hard_entropy = _token_terms(hard_hidden, head, batch.hard)
    answer, answer_entropy = _token_terms(answer_hidden, head, batch.answer)

    cot_loss = cot_weight * (weighted_nll(soft, batch.soft.weight) + weighted_nll(hard, batch.hard.weight))
    answer_loss = weighted_nll(answer, batch.answer.weight)
    return Terms(
        loss=cot_loss + answer_loss,
        cot_loss=cot_loss.detach(),
        answer_loss=answer_loss.detach(),
        soft_logprob=soft.detach(),
        hard_logprob=hard.detach(),
        answer_logprob=answer.detach(),
        residual=residual,
        mismatch=mismatch,
        soft_entropy=mixture_entropy(batch.soft.support_probs, batch.soft.support_offsets),
        hard_entropy=hard_entropy,
        answer_entropy=answer_entropy,
        cot_hidden=cot_hidden,
        answer_hidden=answer_hidden,
    )


def weighted_nll(logprob: Tensor, weight: Tensor) -> Tensor:
    """- sum_t w_t log pi_t, a scalar; logprob and weight [T]."""
    return -(weight.to(logprob.dtype) * logprob).sum()


def mixture_entropy(probs: Tensor, offsets: Tensor) -> Tensor:
    """Entropy in nats, float32 [S], of each step's recorded mixture; probs float32 [N], offsets int64 [S+1]."""
    return -segment_sum(torch.xlogy(probs, probs), offsets)


def _soft_terms(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    noisy: Tensor,
    steps: SoftSteps,
    support: Support,
    engine_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log pi [S], residual [S], mismatch [S]); the last two detached."""
    if len(noisy) == 0:
        none = hidden.new_zeros(0, dtype=torch.float32)
        return hidden.sum(dim=-1), none, none
    ids, offsets = steps.support_ids, steps.support_offsets
    if support is Support.recorded:
        logprob, mean = soft_logprob(hidden, head, embedding, noisy, ids, offsets, steps.tau, steps.sigma)
    else:
        logprob, mean = soft_logprob_dense(hidden, head, embedding, noisy, steps.tau, steps.sigma)
    engine_mean = mix(ids, steps.support_probs, offsets, embedding.detach(), engine_dtype)
    variance = steps.sigma.square()
    residual = (noisy - mean).square().mean(dim=-1) / variance
    mismatch = (2 * soft_kl(mean, engine_mean, steps.sigma)).sqrt()
    return logprob, residual, mismatch


def _token_terms(hidden: Tensor, head: Tensor, steps: TokenSteps) -> tuple[Tensor, Tensor]:
    """(log pi [T], entropy [T] detached) at the step's temperature."""
    if len(hidden) == 0:
        return hidden.sum(dim=-1), hidden.new_zeros(0, dtype=torch.float32)
    return token_logprob(hidden, head, steps.target, tau=steps.tau)


def _gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """hidden[rows], whose gradient is kept after backward."""
    gathered = hidden.index_select(0, rows)
    if gathered.requires_grad:
        gathered.retain_grad()
    return gathered

"""What happens to a chunk of logits [C, V] between two matrix products, a few rows at a time so that they stay in a core's cache.

Shared by the dense soft log-probability and the token log-probability. kernels.triton_softmax has the same four functions for a
GPU. They may overwrite the logits, weights and gradients that they are given. A logit of -inf is a probability of 0, exactly.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.matmul import FULL_SCALE

BLOCK_ELEMENTS = 1 << 18  # logits worked on at once: 1 MB of float32


def softmax_weights(logits: Tensor, tau: Tensor, dtype: torch.dtype, peak: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(weights exp((z - peak) / tau) [C, V], their sum [C, 1], peak [C, 1]) of logits [C, V], tau [C].

    `dtype`, here that of the logits, is what the weights come in, times `matmul.weight_scale(dtype)`. The sum is that of the
    rounded weights, so that weights / sum is a distribution exactly. `peak` spares looking for it again.
    """
    assert dtype == logits.dtype
    total = logits.new_empty(len(logits), 1)
    found = logits.new_empty(len(logits), 1) if peak is None else peak
    for rows in _row_blocks(logits):
        if peak is None:
            torch.amax(logits[rows], -1, keepdim=True, out=found[rows])
        # Relative to the peak first: z / tau itself would lose digits at tau = 1e-4.
        weights = logits[rows].sub_(found[rows]).div_(tau[rows, None]).exp_()
        torch.sum(weights, -1, keepdim=True, out=total[rows])
    return logits, total, found


def weight_gradients(weights: Tensor, total: Tensor, d_probs: Tensor) -> Tensor:
    """w_v (g_v - sum_u w_u g_u / total) [C, V] in the dtype of `weights`, of weights w [C, V], their sum [C, 1], d_probs g [C, V].

    With g = d loss / d p this is tau total times d loss / d logits.
    """
    for rows in _row_blocks(weights):
        # sum_v p_v g_v is r . mean too, but that sum rounds differently, and at tau = 1e-4 the difference is all there is.
        average = torch.linalg.vecdot(d_probs[rows], weights[rows])[:, None] / total[rows]
        d_probs[rows].sub_(average).mul_(weights[rows])
    return d_probs.to(weights.dtype)


def token_statistics(logits: Tensor, targets: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, tau logsumexp(z / tau)), each [C]; the first two in nats, of p = softmax(z / tau).

    logits z [C, V], targets int64 [C], tau [C].
    """
    logprob, entropy, log_total = (logits.new_empty(len(logits)) for _ in range(3))
    for rows in _row_blocks(logits):
        peak = logits[rows].amax(-1, keepdim=True)
        # The clamp turns 0 * -inf, the entropy of an impossible token, into 0.
        shifted = logits[rows].sub_(peak).div_(tau[rows, None]).clamp_min_(torch.finfo(logits.dtype).min)
        weights = shifted.exp()
        total = weights.sum(-1)
        log_sum = total.log()
        logprob[rows] = shifted.gather(1, targets[rows, None]).squeeze(1) - log_sum
        entropy[rows] = log_sum - torch.linalg.vecdot(weights, shifted) / total
        log_total[rows] = log_sum * tau[rows] + peak.squeeze(1)
    return logprob, entropy, log_total


def token_gradient(logits: Tensor, targets: Tensor, tau: Tensor, log_total: Tensor, dtype: torch.dtype) -> Tensor:
    """FULL_SCALE (onehot(target) - softmax(z / tau)) [C, V] in `dtype`: tau FULL_SCALE times d log p(target) / d z.

    Arguments as of `token_statistics`; log_total [C] as it returned it.
    """
    for rows in _row_blocks(logits):
        d_logits = logits[rows].sub_(log_total[rows, None]).div_(tau[rows, None]).exp_().mul_(-FULL_SCALE)
        d_logits.scatter_add_(1, targets[rows, None], torch.full_like(d_logits[:, :1], FULL_SCALE))
    return logits.to(dtype)


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of logits [C, V], BLOCK_ELEMENTS elements at a time or one row."""
    step = max(1, BLOCK_ELEMENTS // max(logits.shape[1], 1))
    for start in range(0, len(logits), step):
        yield slice(start, start + step)

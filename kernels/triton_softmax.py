"""What happens to a chunk of logits [C, V] between two matrix products, on a GPU, in Triton: the functions of kernels.softmax,
which is their reference. Bound by memory; the products around them are cuBLAS's.

```
 softmax_weights    z (twice; once with its peak) -> w     10 bytes a logit; 6     w and gradients in float16
 weight_gradients   w (twice), g where w > 0 -> dz         6 to 14 bytes a logit
 token_statistics   z (twice)                              8 bytes a logit
 token_gradient     z -> dz                                6 bytes a logit
```

A float16 weight below 2^-31 is 0, and at tau = 0.5 all but some hundreds of a row are: where w is 0, g is not read.
One program per row, sums in a fixed order, no atomics: the same bits in every run and every batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.matmul import FULL_SCALE, weight_scale
from kernels.triton_segments import FLOATS

BLOCK = 4096  # logits of a row in registers at once
LAUNCH = {"BLOCK": BLOCK, "num_warps": 8, "enable_fp_fusion": False}


def softmax_weights(logits: Tensor, tau: Tensor, dtype: torch.dtype, peak: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(weights exp((z - peak) / tau) [C, V] in `dtype`, sum of the rounded weights [C, 1], peak [C, 1]).

    The weights are times `weight_scale(dtype)`. logits float32 [C, V], tau float32 [C]; with `peak` float32 [C, 1] the logits are
    read once, not twice.
    """
    weights = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    total = torch.empty(len(logits), 1, dtype=torch.float32, device=logits.device)
    found = torch.empty_like(total) if peak is None else peak
    if logits.numel():
        _softmax_weights[(len(logits),)](
            logits, tau, weights, total, found, logits.shape[1],
            FIND_PEAK=peak is None, SCALE=weight_scale(dtype), DTYPE=FLOATS[dtype], **LAUNCH,
        )  # fmt: skip
    return weights, total, found


def weight_gradients(weights: Tensor, total: Tensor, d_probs: Tensor) -> Tensor:
    """w_v (g_v - sum_u w_u g_u / total) [C, V] in the dtype of the weights w [C, V]; total [C, 1], d_probs g [C, V]."""
    gradients = torch.empty_like(weights)
    if weights.numel():
        _weight_gradients[(len(weights),)](
            weights, total, d_probs, gradients, weights.shape[1], DTYPE=FLOATS[weights.dtype], **LAUNCH
        )
    return gradients


def token_statistics(logits: Tensor, targets: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log p(target), entropy, tau logsumexp(z / tau)), float32 [C] each; the first two in nats, of p = softmax(z / tau).

    logits z float32 [C, V], targets int64 [C], tau float32 [C].
    """
    logprob, entropy, log_total = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(3))
    if logits.numel():
        _token_statistics[(len(logits),)](logits, targets, tau, logprob, entropy, log_total, logits.shape[1], **LAUNCH)
    return logprob, entropy, log_total


def token_gradient(logits: Tensor, targets: Tensor, tau: Tensor, log_total: Tensor, dtype: torch.dtype) -> Tensor:
    """FULL_SCALE (onehot(target) - softmax(z / tau)) [C, V] in `dtype`, of logits z float32 [C, V]; tau, log_total float32 [C]."""
    gradients = torch.empty(logits.shape, dtype=dtype, device=logits.device)
    rows, vocabulary = logits.shape
    if logits.numel():
        _token_gradient[(rows, triton.cdiv(vocabulary, BLOCK))](
            logits, targets, tau, log_total, gradients, vocabulary, SCALE=FULL_SCALE, DTYPE=FLOATS[dtype], **LAUNCH
        )
    return gradients


@triton.jit
def _softmax_weights(
    logits, taus, weights, totals, peaks, vocabulary,
    FIND_PEAK: tl.constexpr, SCALE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (C,)."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * vocabulary
    tau = tl.load(taus + row)
    if FIND_PEAK:
        peak = _peak(logits + start, vocabulary, BLOCK)
        tl.store(peaks + row, peak)
    else:
        peak = tl.load(peaks + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        z = tl.load(logits + start + v, mask=v < vocabulary, other=-float("inf"))
        w = (SCALE * tl.exp((z - peak) / tau)).to(DTYPE)
        tl.store(weights + start + v, w, mask=v < vocabulary)
        total += w.to(tl.float32)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit
def _weight_gradients(weights, totals, d_probs, gradients, vocabulary, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (C,). Where w is 0, g is not read."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * vocabulary
    product = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        w = tl.load(weights + start + v, mask=v < vocabulary, other=0.0).to(tl.float32)
        product += w * tl.load(d_probs + start + v, mask=w > 0, other=0.0)
    average = tl.sum(product, 0) / tl.load(totals + row)
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        w = tl.load(weights + start + v, mask=v < vocabulary, other=0.0).to(tl.float32)
        g = tl.load(d_probs + start + v, mask=w > 0, other=0.0)
        tl.store(gradients + start + v, (w * (g - average)).to(DTYPE), mask=v < vocabulary)


@triton.jit
def _token_statistics(logits, targets, taus, logprobs, entropies, log_totals, vocabulary, BLOCK: tl.constexpr):
    """Grid (C,): with x = (z - peak) / tau and w = exp(x), entropy = ln sum w - sum w x / sum w."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * vocabulary
    tau = tl.load(taus + row)
    peak = _peak(logits + start, vocabulary, BLOCK)
    total, moment = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        shifted = (tl.load(logits + start + v, mask=v < vocabulary, other=-float("inf")) - peak) / tau
        w = tl.exp(shifted)
        total += w
        moment += w * tl.where(w > 0, shifted, 0.0)  # an impossible token: 0, not 0 * -inf
    normaliser = tl.sum(total, 0)
    log_sum = tl.log(normaliser)
    target = tl.load(logits + start + tl.load(targets + row))
    tl.store(logprobs + row, (target - peak) / tau - log_sum)
    tl.store(entropies + row, log_sum - tl.sum(moment, 0) / normaliser)
    tl.store(log_totals + row, peak + log_sum * tau)


@triton.jit
def _token_gradient(
    logits, targets, taus, log_totals, gradients, vocabulary,
    SCALE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (C, cdiv(V, BLOCK))."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * vocabulary
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    shifted = tl.load(logits + start + v, mask=v < vocabulary, other=-float("inf")) - tl.load(log_totals + row)
    p = tl.exp(shifted / tl.load(taus + row))
    hit = tl.where(v == tl.load(targets + row), 1.0, 0.0)
    tl.store(gradients + start + v, (SCALE * (hit - p)).to(DTYPE), mask=v < vocabulary)


@triton.jit
def _peak(logits, vocabulary, BLOCK: tl.constexpr):
    """The largest of a row's logits."""
    peak = tl.full((BLOCK,), -float("inf"), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        v = first + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.load(logits + v, mask=v < vocabulary, other=-float("inf")))
    return tl.max(peak, 0)

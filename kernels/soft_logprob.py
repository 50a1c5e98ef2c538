"""Log-probability of a noisy soft token, log pi(h~_t) = -|h~_t - h_t|^2 / (2 sigma^2) with h_t = p_t E (paper, section 3).

The constant of the Gaussian is left out. Two policies, one backward formula:

| function | p_t = softmax of z_t / tau over | cost | memory |
|---|---|---|---|
| soft_logprob | the recorded support S_t | gathers of the N support entries | a few rows of W and E |
| soft_logprob_dense | the whole vocabulary (the paper's form) | 7 GEMMs of T x V x d, cross entropy has 4 | chunk_tokens x V |

Backward, with c = d loss / d log pi, from which the attention-like structure spares a second pass over the tokens:

```
 r = c (h~ - h) / sigma^2                 d loss / d h                 [T, n0]
 g_v = r . E_v                            d loss / d p_v               per entry
 dz_v = p_v (g_v - sum_u p_u g_u) / tau   d loss / d z_v               per entry
 dH_t = sum_v dz_v W_v                    dW_v = sum_t dz_v H_t        dE_v = sum_t p_v r_t
```

With tied weights (head is embedding) dW + dE is one sum. On the support it is one sum over stacked sources [H; r] with stacked
weights [dz; p]. The dense form does not stack its products: that saves no time where it could be measured, and apart z is gone
before g comes, 8 bytes a logit instead of 12, so chunks can be larger.

Arithmetic is float32 whatever the dtypes of hidden and weights (float64 when hidden is): logits or residuals in bf16 would be off
by a sizeable part of sigma. On a GPU the dense form multiplies 16-bit factors and adds in float32 (kernels.matmul). dW and dE are
summed in float32 and rounded once to the dtype of the weights. The inputs h~ are data: no gradient runs to them, nor to tau and
sigma.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import matmul, segments, softmax
from kernels.checks import (
    require_contiguous,
    require_dtype,
    require_every,
    require_ids,
    require_offsets,
    require_positive,
    require_same_device,
    require_shape,
)
from kernels.segments import accumulation_dtype, rows_of

LIKELY = 2.0**-8  # of a token whose float16 weight is corrected: some ten of a row at tau = 0.5, never more than 256
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def soft_logprob(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    noisy: Tensor,
    support_ids: Tensor,
    support_offsets: Tensor,
    tau: Tensor,
    sigma: Tensor,
) -> tuple[Tensor, Tensor]:
    """(log pi [T], mean h [T, n0] detached) of the policy on the recorded support; nothing has size V but dW and dE.

    hidden [T, d], head [V, d], embedding [V, n0], noisy [T, n0]: any float dtypes; pass one tensor twice when weights are tied.
    support_ids int32 or int64 [N], support_offsets int64 [T + 1] as recorded; tau, sigma float32 or float64 [T] above 0. Results
    are float32, or float64 when hidden is; gradients come in the dtypes of their inputs. Raises ValueError, before any work, on
    wrong shapes, dtypes, devices or values, and on a row with no support; to see the values it waits for the device.
    """
    _check(hidden, head, embedding, noisy, tau, sigma)
    require_shape("support_ids", support_ids, (None,), "[N]")
    require_shape("support_offsets", support_offsets, (len(hidden) + 1,), "[T + 1]")
    require_dtype("support_ids", support_ids, torch.int32, torch.int64)
    require_dtype("support_offsets", support_offsets, torch.int64)
    for name, tensor in (("support_ids", support_ids), ("support_offsets", support_offsets)):
        require_contiguous(name, tensor)
        require_same_device(name, tensor, "hidden", hidden)
    _check_values(tau, sigma)
    _check_support(support_ids, support_offsets, len(head))
    logprob, mean = _SupportLogprob.apply(
        hidden, head, embedding, noisy, support_ids, support_offsets, tau, sigma, head is embedding
    )
    return logprob, mean


def soft_logprob_dense(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    noisy: Tensor,
    tau: Tensor,
    sigma: Tensor,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """(log pi [T], mean h [T, n0] detached) of the policy over the whole vocabulary, `chunk_tokens` rows of logits at a time.

    Arguments, results and errors as for `soft_logprob`. The backward pass holds two rows of V float32 per token of the chunk.
    """
    _check(hidden, head, embedding, noisy, tau, sigma)
    require_positive("chunk_tokens", chunk_tokens)
    _check_values(tau, sigma)
    logprob, mean = _DenseLogprob.apply(hidden, head, embedding, noisy, tau, sigma, chunk_tokens, head is embedding)
    return logprob, mean


def soft_kl(mean: Tensor, other_mean: Tensor, sigma: Tensor) -> Tensor:
    """KL divergence [T] in nats of two soft policies with equal sigma, exactly: |h - h'|^2 / (2 sigma^2). No samples are drawn.

    mean, other_mean [T, n0] in one dtype, float32 or float64; sigma float32 or float64 [T] above 0. Its square root times sqrt(2)
    is the distance of the means in sigmas. Raises ValueError on wrong shapes, dtypes or devices, and on a sigma not above 0, for
    which it does not wait for a GPU: there values are not looked at.
    """
    require_shape("mean", mean, (None, None), "[T, n0]")
    require_shape("other_mean", other_mean, (len(mean), mean.shape[1]), "[T, n0]")
    require_shape("sigma", sigma, (len(mean),), "[T]")
    require_dtype("mean", mean, torch.float32, torch.float64)
    require_dtype("other_mean", other_mean, mean.dtype)
    require_dtype("sigma", sigma, torch.float32, torch.float64)
    require_same_device("other_mean", other_mean, "mean", mean)
    require_same_device("sigma", sigma, "mean", mean)
    if not sigma.is_cuda:
        require_every("sigma", sigma > 0, "above 0")
    return -_gaussian(mean, other_mean, sigma)


def _check(hidden: Tensor, head: Tensor, embedding: Tensor, noisy: Tensor, tau: Tensor, sigma: Tensor) -> None:
    tokens, vocabulary = len(hidden), len(head)
    require_shape("hidden", hidden, (None, None), "[T, d]")
    require_shape("head", head, (None, hidden.shape[1]), "[V, d]")
    require_shape("embedding", embedding, (vocabulary, None), "[V, n0]")
    require_shape("noisy", noisy, (tokens, embedding.shape[1]), "[T, n0]")
    require_shape("tau", tau, (tokens,), "[T]")
    require_shape("sigma", sigma, (tokens,), "[T]")
    matrices = {"hidden": hidden, "head": head, "embedding": embedding, "noisy": noisy}
    scales = {"tau": tau, "sigma": sigma}
    for name, tensor in (matrices | scales).items():
        require_dtype(name, tensor, *(FLOATS if name in matrices else (torch.float32, torch.float64)))
        require_contiguous(name, tensor)
        require_same_device(name, tensor, "hidden", hidden)


def _check_values(tau: Tensor, sigma: Tensor) -> None:
    require_every("tau", tau > 0, "above 0")
    require_every("sigma", sigma > 0, "above 0")


def _check_support(ids: Tensor, offsets: Tensor, vocabulary: int) -> None:
    require_offsets("support_offsets", offsets, len(ids))
    require_ids("support_ids", ids, vocabulary)
    empty = int((offsets.diff() == 0).sum())
    if empty:
        raise ValueError(f"support_offsets: shape {list(offsets.shape)} with {empty} empty rows, expected supports that have mass")


def _gaussian(noisy: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """-|noisy - mean|^2 / (2 sigma^2): [T] in the dtype of `mean`."""
    residual = noisy.to(mean.dtype) - mean
    return residual.square_().sum(-1) * (-0.5 / sigma.to(mean.dtype).square())


def _mean_gradient(grad: Tensor, noisy: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
    """r = c (h~ - h) / sigma^2: [T, n0] in the dtype of `mean`."""
    return (noisy.to(mean.dtype) - mean).mul_((grad / sigma.to(mean.dtype).square())[:, None])


class _SupportLogprob(torch.autograd.Function):
    """Saves p [N] and the mean [T, n0]; the backward pass gathers the rows of W and E again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        embedding: Tensor,
        noisy: Tensor,
        ids: Tensor,
        offsets: Tensor,
        tau: Tensor,
        sigma: Tensor,
        tied: bool,
    ) -> tuple[Tensor, Tensor]:
        ragged, wide = _ragged(hidden), accumulation_dtype(hidden)
        logits = ragged.entry_dots(hidden.to(wide), rows_of(offsets, len(ids)), head, ids)
        probs = ragged.segment_softmax(logits, tau, offsets)
        mean = ragged.entry_sums(embedding, ids, probs, offsets, wide)
        ctx.save_for_backward(hidden, head, embedding, noisy, ids, offsets, tau, sigma, probs, mean)
        ctx.tied = tied
        ctx.mark_non_differentiable(mean)
        return _gaussian(noisy, mean, sigma), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, embedding, noisy, ids, offsets, tau, sigma, probs, mean = ctx.saved_tensors
        need_hidden, need_head, need_embedding = ctx.needs_input_grad[:3]
        ragged, rows = _ragged(hidden), rows_of(offsets, len(ids))
        r = _mean_gradient(grad, noisy, mean, sigma)
        d_logits = ragged.softmax_gradient(probs, ragged.entry_dots(r, rows, embedding, ids), tau, offsets)
        d_hidden = d_head = d_embedding = None
        if need_hidden:
            d_hidden = ragged.entry_sums(head, ids, d_logits, offsets, hidden.dtype)
        if ctx.tied and need_head:
            stacked = torch.cat((hidden.to(mean.dtype), r))
            both_rows, both_ids, both = torch.cat((rows, rows + len(r))), ids.repeat(2), torch.cat((d_logits, probs))
            d_head = _sums_by_id(ragged, stacked, both_rows, both_ids, both, head)
        elif not ctx.tied:
            d_head = _sums_by_id(ragged, hidden, rows, ids, d_logits, head) if need_head else None
            d_embedding = _sums_by_id(ragged, r, rows, ids, probs, embedding) if need_embedding else None
        return d_hidden, d_head, d_embedding, *[None] * 6


class _DenseLogprob(torch.autograd.Function):
    """Saves the peak of each row's logits and the mean [T, n0]; the backward pass computes the logits again.

    The sum of a row's weights is taken again too. The second logits may differ from the first in the last bit, which at
    tau = 1e-4 is 2% of a weight: with its own sum, p is a distribution again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        embedding: Tensor,
        noisy: Tensor,
        tau: Tensor,
        sigma: Tensor,
        chunk: int,
        tied: bool,
    ) -> tuple[Tensor, Tensor]:
        stages, wide, factor = _stages(hidden), accumulation_dtype(hidden), matmul.logit_factor(hidden, head, embedding)
        fine = matmul.fine_factor(factor)
        head_factor = head.to(factor)
        table = head_factor if tied and fine == factor else embedding.to(fine)
        peak = torch.empty(len(hidden), 1, dtype=wide, device=hidden.device)
        mean = torch.empty(noisy.shape, dtype=wide, device=hidden.device)
        tau = tau.to(wide)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = matmul.wide_mm(hidden[part].to(factor), head_factor.T)
            weights, total, peak[part] = stages.softmax_weights(logits, tau[part], fine)
            matmul.wide_mm(weights, table, out=mean[part])
            if fine != wide:
                rows, ids, lost = _lost_to_rounding(logits, weights, total, peak[part], tau[part])
                offsets = torch.searchsorted(rows, torch.arange(len(logits) + 1, device=rows.device))
                mean[part] += _ragged(hidden).entry_sums(table, ids, lost, offsets, wide)
                total += segments.segment_sum(lost, offsets)[:, None]
            mean[part] /= total
        ctx.save_for_backward(hidden, head, embedding, noisy, tau, sigma, peak, mean)
        ctx.chunk, ctx.tied = chunk, tied
        ctx.mark_non_differentiable(mean)
        return _gaussian(noisy, mean, sigma), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, embedding, noisy, tau, sigma, peak, mean = ctx.saved_tensors
        need_hidden, need_head, need_embedding = ctx.needs_input_grad[:3]
        stages, wide, factor = _stages(hidden), mean.dtype, matmul.logit_factor(hidden, head, embedding)
        fine = matmul.fine_factor(factor)
        head_factor, head_fine = head.to(factor), head.to(fine)
        table = head_fine if ctx.tied else embedding.to(fine)
        r = _mean_gradient(grad, noisy, mean, sigma)
        # r = gain * unit, with weight |unit| |E_v| <= FULL_SCALE; what follows from `unit` is multiplied by `gain` at the end.
        longest = torch.linalg.vector_norm(table, dim=-1, dtype=wide).amax().clamp_min_(1.0)
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
        gain = (norm * (longest * matmul.weight_scale(fine) / matmul.FULL_SCALE)).clamp_min_(torch.finfo(wide).tiny)
        unit = (r / gain).to(fine)
        gain_over_tau = gain / tau[:, None]
        row_peaks = torch.linalg.vector_norm(hidden, torch.inf, dim=-1, keepdim=True, dtype=wide) * gain_over_tau
        hidden_scale, r_scale = matmul.fitting_scales(row_peaks, r)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
        d_embedding = d_head
        if not ctx.tied:
            d_embedding = torch.zeros(embedding.shape, dtype=wide, device=head.device) if need_embedding else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = matmul.wide_mm(hidden[part].to(factor), head_factor.T)
            weights, total, _ = stages.softmax_weights(logits, tau[part], fine, peak[part])
            del logits
            d_probs = matmul.wide_mm(unit[part], table.T)
            d_logits = stages.weight_gradients(weights, total, d_probs)
            del d_probs
            row_scale = gain_over_tau[part] / total
            if d_hidden is not None:
                d_hidden[part] = matmul.wide_mm(d_logits, head_fine).mul_(row_scale)
            if d_head is not None:
                inputs = (hidden[part].to(wide) * (row_scale / hidden_scale)).to(fine)
                matmul.add_mm(d_head, d_logits.T, inputs, hidden_scale)
            if d_embedding is not None:
                matmul.add_mm(d_embedding, weights.T, (r[part] / (total * r_scale)).to(fine), r_scale)
        d_head = None if d_head is None else d_head.to(head.dtype)
        d_embedding = None if ctx.tied or d_embedding is None else d_embedding.to(embedding.dtype)
        return d_hidden, d_head, d_embedding, *[None] * 5


def _lost_to_rounding(logits: Tensor, weights: Tensor, total: Tensor, peak: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(row [N], id [N], weight less rounded weight [N]) of the tokens with p > LIKELY, by row, then by id; waits for the device.

    An error of the mean lies along the differences of embeddings that dz measures, where sigma eps has only 1 part in sqrt(n0):
    to the gradient it counts in sigmas. Rounded weights alone would put 4e-3 into it.
    """
    rows, ids = (weights > total * LIKELY).nonzero(as_tuple=True)
    exact = ((logits[rows, ids] - peak[rows, 0]) / tau[rows]).exp_().mul_(matmul.weight_scale(weights.dtype))
    return rows, ids, exact - weights[rows, ids].to(exact.dtype)


def _sums_by_id(ragged: ModuleType, source: Tensor, rows: Tensor, ids: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    """out[v] = sum over the entries i with ids[i] == v of weights[i] * source[rows[i]], in entry order, as `like` [V, width].

    Each row of the result is summed on its own and written once: deterministic, where index_add_ would use atomics on a GPU.
    """
    sorted_ids, order = torch.sort(ids, stable=True)
    offsets = torch.searchsorted(sorted_ids, torch.arange(len(like) + 1, device=ids.device, dtype=ids.dtype))
    return ragged.entry_sums(source, rows[order], weights[order], offsets, like.dtype)


def _ragged(hidden: Tensor) -> ModuleType:
    """Gathers and sums over ragged rows, for the device of `hidden`."""
    if matmul.uses_triton(hidden):
        from kernels import triton_segments

        return triton_segments
    return segments


def _stages(hidden: Tensor) -> ModuleType:
    """What is done to a chunk of logits, for the device of `hidden`."""
    if matmul.uses_triton(hidden):
        from kernels import triton_softmax

        return triton_softmax
    return softmax

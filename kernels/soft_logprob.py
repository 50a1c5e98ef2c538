"""Log-probability of a noisy soft token, log pi(h~_t) = -|h~_t - h_t|^2 / (2 sigma^2) with h_t = p_t E (paper, section 3).

The constant of the Gaussian is left out. Two policies, one backward formula:

| function | p_t = softmax of z_t / tau over | cost | memory |
|---|---|---|---|
| soft_logprob | the recorded support S_t | gathers of the N support entries | chunk_entries x (d + n0) |
| soft_logprob_dense | the whole vocabulary (the paper's form) | 7 GEMMs of T x V x d, cross entropy has 4 | chunk_tokens x V |

Backward, with c = d loss / d log pi, from which the attention-like structure spares a second pass over the tokens:

```
 r = c (h~ - h) / sigma^2                 d loss / d h                 [T, n0]
 g_v = r . E_v                            d loss / d p_v               per entry
 dz_v = p_v (g_v - sum_u p_u g_u) / tau   d loss / d z_v               per entry
 dH_t = sum_v dz_v W_v                    dW_v = sum_t dz_v H_t        dE_v = sum_t p_v r_t
```

Arithmetic is float32 after the gather whatever the dtypes of hidden and weights (float64 when hidden is): logits or residuals
in bf16 would be off by a sizeable part of sigma. dW and dE are summed in float32 and rounded once to the dtype of the weights;
with tied weights (head is embedding) they are one sum. The inputs h~ are data: no gradient runs to them, nor to tau and sigma.
"""

from bisect import bisect_right
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import require_dtype, require_positive, require_shape
from kernels.segments import accumulation_dtype, entry_dots, rows_of, segment_softmax, segment_sum, weighted_rows

CHUNK_ENTRIES = 4096  # on a CPU a chunk of 4096 rows of 576 floats (9 MB) is no slower than a smaller one


def soft_logprob(
    hidden: Tensor,
    head: Tensor,
    embedding: Tensor,
    noisy: Tensor,
    support_ids: Tensor,
    support_offsets: Tensor,
    tau: Tensor,
    sigma: Tensor,
    chunk_entries: int = CHUNK_ENTRIES,
) -> tuple[Tensor, Tensor]:
    """(log pi [T], mean h [T, n0] detached) of the policy on the recorded support; nothing has size V but dW and dE.

    hidden [T, d], head [V, d], embedding [V, n0], noisy [T, n0]: any float dtypes; pass one tensor twice when weights are tied.
    support_ids int32 [N], support_offsets int64 [T + 1] as recorded; tau, sigma [T] above 0. Results are float32, or float64
    when hidden is; gradients come in the dtypes of their inputs. Raises ValueError on wrong shapes or dtypes.
    """
    _check(hidden, head, embedding, noisy, tau, sigma)
    require_shape("support_ids", support_ids, (None,), "[N]")
    require_dtype("support_ids", support_ids, torch.int32, torch.int64)
    require_shape("support_offsets", support_offsets, (len(hidden) + 1,), "[T + 1]")
    require_dtype("support_offsets", support_offsets, torch.int64)
    require_positive("chunk_entries", chunk_entries)
    logprob, mean = _SupportLogprob.apply(
        hidden, head, embedding, noisy, support_ids, support_offsets, tau, sigma, chunk_entries, head is embedding
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

    Arguments and results as for `soft_logprob`. Raises ValueError on wrong shapes or dtypes.
    """
    _check(hidden, head, embedding, noisy, tau, sigma)
    require_positive("chunk_tokens", chunk_tokens)
    logprob, mean = _DenseLogprob.apply(hidden, head, embedding, noisy, tau, sigma, chunk_tokens, head is embedding)
    return logprob, mean


def _check(hidden: Tensor, head: Tensor, embedding: Tensor, noisy: Tensor, tau: Tensor, sigma: Tensor) -> None:
    tokens, vocabulary = len(hidden), len(head)
    require_shape("hidden", hidden, (None, None), "[T, d]")
    require_shape("head", head, (None, hidden.shape[1]), "[V, d]")
    require_shape("embedding", embedding, (vocabulary, None), "[V, n0]")
    require_shape("noisy", noisy, (tokens, embedding.shape[1]), "[T, n0]")
    require_shape("tau", tau, (tokens,), "[T]")
    require_shape("sigma", sigma, (tokens,), "[T]")


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
        chunk: int,
        tied: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = rows_of(offsets, len(ids))
        logits = entry_dots(hidden.to(accumulation_dtype(hidden)), rows, head, ids, chunk)
        probs = segment_softmax(logits, tau, rows, offsets)
        mean = _entry_sums(embedding, ids, probs, offsets, chunk)
        ctx.save_for_backward(hidden, head, embedding, noisy, ids, offsets, tau, sigma, probs, mean)
        ctx.chunk, ctx.tied = chunk, tied
        ctx.mark_non_differentiable(mean)
        return _gaussian(noisy, mean, sigma), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, embedding, noisy, ids, offsets, tau, sigma, probs, mean = ctx.saved_tensors
        rows = rows_of(offsets, len(ids))
        r = _mean_gradient(grad, noisy, mean, sigma)
        d_probs = entry_dots(r, rows, embedding, ids, ctx.chunk)
        average = segment_sum((probs * d_probs).double(), offsets).to(mean.dtype)
        d_logits = probs * (d_probs - average[rows]) / tau.to(mean.dtype)[rows]

        d_hidden = None
        if ctx.needs_input_grad[0]:
            d_hidden = _entry_sums(head, ids, d_logits, offsets, ctx.chunk).to(hidden.dtype)
        d_head, d_embedding = _weight_accumulators(ctx, head, embedding, mean.dtype)
        if d_head is not None or d_embedding is not None:
            order = torch.sort(ids, stable=True).indices
            sorted_ids, sorted_rows = ids[order], rows[order]
            if d_head is not None:
                _add_by_id(d_head, sorted_ids, hidden.to(mean.dtype), sorted_rows, d_logits[order])
            if d_embedding is not None:
                _add_by_id(d_embedding, sorted_ids, r, sorted_rows, probs[order])
        return d_hidden, *_weight_gradients(ctx, d_head, d_embedding, head, embedding), *[None] * 7


class _DenseLogprob(torch.autograd.Function):
    """Saves the peak and the total of each row's weights and the mean; the backward pass computes the logits again.

    The peak and the total, not their logsumexp: so that the backward pass sees the very weights of the forward pass.
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
        wide = accumulation_dtype(hidden)
        head_wide = head.to(wide)
        embedding_wide = head_wide if tied else embedding.to(wide)
        peak, total = (torch.empty(len(hidden), 1, dtype=wide, device=hidden.device) for _ in range(2))
        mean = torch.empty(noisy.shape, dtype=wide, device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part].to(wide) @ head_wide.T
            peak[part] = logits.amax(-1, keepdim=True)
            weights = logits.sub_(peak[part]).div_(tau.to(wide)[part, None]).exp_()
            total[part] = weights.sum(-1, keepdim=True)
            mean[part] = (weights @ embedding_wide).div_(total[part])
        ctx.save_for_backward(hidden, head, embedding, noisy, tau, sigma, peak, total, mean)
        ctx.chunk, ctx.tied = chunk, tied
        ctx.mark_non_differentiable(mean)
        return _gaussian(noisy, mean, sigma), mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _mean: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, embedding, noisy, tau, sigma, peak, total, mean = ctx.saved_tensors
        wide = mean.dtype
        head_wide = head.to(wide)
        embedding_wide = head_wide if ctx.tied else embedding.to(wide)
        r = _mean_gradient(grad, noisy, mean, sigma)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head, d_embedding = _weight_accumulators(ctx, head, embedding, wide)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            inputs, temperature = hidden[part].to(wide), tau.to(wide)[part, None]
            probs = (inputs @ head_wide.T).sub_(peak[part]).div_(temperature).exp_().div_(total[part])
            if d_embedding is not None:
                d_embedding.addmm_(probs.T, r[part])
            d_probs = r[part] @ embedding_wide.T
            # sum_v p_v g_v is r . mean too, but that sum rounds differently, and at tau 1e-4 the difference is all there is.
            average = (d_probs * probs).sum(-1, keepdim=True)
            d_logits = d_probs.sub_(average).mul_(probs).div_(temperature)
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ head_wide).to(hidden.dtype)
            if d_head is not None:
                d_head.addmm_(d_logits.T, inputs)
        return d_hidden, *_weight_gradients(ctx, d_head, d_embedding, head, embedding), *[None] * 5


def _weight_accumulators(ctx: Any, head: Tensor, embedding: Tensor, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Zeros to sum dW and dE in, where they are needed; tied weights share one sum."""
    _, need_head, need_embedding = ctx.needs_input_grad[:3]
    d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if need_head else None
    if ctx.tied:
        return d_head, d_head
    return d_head, torch.zeros(embedding.shape, dtype=wide, device=embedding.device) if need_embedding else None


def _weight_gradients(
    ctx: Any, d_head: Tensor | None, d_embedding: Tensor | None, head: Tensor, embedding: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(dW, dE) rounded to the dtypes of the weights; tied weights hand their one sum to autograd once."""
    head_gradient = None if d_head is None else d_head.to(head.dtype)
    return head_gradient, None if ctx.tied or d_embedding is None else d_embedding.to(embedding.dtype)


def _entry_sums(table: Tensor, ids: Tensor, weights: Tensor, offsets: Tensor, chunk: int) -> Tensor:
    """out[t] = sum over t's entries of weights[i] * table[ids[i]]: [T, width of table] in the dtype of `weights`.

    A table that needs widening is gathered `chunk` entries at a time; a row may be split over chunks.
    """
    if table.dtype == weights.dtype:
        return weighted_rows(table, ids, weights, offsets)
    out = torch.zeros(len(offsets) - 1, table.shape[1], dtype=weights.dtype, device=table.device)
    bounds = offsets.tolist()
    for start in range(0, len(ids), chunk):
        stop = min(start + chunk, len(ids))
        rows = slice(bisect_right(bounds, start) - 1, bisect_right(bounds, stop - 1))
        gathered = table.index_select(0, ids[start:stop]).to(weights.dtype)
        local = (offsets[rows.start : rows.stop + 1] - start).clamp(0, stop - start)
        out[rows] += weighted_rows(gathered, torch.arange(stop - start, device=ids.device), weights[start:stop], local)
    return out


def _add_by_id(total: Tensor, sorted_ids: Tensor, source: Tensor, rows: Tensor, weights: Tensor) -> None:
    """total[v] += sum over the entries i with sorted_ids[i] == v of weights[i] * source[rows[i]].

    The entries of an id are added in order before the one write to its row: deterministic, where index_add_ of every entry
    would use atomics on a GPU, and no gathered [N, width] is formed.
    """
    used, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    offsets = F.pad(counts.cumsum(0), (1, 0))
    total.index_add_(0, used, weighted_rows(source, rows, weights, offsets))

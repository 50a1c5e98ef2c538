"""Log-probability of ordinary tokens, in chunks of tokens whose logits are recomputed in the backward pass.

z = H W^T,  logp_t = z_t[y_t] / tau - logsumexp(z_t / tau),  dz = c (onehot(y) - softmax(z / tau)) / tau,  dH = dz W,  dW = dz^T H.
At most `chunk_tokens` rows of logits are alive, in float32 whatever the dtype of the weights (float64 for float64). It is they that
are divided by tau: a bf16 hidden state, divided and rounded again, would move the log-probability by 1e-3.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels import matmul, softmax
from kernels.checks import (
    require_contiguous,
    require_dtype,
    require_every,
    require_ids,
    require_positive,
    require_same_device,
    require_shape,
)
from kernels.segments import accumulation_dtype

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def token_logprob(
    hidden: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int = 1024, tau: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log p(target) [T], entropy of the distribution [T], detached), both in nats at temperature tau; None: 1.

    hidden [T, d], head [V, d]: any float dtypes; targets int64 [T] in [0, V); tau float32 or float64 [T] above 0. Results and
    accumulation are float32, or float64 when hidden is; gradients reach hidden and head in their own dtypes. Raises ValueError on
    wrong shapes, dtypes, devices, ids or temperatures before any work, for which it waits for the device.
    """
    if tau is None:
        tau = torch.ones(len(hidden), device=hidden.device)
    require_shape("hidden", hidden, (None, None), "[T, d]")
    require_shape("head", head, (None, hidden.shape[1]), "[V, d]")
    require_shape("targets", targets, (len(hidden),), "[T]")
    require_shape("tau", tau, (len(hidden),), "[T]")
    require_dtype("hidden", hidden, *FLOATS)
    require_dtype("head", head, *FLOATS)
    require_dtype("targets", targets, torch.int64)
    require_dtype("tau", tau, torch.float32, torch.float64)
    require_positive("chunk_tokens", chunk_tokens)
    for name, tensor in (("hidden", hidden), ("head", head), ("targets", targets), ("tau", tau)):
        require_contiguous(name, tensor)
        require_same_device(name, tensor, "hidden", hidden)
    require_ids("targets", targets, len(head))
    require_every("tau", tau > 0, "above 0")
    logprob, entropy = _TokenLogprob.apply(hidden, head, targets, tau.to(accumulation_dtype(hidden)), chunk_tokens)
    return logprob, entropy


class _TokenLogprob(torch.autograd.Function):
    """Saves what normalises each row; the backward pass computes the logits again."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, tau: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        stages, factor = _stages(hidden), matmul.logit_factor(hidden, head)
        columns = head.to(factor).T
        logprob, entropy, log_total = (
            torch.empty(len(hidden), dtype=accumulation_dtype(hidden), device=hidden.device) for _ in range(3)
        )
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = matmul.wide_mm(hidden[part].to(factor), columns)
            logprob[part], entropy[part], log_total[part] = stages.token_statistics(logits, targets[part], tau[part])
        ctx.save_for_backward(hidden, head, targets, tau, log_total)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, tau, log_total = ctx.saved_tensors
        stages, factor, wide = _stages(hidden), matmul.logit_factor(hidden, head), log_total.dtype
        fine = matmul.fine_factor(factor)
        head_factor, head_fine = head.to(factor), head.to(fine)
        row_scale = (grad / tau)[:, None] / matmul.FULL_SCALE
        row_peaks = torch.linalg.vector_norm(hidden, torch.inf, dim=-1, keepdim=True, dtype=wide) * row_scale
        (hidden_scale,) = matmul.fitting_scales(row_peaks)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = matmul.wide_mm(hidden[part].to(factor), head_factor.T)
            d_logits = stages.token_gradient(logits, targets[part], tau[part], log_total[part], fine)
            del logits
            if d_hidden is not None:
                d_hidden[part] = matmul.wide_mm(d_logits, head_fine).mul_(row_scale[part])
            if d_head is not None:
                inputs = (hidden[part].to(wide) * (row_scale[part] / hidden_scale)).to(fine)
                matmul.add_mm(d_head, d_logits.T, inputs, hidden_scale)
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None, None


def _stages(hidden: Tensor) -> ModuleType:
    """What is done to a chunk of logits, for the device that they are on."""
    if matmul.uses_triton(hidden):
        from kernels import triton_softmax

        return triton_softmax
    return softmax

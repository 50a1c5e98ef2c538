"""Log-probability of ordinary tokens, in chunks of tokens whose logits are recomputed in the backward pass.

z = H W^T,  logp_t = z_t[y_t] - logsumexp(z_t),  dz = c (onehot(y) - softmax(z)),  dH = dz W,  dW = dz^T H.
At most `chunk_tokens` rows of logits are alive, in float32 whatever the dtype of the weights (float64 for float64).
"""

from typing import Any

import torch
from torch import Tensor

from kernels.checks import require_dtype, require_positive, require_shape
from kernels.segments import accumulation_dtype


def token_logprob(hidden: Tensor, head: Tensor, targets: Tensor, chunk_tokens: int = 1024) -> tuple[Tensor, Tensor]:
    """(log p(target) [T], entropy of the distribution [T], detached), both in nats at temperature 1.

    hidden [T, d], head [V, d]: any float dtypes; targets int64 [T] in [0, V). Results and accumulation are float32, or float64
    when hidden is; gradients reach hidden and head in their own dtypes. Raises ValueError on wrong shapes or dtypes.
    """
    require_shape("hidden", hidden, (None, None), "[T, d]")
    require_shape("head", head, (None, hidden.shape[1]), "[V, d]")
    require_shape("targets", targets, (len(hidden),), "[T]")
    require_dtype("targets", targets, torch.int64)
    require_positive("chunk_tokens", chunk_tokens)
    logprob, entropy = _TokenLogprob.apply(hidden, head, targets, chunk_tokens)
    return logprob, entropy


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        wide = accumulation_dtype(hidden)
        weights = head.to(wide)
        logprob, entropy, log_total = (torch.empty(len(hidden), dtype=wide, device=hidden.device) for _ in range(3))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = hidden[part].to(wide) @ weights.T
            log_total[part] = logits.logsumexp(-1)
            log_probs = logits.sub_(log_total[part, None])
            logprob[part] = log_probs.gather(1, targets[part, None]).squeeze(1)
            entropy[part] = -log_probs.exp().mul_(log_probs).sum(-1)
        ctx.save_for_backward(hidden, head, targets, log_total)
        ctx.chunk = chunk
        ctx.mark_non_differentiable(entropy)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, targets, log_total = ctx.saved_tensors
        wide = log_total.dtype
        weights = head.to(wide)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros(head.shape, dtype=wide, device=head.device) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            inputs = hidden[part].to(wide)
            d_logits = (inputs @ weights.T).sub_(log_total[part, None]).exp_().neg_()
            d_logits.scatter_add_(1, targets[part, None], torch.ones_like(d_logits[:, :1]))
            d_logits.mul_(grad[part, None])
            if d_hidden is not None:
                d_hidden[part] = (d_logits @ weights).to(hidden.dtype)
            if d_head is not None:
                d_head.addmm_(d_logits.T, inputs)
        return d_hidden, None if d_head is None else d_head.to(head.dtype), None, None

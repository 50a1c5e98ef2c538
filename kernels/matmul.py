"""Matrix products that are added up and returned in float32 (float64 for float64), whatever the dtype of the factors.

A logit rounded to bf16 is useless to a soft token (0.4 sigma off on average). A GPU multiplies 16-bit factors exactly and adds in
float32, so there the factors stay small and the result does not; a CPU has no such product, and the factors are widened.

Logits are products of bf16 weights and hidden states as they are. Everything else, probabilities and gradients, would lose 2e-3 to
bf16 before the sum: those factors are float16, 8 times finer, and brought into float16's narrow range by scales that are taken
out again afterwards (`fitting_scales`).
"""

import math

import torch
from torch import Tensor

from kernels.segments import accumulation_dtype

HALVES = (torch.bfloat16, torch.float16)
FULL_SCALE = 2.0**13  # what the largest factors are scaled to; float16 ends at 2**16
SCALE_EXPONENT = 126  # of 2, the largest of a scale: the reciprocal is then a normal float32 number as well


def uses_triton(tensor: Tensor) -> bool:
    """Whether the Triton kernels are for this tensor: on a GPU, in anything but float64, which is for references."""
    return tensor.is_cuda and tensor.dtype != torch.float64


def logit_factor(*factors: Tensor) -> torch.dtype:
    """What hidden states and weights are multiplied in for logits: bf16 on a GPU when all are, else the accumulation dtype."""
    if uses_triton(factors[0]) and all(factor.dtype == torch.bfloat16 for factor in factors):
        return torch.bfloat16
    return accumulation_dtype(factors[0])


def fine_factor(logit_factor: torch.dtype) -> torch.dtype:
    """What probabilities and gradients are multiplied in: float16 where logits have bf16 factors."""
    return torch.float16 if logit_factor == torch.bfloat16 else logit_factor


def weight_scale(dtype: torch.dtype) -> float:
    """What softmax weights, else at most 1, are multiplied by: in float16, so that they vanish below 2^-31 and not 2^-25."""
    return 64.0 if dtype == torch.float16 else 1.0


def wide_mm(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """left [M, K] @ right [K, N] -> [M, N] in the accumulation dtype; `out`, of that dtype, receives it where given."""
    if left.is_cuda and left.dtype in HALVES:
        return torch.mm(left, right, out_dtype=torch.float32, out=out)
    wide = accumulation_dtype(left)
    return torch.mm(left.to(wide), right.to(wide), out=out)


def add_mm(total: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """total [M, N] += scale * left [M, K] @ right [K, N], in the accumulation dtype, with no [M, N] in between."""
    if left.is_cuda and left.dtype in HALVES:
        torch.addmm(total, left, right, out_dtype=torch.float32, alpha=scale, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)


def fitting_scales(*tensors: Tensor) -> list[float]:
    """What to divide each tensor by so that its largest magnitude is at most FULL_SCALE and above half of it; 1 where all are 0.

    Powers of two within 2^-126 .. 2^126: a GPU divides by a number as it multiplies by the float32 reciprocal, which is then exact
    and never infinite, so 0 stays 0. Waits for the device once.
    """
    peaks = torch.stack([x.abs().amax() if x.numel() else x.sum() for x in tensors]).tolist()
    return [_fitting_scale(peak) if peak else 1.0 for peak in peaks]


def _fitting_scale(peak: float) -> float:
    """Of an infinity or a NaN any scale: what is divided shows it."""
    exponent = math.frexp(peak)[1] - int(math.log2(FULL_SCALE))
    return 2.0 ** max(-SCALE_EXPONENT, min(SCALE_EXPONENT, exponent))

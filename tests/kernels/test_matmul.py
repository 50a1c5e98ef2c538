"""Scales leave no factor too large for float16 and no gradient that is not a number, also where a GPU divides."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.matmul import FULL_SCALE, fitting_scales
from kernels.soft_logprob import soft_logprob_dense
from kernels.token_logprob import token_logprob


class DividesAsAGpu(TorchDispatchMode):
    """tensor / number as CUDA computes it: times the number's float32 reciprocal."""

    divided = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div_.Tensor) and not isinstance(args[1], Tensor):
            self.divided += 1
            return func(args[0], 1.0) * torch.tensor(args[1]).reciprocal()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("peak", [0.0, 1e-45, 2.0**-126, 1e-38, 1e-20, 0.7, 1.0, 8192.0, 1e20, 3e38])
def test_a_scale_and_its_reciprocal_are_exact_in_float32(peak):
    (scale,) = fitting_scales(torch.tensor([[peak / 3, -peak]]))
    both = torch.tensor([scale, 1 / scale])
    assert both.isfinite().all() and (both >= torch.finfo(torch.float32).tiny).all() and both.tolist() == [scale, 1 / scale]
    assert math.log2(scale).is_integer() and (scale == 1) == (peak == 0 or FULL_SCALE / 2 <= peak < FULL_SCALE)
    if peak > 1e-33:
        assert FULL_SCALE / 2 <= peak / scale < FULL_SCALE


def test_each_tensor_has_its_own_scale():
    assert fitting_scales(torch.empty(0), torch.tensor([FULL_SCALE / 2]), torch.tensor([-FULL_SCALE])) == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [0.0, 1e-37])
def test_a_gradient_of_nothing_is_zero_where_division_is_by_the_reciprocal(dense, dtype, factor):
    """Fillers have zero weights, and so has the CoT at cot_weight 0. A gradient that is next to nothing stays finite."""
    hidden, head, embedding = (torch.randn(n, 24).to(dtype).requires_grad_() for n in (5, 30, 30))
    leaves = [hidden, head, embedding] if dense else [hidden, head]
    gpu = DividesAsAGpu()
    with gpu:
        if dense:
            logprob = soft_logprob_dense(hidden, head, embedding, torch.randn(5, 24), torch.ones(5), torch.ones(5), 4)[0]
        else:
            logprob = token_logprob(hidden, head, torch.arange(5), 4)[0]
        gradients = torch.autograd.grad(factor * logprob.sum(), leaves)
    assert gpu.divided
    for gradient in gradients:
        assert gradient.isfinite().all() and (factor > 0 or not gradient.any())


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_gradient_that_is_no_number_stays_none(bad):
    hidden, head = torch.randn(5, 24, requires_grad=True), torch.randn(30, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_logprob(hidden, head, torch.arange(5))[0] @ torch.tensor([bad, 1, 1, 1, 1]), [head])
    assert not gradient.isfinite().all()

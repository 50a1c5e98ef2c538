"""Token log-probabilities are those of F.log_softmax on float64 logits, with its gradients, without its [T, V] tensors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import softmax
from kernels.matmul import FULL_SCALE
from kernels.token_logprob import token_logprob

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3}


def relative(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("chunk", "tau"), [(1, 0.7), (8, None), (8, 0.7), (1024, 2.0)])
def test_values_entropy_and_gradients_are_those_of_log_softmax(dtype, chunk, tau):
    """In bf16 the values are as exact as in float32: no temperature, and nothing divided by one, is rounded to it."""
    g = torch.Generator().manual_seed(0)
    taus = None if tau is None else torch.linspace(tau, tau + 0.1, 21)
    hidden = (torch.randn(21, 24, generator=g, dtype=torch.float64) * 0.6).to(dtype).requires_grad_()
    head = torch.randn(301, 24, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 301, (21,), generator=g), torch.randn(21, generator=g, dtype=torch.float64)
    logprob, entropy = token_logprob(hidden, head, targets, chunk, taus)
    grads = torch.autograd.grad((logprob * weights.to(logprob.dtype)).sum(), [hidden, head])

    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    log_probs = F.log_softmax(exact[0] @ exact[1].T / (1.0 if taus is None else taus.double()[:, None]), -1)
    exact_logprob = log_probs.gather(1, targets[:, None]).squeeze(1)
    exact_grads = torch.autograd.grad((exact_logprob * weights).sum(), exact)
    value_tolerance = min(TOLERANCE[dtype], 1e-5)
    assert relative(logprob, exact_logprob) < value_tolerance
    assert relative(entropy, -(log_probs.exp() * log_probs).sum(-1)) < value_tolerance
    assert logprob.dtype == entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not entropy.requires_grad
    for grad, expected in zip(grads, exact_grads, strict=True):
        assert grad.dtype == dtype and relative(grad, expected) < TOLERANCE[dtype]


def test_large_logits_stay_finite():
    hidden, head = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]], requires_grad=True)
    logprob, entropy = token_logprob(hidden, head, torch.tensor([1]))
    logprob.sum().backward()
    assert (logprob.item(), entropy.item()) == (-600.0, 0.0)
    assert hidden.grad.item() == -2.0 and head.grad.flatten().tolist() == [-300.0, 300.0]


@pytest.mark.parametrize("tau", [1e-6, 1e-4, 0.1, 1e4])
def test_an_impossible_token_has_no_part_in_entropy_or_gradient_at_any_temperature(tau):
    logits = torch.tensor([[1.0, 1.0, -torch.inf, -4.0]])
    logprob, entropy, log_total = softmax.token_statistics(logits.clone(), torch.tensor([0]), torch.tensor([tau]))
    exact = (logits.double() / torch.tensor(tau).double()).softmax(-1)
    assert torch.allclose(logprob.double(), exact[:, 0].log())
    assert torch.allclose(entropy.double(), -torch.xlogy(exact, exact).sum(-1))
    gradient = softmax.token_gradient(logits, torch.tensor([0]), torch.tensor([tau]), log_total, torch.float32) / FULL_SCALE
    assert torch.allclose(gradient.double(), torch.tensor([[1.0, 0, 0, 0]]) - exact, atol=max(1e-6, 1e-7 / tau))


def test_no_tokens_give_zero_gradients():
    hidden, head = torch.empty(0, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
    logprob, entropy = token_logprob(hidden, head, torch.empty(0, dtype=torch.int64))
    logprob.sum().backward()
    assert logprob.shape == entropy.shape == (0,) and not head.grad.any()


def test_a_frozen_head_gets_no_gradient():
    hidden, head = torch.randn(5, 4, requires_grad=True), torch.randn(10, 4)
    token_logprob(hidden, head, torch.arange(5))[0].sum().backward()
    assert hidden.grad is not None and head.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_tokens_times_vocabulary_is_ever_alive(dtype, largest_tensor):
    """T V is 400,000 elements here; the largest allowed is dW's 48,000."""
    hidden, head = torch.randn(200, 24, dtype=dtype, requires_grad=True), torch.randn(2000, 24, dtype=dtype, requires_grad=True)
    with largest_tensor:
        token_logprob(hidden, head, torch.arange(200), chunk_tokens=8)[0].sum().backward()
    assert largest_tensor.elements <= 2000 * 24


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_agrees_with_torchs_own_chunked_cross_entropy(dtype):
    hidden, head = torch.randn(50, 24, dtype=dtype, requires_grad=True), torch.randn(301, 24, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 301, (50,))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    theirs = F.linear_cross_entropy(hidden, head, targets, reduction="sum", options=options)
    ours = -token_logprob(hidden, head, targets, 16)[0].sum()
    assert torch.allclose(ours, theirs, rtol=1e-6)
    for grad, expected in zip(*(torch.autograd.grad(loss, [hidden, head]) for loss in (ours, theirs)), strict=True):
        assert relative(grad, expected.double()) < 1e-5


def test_two_runs_give_the_same_bits():
    hidden, head = torch.randn(50, 24, requires_grad=True), torch.randn(301, 24, requires_grad=True)
    first, second = (
        torch.autograd.grad(token_logprob(hidden, head, torch.arange(50), 16)[0].sum(), [hidden, head]) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape)


@pytest.mark.parametrize(
    ("tau", "message"),
    [
        (ones(4), r"tau: shape \[4\], expected \[T\] = \[5\]"),
        (ones(5).bfloat16(), r"tau: dtype torch.bfloat16, expected torch.float32 or torch.float64"),
        (ones(5).to("meta"), r"tau: on meta, expected cpu, where hidden is"),
        (torch.tensor([1.0, 0, torch.nan, 1, 1]), r"tau: shape \[5\] with 2 elements not above 0, expected every element above 0"),
    ],
)
def test_wrong_temperatures_are_named(tau, message):
    with pytest.raises(ValueError, match=message):
        token_logprob(ones(5, 4), ones(10, 4), torch.arange(5), tau=tau)


@pytest.mark.parametrize(
    ("hidden", "head", "targets", "message"),
    [
        (ones(5, 4), ones(10, 4), torch.arange(4), r"targets: shape \[4\], expected \[T\] = \[5\]"),
        (ones(5, 4), ones(10, 4), torch.arange(5).int(), r"targets: dtype torch.int32, expected torch.int64"),
        (ones(5, 4), ones(10, 4), torch.arange(5) * 3, r"targets: values from 0 to 12, expected ids in \[0, 10\)"),
        (ones(5, 4), ones(10, 4), torch.arange(5) - 1, r"targets: values from -1 to 3, expected ids in \[0, 10\)"),
        (ones(5, 4), ones(10, 3), torch.arange(5), r"head: shape \[10, 3\], expected \[V, d\] = \[any, 4\]"),
        (ones(5, 4), ones(4, 10).T, torch.arange(5), r"head: shape \[10, 4\] with strides \[1, 10\], expected a contiguous"),
        (ones(5, 4), ones(10, 4).to("meta"), torch.arange(5), r"head: on meta, expected cpu, where hidden is"),
        (ones(5, 4).int(), ones(10, 4), torch.arange(5), r"hidden: dtype torch.int32, expected torch.bfloat16 or"),
        (ones(10, 4)[::2], ones(10, 4), torch.arange(5), r"hidden: shape \[5, 4\] with strides \[8, 1\], expected a contiguous"),
    ],
)
def test_wrong_inputs_are_named_before_any_work(hidden, head, targets, message, monkeypatch):
    monkeypatch.setattr("kernels.token_logprob._TokenLogprob.apply", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        token_logprob(hidden, head, targets)

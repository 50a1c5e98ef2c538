"""log pi of a soft embedding: values and gradients of the naive float64 form, on the recorded support and over all of V."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels.soft_embedding import mix, rebuild, select_support
from kernels.soft_logprob import soft_logprob, soft_logprob_dense

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-3}


@dataclass
class Problem:
    hidden: Tensor
    head: Tensor
    embedding: Tensor  # is head when tied
    noisy: Tensor
    ids: Tensor
    offsets: Tensor
    tau: Tensor
    sigma: Tensor
    weights: Tensor  # d loss / d log pi

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.head] + ([] if self.embedding is self.head else [self.embedding])

    def exact(self) -> "Problem":
        """The same numbers in float64."""
        head = self.head.detach().double().requires_grad_()
        embedding = head if self.embedding is self.head else self.embedding.detach().double().requires_grad_()
        rest = (x.detach().double() for x in (self.noisy, self.tau, self.sigma, self.weights))
        noisy, tau, sigma, weights = rest
        hidden = self.hidden.detach().double().requires_grad_()
        return Problem(hidden, head, embedding, noisy, self.ids, self.offsets, tau, sigma, weights)


def problem(dtype: torch.dtype, tied: bool, tokens: int = 23, vocabulary: int = 301, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    width = 24
    n0 = width if tied else 40

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden = (normal(tokens, width) * 0.4).to(dtype).requires_grad_()
    head = normal(vocabulary, width).to(dtype).requires_grad_()
    embedding = head if tied else normal(vocabulary, n0).to(dtype).requires_grad_()
    counts = torch.randint(1, 40, (tokens,), generator=g)
    ids = torch.cat([torch.randperm(vocabulary, generator=g)[:c].sort().values for c in counts.tolist()]) if tokens else counts
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Problem(
        hidden,
        head,
        embedding,
        normal(tokens, n0).to(dtype),
        ids.int(),
        torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        (torch.rand(tokens, generator=g, dtype=torch.float64) + 0.3).to(wide),
        (torch.rand(tokens, generator=g, dtype=torch.float64) + 0.3).to(wide),
        normal(tokens).to(wide),
    )


def naive(p: Problem, dense: bool) -> tuple[Tensor, Tensor]:
    logits = p.hidden @ p.head.T / p.tau[:, None]
    if not dense:
        rows = torch.repeat_interleave(p.offsets.diff())
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[rows, p.ids.long()] = False
        logits = logits.masked_fill(outside, -torch.inf)
    mean = logits.softmax(-1) @ p.embedding
    return (p.noisy - mean).square().sum(-1) * (-0.5 / p.sigma**2), mean


def fused(p: Problem, dense: bool, chunk: int) -> tuple[Tensor, Tensor]:
    if dense:
        return soft_logprob_dense(p.hidden, p.head, p.embedding, p.noisy, p.tau, p.sigma, chunk)
    return soft_logprob(p.hidden, p.head, p.embedding, p.noisy, p.ids, p.offsets, p.tau, p.sigma, chunk)


def relative(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dense", "chunk"), [(False, 1), (False, 7), (False, 10**6), (True, 1), (True, 7), (True, 1024)])
def test_values_and_gradients_are_those_of_the_naive_form(dtype, tied, dense, chunk):
    p = problem(dtype, tied)
    logprob, mean = fused(p, dense, chunk)
    grads = torch.autograd.grad((logprob * p.weights).sum(), p.leaves)
    q = p.exact()
    exact_logprob, exact_mean = naive(q, dense)
    exact_grads = torch.autograd.grad((exact_logprob * q.weights).sum(), q.leaves)
    value_tolerance = min(TOLERANCE[dtype], 1e-5)  # bf16 inputs, float32 arithmetic: only the gradients are rounded to bf16
    assert relative(logprob, exact_logprob) < value_tolerance and relative(mean, exact_mean) < value_tolerance
    assert logprob.dtype == mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not mean.requires_grad
    for leaf, grad, exact in zip(p.leaves, grads, exact_grads, strict=True):
        assert grad.dtype == leaf.dtype
        assert relative(grad, exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("tied", [False, True])
def test_the_full_support_is_the_dense_form(tied):
    p = problem(torch.float64, tied, tokens=9, vocabulary=50)
    p.ids = torch.arange(50, dtype=torch.int32).repeat(9)
    p.offsets = torch.arange(10) * 50
    results = []
    for dense in (False, True):
        logprob, mean = fused(p, dense, 16)
        results.append((logprob, mean, *torch.autograd.grad((logprob * p.weights).sum(), p.leaves)))
    for sparse, full in zip(*results, strict=True):
        assert relative(sparse, full) < 1e-12


@pytest.mark.parametrize("dense", [False, True])
def test_no_tokens_give_zero_gradients(dense):
    p = problem(torch.float32, False, tokens=0)
    logprob, mean = fused(p, dense, 4)
    logprob.sum().backward()
    assert logprob.shape == (0,) and mean.shape == (0, 40)
    assert all(not leaf.grad.any() for leaf in p.leaves)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("frozen", ["hidden", "head", "embedding"])
def test_a_frozen_input_gets_no_gradient_and_changes_no_other(dense, frozen):
    p = problem(torch.float64, False)
    expected = torch.autograd.grad(fused(p, dense, 8)[0].sum(), p.leaves)
    getattr(p, frozen).requires_grad_(False)
    fused(p, dense, 8)[0].sum().backward()
    for name, grad in zip(("hidden", "head", "embedding"), expected, strict=True):
        found = getattr(p, name).grad
        assert found is None if name == frozen else torch.equal(found, grad)


def test_float32_masters_and_bf16_hidden_states_mix():
    p = problem(torch.float32, True)
    p.hidden = p.hidden.detach().bfloat16().requires_grad_()
    grads = torch.autograd.grad(fused(p, False, 8)[0].sum(), p.leaves)
    q = p.exact()
    exact = torch.autograd.grad(naive(q, False)[0].sum(), q.leaves)
    assert grads[0].dtype == torch.bfloat16 and relative(grads[0], exact[0]) < 2e-3
    assert grads[1].dtype == torch.float32 and relative(grads[1], exact[1]) < 1e-5


def test_two_runs_give_the_same_bits():
    p = problem(torch.bfloat16, True)
    first, second = (torch.autograd.grad(fused(p, False, 8)[0].sum(), p.leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_engine_made_has_residual_one_for_the_learner(dtype):
    """|h~ - h|^2 / (n0 sigma^2) is 1 +- sqrt(2 / n0) a token, and the learner's mean is the engine's mixture."""
    g = torch.Generator().manual_seed(2)
    tokens, vocabulary, width = 64, 4096, 128
    weight = torch.randn(vocabulary, width, generator=g).to(dtype)
    hidden = ((weight[:tokens] + weight[tokens : 2 * tokens]).float() * 0.12).to(dtype)
    tau, sigma = torch.full((tokens,), 0.5), torch.full((tokens,), 0.33)
    seeds, positions = torch.full((tokens,), 77), torch.arange(tokens)
    support = select_support(hidden @ weight.T, tau, hidden, weight)
    record = (support.ids, support.probs, support.offsets)
    noisy = rebuild(*record, weight, sigma, seeds, positions, dtype)
    logprob, mean = soft_logprob(hidden, weight, weight, noisy, support.ids, support.offsets, tau, sigma)
    assert (mean - mix(*record, weight, dtype)).norm(dim=1).max() < 1e-4 * 0.33
    residual = -2 * logprob / width
    assert abs(residual.mean() - 1) < 4 * (2 / width / tokens) ** 0.5
    assert (residual - 1).abs().max() < 5 * (2 / width) ** 0.5
    off_by_one = soft_logprob(hidden, weight, weight, noisy.roll(1, 0), support.ids, support.offsets, tau, sigma)[0]
    assert (-2 * off_by_one / width).mean() > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dense", "chunk", "limit"), [(False, 50, 2000 * 40), (True, 4, 2000 * 40)])
def test_nothing_of_tokens_times_vocabulary_is_ever_alive(dtype, dense, chunk, limit, largest_tensor):
    """T V is 400,000 elements here, the entries times the width 80,000 and more; the largest allowed is dW itself."""
    p = problem(dtype, False, tokens=200, vocabulary=2000)
    assert len(p.ids) * 24 > limit
    with largest_tensor:
        fused(p, dense, chunk)[0].sum().backward()
    assert largest_tensor.elements <= limit


def test_wrong_inputs_are_named():
    p = problem(torch.float32, False)
    p.sigma = p.sigma[:-1]
    with pytest.raises(ValueError, match=r"sigma: shape \[22\], expected \[T\] = \[23\]"):
        fused(p, True, 8)
    p = problem(torch.float32, False)
    p.offsets = p.offsets[:-1]
    with pytest.raises(ValueError, match=r"support_offsets: shape \[23\], expected \[T \+ 1\] = \[24\]"):
        fused(p, False, 8)
    p = problem(torch.float32, False)
    with pytest.raises(ValueError, match=r"chunk_entries: 0, expected a number above 0"):
        fused(p, False, 0)
    p.embedding = p.embedding[:-1]
    with pytest.raises(ValueError, match=r"embedding: shape \[300, 40\], expected \[V, n0\] = \[301, any\]"):
        fused(p, False, 8)

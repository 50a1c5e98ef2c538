"""Random soft-token problems and their naive float64 answers, for the tests of every path of soft_logprob."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from kernels.soft_logprob import soft_logprob, soft_logprob_dense

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}  # relative; bf16 inputs, float32 arithmetic


@dataclass(frozen=True)
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
        values = {f.name: getattr(self, f.name).detach() for f in fields(self)}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in values.items()}
        wide["embedding"] = wide["head"] if self.embedding is self.head else wide["embedding"]
        return Problem(**wide).with_gradients()

    def with_gradients(self) -> "Problem":
        for leaf in self.leaves:
            leaf.requires_grad_()
        return self


def problem(
    dtype: torch.dtype,
    tied: bool,
    tokens: int = 23,
    vocabulary: int = 301,
    width: int = 24,
    n0: int = 40,
    largest_support: int = 39,
    seed: int = 0,
) -> Problem:
    """Supports of 1 to `largest_support` random ids, tau and sigma from 0.3 on; n0 is `width` when tied.

    The same numbers on every device; they lie on the default one.
    """
    g = torch.Generator("cpu").manual_seed(seed)
    n0 = width if tied else n0

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64, device="cpu").to(torch.get_default_device())

    hidden = (normal(tokens, width) * 2 / width**0.5).to(dtype)
    head = normal(vocabulary, width).to(dtype)
    embedding = head if tied else normal(vocabulary, n0).to(dtype)
    counts = (normal(tokens).abs() * largest_support / 2).long().clamp(1, min(largest_support, vocabulary))
    ids = [normal(vocabulary).argsort()[:count].sort().values for count in counts.tolist()]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = (normal(2, tokens).abs() + 0.3).to(wide)
    return Problem(
        hidden=hidden,
        head=head,
        embedding=embedding,
        noisy=normal(tokens, n0).to(dtype),
        ids=torch.cat([*ids, counts[:0]]).int(),
        offsets=torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
        tau=scales[0],
        sigma=scales[1],
        weights=normal(tokens).to(wide),
    ).with_gradients()


def cold_ties(dtype: torch.dtype, tied: bool, tau: float) -> Problem:
    """Every token has two equal logits above all others, from two equal rows of the head: at any small tau p is (1/2, 1/2)."""
    p = problem(dtype, tied, tokens=11, vocabulary=67)
    first = torch.arange(11) * 2
    with torch.no_grad():
        p.head[40:] = p.head[40]
        p.head[1:22:2] = p.head[:22:2]
        p.hidden.copy_(p.head[first])
    supports = torch.stack((first, first + 1, torch.full((11,), 50)), 1)
    return replace(p, ids=supports.flatten().int(), offsets=torch.arange(12) * 3, tau=torch.full_like(p.tau, tau)).with_gradients()


def naive(p: Problem, dense: bool) -> tuple[Tensor, Tensor]:
    """(log pi, mean) by plain autograd on [T, V] tensors."""
    logits = p.hidden @ p.head.T / p.tau[:, None]
    if not dense:
        rows = torch.repeat_interleave(p.offsets.diff())
        outside = torch.ones_like(logits, dtype=torch.bool)
        outside[rows, p.ids.long()] = False
        logits = logits.masked_fill(outside, -torch.inf)
    mean = logits.softmax(-1) @ p.embedding
    return (p.noisy - mean).square().sum(-1) * (-0.5 / p.sigma**2), mean


def fused(p: Problem, dense: bool, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """(log pi, mean) by the kernels."""
    if dense:
        return soft_logprob_dense(p.hidden, p.head, p.embedding, p.noisy, p.tau, p.sigma, chunk)
    return soft_logprob(p.hidden, p.head, p.embedding, p.noisy, p.ids, p.offsets, p.tau, p.sigma)


def relative(result: Tensor, exact: Tensor) -> float:
    """|result - exact| / |exact|."""
    return ((result.double() - exact).norm() / exact.norm()).item()


def assert_exact(
    p: Problem, dense: bool, chunk: int = 1024, values: float | None = None, grads: float | None = None, jointly: bool = False
) -> None:
    """Values, mean and gradients of the kernels are those of the naive form in float64, and in the dtypes that are promised.

    `values` and `grads` are what they may be off by, relative in norm, if not TOLERANCE. Added to it is the one rounding of a
    gradient to its leaf's dtype, 1.7e-3 in bf16. `jointly`: a gradient's error is relative to the norm of all of them, for
    problems where one is a difference of large equal terms.
    """
    dtype = p.hidden.dtype
    values, grads = values or TOLERANCE[dtype], grads or TOLERANCE[dtype]
    logprob, mean = fused(p, dense, chunk)
    found = torch.autograd.grad((logprob * p.weights).sum(), p.leaves)
    q = p.exact()
    exact_logprob, exact_mean = naive(q, dense)
    exact_grads = torch.autograd.grad((exact_logprob * q.weights).sum(), q.leaves)
    assert relative(logprob, exact_logprob) < values and relative(mean, exact_mean) < values
    assert logprob.dtype == mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not mean.requires_grad
    total = torch.stack([exact.norm() for exact in exact_grads]).norm()
    for leaf, grad, exact in zip(p.leaves, found, exact_grads, strict=True):
        assert grad.dtype == leaf.dtype
        rounding = (exact.to(dtype) - exact).norm()
        assert (grad.double() - exact).norm() < grads * (total if jointly else exact.norm()) + 1.02 * rounding

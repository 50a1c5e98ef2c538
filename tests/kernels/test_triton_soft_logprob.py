"""The Triton kernels of soft_logprob and token_logprob: each equals its reference, and float64.

Tolerances: 1e-6 of the sum of magnitudes for float32 sums; float16 and bf16 results are those of float32 rounded once.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels import matmul, segments, softmax, triton_segments, triton_soft_embedding, triton_softmax
from kernels.soft_logprob import soft_logprob
from kernels.token_logprob import token_logprob
from tests.kernels.soft_problems import Problem, assert_exact, cold_ties, fused, problem, relative

HALF, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
INF = torch.inf
VOCABULARIES = [1, 2, 50, 4096, 4097, 9001]  # triton_softmax.BLOCK is 4096
COUNTS = [[3, 0, 130, 1, 40], [1], [0], [300, 129, 128], []]  # entries of each row; triton_segments.SEGMENT is 128


@pytest.fixture(autouse=True)
def on_device(device: torch.device) -> Iterator[None]:
    with device:
        yield


def taus(rows: int = 5) -> Tensor:
    return torch.tensor([1e-4, 1e-2, 0.5, 1.0, 2.0])[:rows]


def ragged(counts: list[int], vocabulary: int = 301) -> tuple[Tensor, Tensor, Tensor]:
    """(offsets [R + 1], rows [N], random ids int32 [N])"""
    offsets = torch.tensor([0, *counts]).cumsum(0)
    return offsets, segments.rows_of(offsets, sum(counts)), torch.randint(0, vocabulary, (sum(counts),)).int()


# Ragged rows


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.parametrize(("left_dtype", "table_dtype"), [(F32, F32), (F32, BF16), (BF16, HALF)])
def test_entry_dots(counts, width, left_dtype, table_dtype):
    _, rows, ids = ragged(counts)
    left, table = torch.randn(len(counts), width).to(left_dtype), torch.randn(301, width).to(table_dtype)
    dots = triton_segments.entry_dots(left, rows, table, ids)
    products = left.double()[rows] * table.double()[ids.long()]
    assert dots.dtype == F32 and ((dots - products.sum(-1)).abs() <= 1e-6 * products.abs().sum(-1)).all()


def test_entry_dots_of_4096_columns():
    _, rows, ids = ragged([5, 2])
    left, table = torch.randn(2, 4096), torch.randn(301, 4096).bfloat16()
    expected = segments.entry_dots(left.double(), rows, table, ids)
    assert relative(triton_segments.entry_dots(left, rows, table, ids), expected) < 1e-6


@pytest.mark.parametrize("counts", COUNTS)
def test_segment_softmax_and_its_gradient(counts):
    """The same float64 arithmetic as the reference: equal but for the last bit of exp."""
    offsets, _, ids = ragged(counts)
    logits, tau, d_probs = torch.randn(len(ids)) * 3, taus(len(counts)), torch.randn(len(ids))
    if len(ids) > 3:
        logits[1] = -INF
        logits[2] = logits[0] = logits.max() + 1
    probs = triton_segments.segment_softmax(logits, tau, offsets)
    assert torch.allclose(probs, segments.segment_softmax(logits, tau, offsets), rtol=2e-7, atol=0)
    gradient = triton_segments.softmax_gradient(probs, d_probs, tau, offsets)
    expected = segments.softmax_gradient(probs, d_probs, tau, offsets)
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-6)
    if len(ids) > 3:
        assert probs[1] == 0 and probs[0] == probs[2] > 0.4


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.parametrize("table_dtype", [F32, BF16, HALF])
def test_entry_sums(counts, width, table_dtype):
    offsets, rows, ids = ragged(counts)
    table, weights = torch.randn(301, width).to(table_dtype), torch.randn(len(ids))
    terms = weights.double()[:, None] * table.double()[ids.long()]
    exact, size = (torch.zeros(len(counts), width).double().index_add_(0, rows, x) for x in (terms, terms.abs()))
    sums = triton_segments.entry_sums(table, ids, weights, offsets, F32)
    assert ((sums - exact).abs() <= 1e-6 * size).all()
    assert torch.equal(triton_segments.entry_sums(table, ids, weights, offsets, BF16), sums.bfloat16())
    for row in range(len(counts)):
        part = slice(offsets[row], offsets[row + 1])
        alone = triton_segments.entry_sums(table, ids[part], weights[part], offsets[row : row + 2] - offsets[row], F32)
        assert torch.equal(alone[0], sums[row])


def test_the_learners_mixture_is_the_engines():
    offsets, _, ids = ragged([3, 40, 1])
    embedding, probs = torch.randn(301, 300).bfloat16(), torch.rand(44)
    engine = triton_soft_embedding.mix(ids, probs, offsets, embedding, BF16)
    assert torch.allclose(triton_segments.entry_sums(embedding, ids, probs, offsets, F32), engine, rtol=1e-5, atol=1e-6)


# Chunks of logits


def logits_of(vocabulary: int) -> Tensor:
    """[5, V] for taus(): -inf, exact ties at the top and large magnitudes among them."""
    logits = torch.randn(5, vocabulary) * 3
    if vocabulary > 2:
        logits[1, : vocabulary // 2] = -INF
        logits[:2, -2:] = 11.0
        logits[3] += 1000
    return logits


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_softmax_weights(vocabulary, dtype):
    logits, scale = logits_of(vocabulary), matmul.weight_scale(dtype)
    weights, total, peak = triton_softmax.softmax_weights(logits, taus(), dtype)
    exact = scale * ((logits.double() - logits.double().amax(-1, keepdim=True)) / taus().double()[:, None]).exp()
    assert torch.equal(peak[:, 0], logits.amax(-1))
    # Half a step of float16: relative above 2^-14, absolute below. The exponent, up to 100 where float32 is not 0, is off by a bit.
    step, floor = (2.0**-11, 2.0**-25) if dtype == HALF else (0.0, 1e-38)
    assert ((weights.double() - exact).abs() <= (step + 1e-5) * exact + floor).all()
    assert torch.allclose(total[:, 0].double(), weights.double().sum(-1), rtol=1e-6)
    assert (weights.amax(-1) == scale).all() and not weights[logits == -INF].any()
    again = triton_softmax.softmax_weights(logits, taus(), dtype, peak)
    assert torch.equal(again[0], weights) and torch.equal(again[1], total)
    if dtype == F32:
        reference = softmax.softmax_weights(logits.clone(), taus(), F32)
        assert torch.allclose(weights, reference[0], rtol=1e-5, atol=1e-38) and torch.allclose(total, reference[1], rtol=1e-6)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [F32, HALF])
def test_weight_gradients(vocabulary, dtype):
    weights, total, _ = triton_softmax.softmax_weights(logits_of(vocabulary), taus(), dtype)
    d_probs = torch.randn(5, vocabulary)
    gradients = triton_softmax.weight_gradients(weights, total, d_probs)
    w, g = weights.double(), d_probs.double()
    exact = w * (g - (w * g).sum(-1, keepdim=True) / w.sum(-1, keepdim=True))
    assert gradients.dtype == dtype
    # Half a step of float16: relative above 2^-14, absolute below.
    step, floor = (2.0**-11, 2.0**-25) if dtype == HALF else (0.0, 0.0)
    assert ((gradients - exact).abs() <= step * exact.abs() + floor + 2e-6 * w * (g.abs() + g.abs().amax())).all()
    assert not gradients[weights == 0].any() and (vocabulary > 1 or not gradients.any())
    if dtype == F32:
        reference = softmax.weight_gradients(weights, total, d_probs.clone())
        assert ((gradients - reference).abs() <= 2e-6 * weights * (d_probs.abs() + d_probs.abs().amax())).all()


def test_a_logit_that_moved_by_a_bit_since_the_forward_pass_leaves_a_distribution():
    """At tau = 1e-4 the weight of the peak is then not 1; divided by their own sum the weights are a distribution again."""
    logits, tau, d_probs = torch.zeros(1, 50), torch.tensor([1e-4]), torch.randn(1, 50)
    logits[0, 7] = 20.0
    peak = logits.amax(-1, keepdim=True) * (1 - 2.0**-23)
    for stages in (softmax, triton_softmax):
        weights, total, found = stages.softmax_weights(logits.clone(), tau, F32, peak)
        assert found is peak and weights[0, 7] > 1.01 and (weights / total)[0, 7] == 1
        gradients = stages.weight_gradients(weights, total, d_probs.clone())
        assert (gradients / tau / total).abs().max() < 5e-3


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_token_statistics_and_gradient(vocabulary):
    logits, targets = logits_of(vocabulary), torch.full((5,), vocabulary - 1)
    tau = torch.tensor([0.7, 0.5, 1.0, 1.0, 2.0])
    found = triton_softmax.token_statistics(logits, targets, tau)
    scaled = logits.double() / tau.double()[:, None]
    exact = torch.log_softmax(scaled, -1)
    entropy = -torch.xlogy(exact.exp(), exact.exp()).sum(-1)
    for statistic, expected in zip(found, (exact[:, -1], entropy, tau * scaled.logsumexp(-1)), strict=True):
        assert torch.allclose(statistic.double(), expected, rtol=1e-6, atol=2e-5)
    for statistic, reference in zip(found, softmax.token_statistics(logits.clone(), targets, tau), strict=True):
        assert torch.allclose(statistic, reference, rtol=1e-6, atol=2e-5)
    exact_gradient = matmul.FULL_SCALE * (torch.nn.functional.one_hot(targets, vocabulary) - exact.exp())
    reference = softmax.token_gradient(logits.clone(), targets, tau, found[2], F32)
    for dtype, tolerance in ((F32, 0.0), (HALF, 2.0**-11)):
        gradient = triton_softmax.token_gradient(logits, targets, tau, found[2], dtype)
        # logsumexp, up to 1000 here, is off by its last bit, 3e-5.
        assert gradient.dtype == dtype and torch.allclose(gradient.double(), exact_gradient, rtol=tolerance + 1e-4, atol=1.0)
        assert torch.allclose(gradient.float(), reference, rtol=tolerance + 1e-6, atol=2e-3)


# The whole of them


@pytest.fixture
def on_triton(monkeypatch) -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors."""
    monkeypatch.setattr(matmul, "uses_triton", lambda tensor: tensor.dtype != torch.float64)
    yield


def tolerance(dtype: torch.dtype, dense: bool) -> dict[str, float]:
    """The dense form of bf16 inputs multiplies float16 factors, each off by 2^-12 or so; all else is float32."""
    return {"values": 2e-5, "grads": 4e-4} if dense and dtype == BF16 else {}


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_values_and_gradients_are_those_of_the_naive_form(dtype, tied, dense, on_triton):
    assert_exact(problem(dtype, tied, tokens=11, vocabulary=67), dense, chunk=4, **tolerance(dtype, dense))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tau", [1e-4, 1e-2, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_exact_ties_at_any_temperature(tau, dense, dtype, on_triton):
    assert_exact(cold_ties(dtype, False, tau), dense, jointly=True, **tolerance(dtype, dense))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 65, 1), (2, 9, 4096), (70, 2, 3)])
def test_odd_shapes(tokens, vocabulary, width, dense, on_triton):
    assert_exact(problem(F32, True, tokens, vocabulary, width, largest_support=60), dense, chunk=64, jointly=True)


@pytest.mark.parametrize("dense", [False, True])
def test_two_runs_give_the_same_bits(dense, on_triton):
    p = problem(BF16, True, tokens=11, vocabulary=67)
    first, second = (torch.autograd.grad(fused(p, dense)[0].sum(), p.leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_token_does_not_depend_on_its_batch(on_triton):
    p = problem(BF16, True, tokens=5)
    logprob, mean = fused(p, False)

    def alone(p: Problem, t: int) -> tuple[Tensor, Tensor]:
        part, entries = slice(t, t + 1), slice(p.offsets[t], p.offsets[t + 1])
        offsets = p.offsets[t : t + 2] - p.offsets[t]
        return soft_logprob(p.hidden[part], p.head, p.head, p.noisy[part], p.ids[entries], offsets, p.tau[part], p.sigma[part])

    for t in range(5):
        own_logprob, own_mean = alone(p, t)
        assert torch.equal(own_mean[0], mean[t]) and torch.equal(own_logprob[0], logprob[t])


def test_no_tokens_give_zero_gradients(on_triton):
    for dense in (False, True):
        p = problem(F32, False, tokens=0, vocabulary=67)
        fused(p, dense)[0].sum().backward()
        assert all(not leaf.grad.any() for leaf in p.leaves)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_token_log_probabilities_and_gradients(dtype, on_triton):
    hidden, head = (torch.randn(n, 24).mul(0.6).to(dtype).requires_grad_() for n in (21, 301))
    targets, weights, tau = torch.randint(0, 301, (21,)), torch.randn(21), torch.linspace(0.7, 1.3, 21)
    logprob, entropy = token_logprob(hidden, head, targets, 8, tau)
    grads = torch.autograd.grad((logprob * weights).sum(), [hidden, head])
    exact = [x.detach().double().requires_grad_() for x in (hidden, head)]
    log_probs = torch.log_softmax(exact[0] @ exact[1].T / tau.double()[:, None], -1)
    expected = log_probs.gather(1, targets[:, None]).squeeze(1)
    exact_grads = torch.autograd.grad((expected * weights).sum(), exact)
    assert relative(logprob, expected) < 1e-5 and relative(entropy, -(log_probs.exp() * log_probs).sum(-1)) < 1e-5
    for grad, e in zip(grads, exact_grads, strict=True):
        assert (grad.double() - e).norm() < (1e-5 if dtype == F32 else 4e-4) * e.norm() + 1.02 * (e.to(dtype) - e).norm()

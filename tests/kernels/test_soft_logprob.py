"""log pi of a soft embedding: values and gradients of the naive float64 form, on the recorded support and over all of V."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernels import segments
from kernels.soft_embedding import mix, rebuild, select_support
from kernels.soft_logprob import soft_kl, soft_logprob
from tests.kernels.soft_problems import Problem, assert_exact, cold_ties, fused, naive, problem, relative

FLOATS = [torch.float64, torch.float32, torch.bfloat16]
CHUNKS = [(False, 1024), (True, 1), (True, 7), (True, 1024)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dense", "chunk"), CHUNKS)
def test_values_and_gradients_are_those_of_the_naive_form(dtype, tied, dense, chunk):
    assert_exact(problem(dtype, tied), dense, chunk)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("tau", [1e-4, 1e-2, 0.5, 2.0])
@pytest.mark.parametrize("tied", [False, True])
def test_exact_ties_at_any_temperature(tau, tied, dense):
    """At tau = 1e-4 a logit that is off by its last bit moves p by 2%: both passes must see the same weights."""
    assert_exact(cold_ties(torch.float32, tied, tau), dense, jointly=True)


@pytest.mark.parametrize("dense", [False, True])
def test_a_certain_token_has_no_gradient_but_its_embeddings(dense):
    """p = 1 for one token: dz must be exactly 0, where rounding errors over tau = 1e-4 would be thousands of times too large."""
    p = problem(torch.float32, False)
    p = replace(p, tau=torch.full_like(p.tau, 1e-4))
    d_hidden, d_head, d_embedding = torch.autograd.grad((fused(p, dense)[0] * p.weights).sum(), p.leaves)
    assert not d_hidden.any() and not d_head.any() and d_embedding.any()


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), [(1, 1, 1), (1, 65, 1), (3, 50, 4096), (70, 2, 3)])
def test_odd_shapes(tokens, vocabulary, width, dense):
    p = problem(torch.float64, False, tokens, vocabulary, width, n0=width + 1, largest_support=60)
    logprob, mean = fused(p, dense, chunk=9)
    exact_logprob, exact_mean = naive(p, dense)
    assert relative(logprob, exact_logprob) < 1e-12 and relative(mean, exact_mean) < 1e-12
    grads = torch.autograd.grad((logprob * p.weights).sum(), p.leaves)
    exact = torch.autograd.grad((exact_logprob * p.weights).sum(), p.leaves)
    for a, b in zip(grads, exact, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_full_support_is_the_dense_form(tied):
    p = problem(torch.float64, tied, tokens=9, vocabulary=50)
    p = replace(p, ids=torch.arange(50, dtype=torch.int32).repeat(9), offsets=torch.arange(10) * 50)
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


@pytest.mark.parametrize("dense", [False, True])
def test_float32_masters_and_bf16_hidden_states_mix(dense):
    p = problem(torch.float32, True)
    p = replace(p, hidden=p.hidden.detach().bfloat16().requires_grad_())
    grads = torch.autograd.grad(fused(p, dense)[0].sum(), p.leaves)
    q = p.exact()
    exact = torch.autograd.grad(naive(q, dense)[0].sum(), q.leaves)
    assert grads[0].dtype == torch.bfloat16 and relative(grads[0], exact[0]) < 2e-3
    assert grads[1].dtype == torch.float32 and relative(grads[1], exact[1]) < 1e-5


@pytest.mark.parametrize("dense", [False, True])
def test_two_runs_give_the_same_bits(dense):
    p = problem(torch.bfloat16, True)
    first, second = (torch.autograd.grad(fused(p, dense)[0].sum(), p.leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_may_be_split_over_chunks_of_a_table_that_is_widened():
    p = problem(torch.bfloat16, True, largest_support=60)
    head, weights = p.head.detach(), torch.randn(len(p.ids))
    rows = segments.rows_of(p.offsets, len(p.ids))
    whole = segments.weighted_rows(head.float(), p.ids, weights, p.offsets)
    left = p.hidden.detach().float()
    for chunk in (1, 7, 64):
        sums = segments.entry_sums(head, p.ids, weights, p.offsets, torch.float32, chunk)
        assert torch.allclose(sums, whole, rtol=1e-5, atol=1e-5)
        dots = segments.entry_dots(left, rows, head, p.ids, chunk)
        assert torch.equal(dots, segments.entry_dots(left, rows, head, p.ids))


def test_kl_in_closed_form_is_that_of_the_gaussians():
    g = torch.Generator().manual_seed(3)
    mean, other = (torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(2))
    sigma = torch.rand(5, generator=g, dtype=torch.float64) + 0.2
    gaussians = [torch.distributions.Normal(m, sigma[:, None]) for m in (mean, other)]
    assert torch.allclose(soft_kl(mean, other, sigma), torch.distributions.kl_divergence(*gaussians).sum(-1), rtol=1e-12)
    assert not soft_kl(mean, mean, sigma).any()


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
@pytest.mark.parametrize("dense", [False, True])
def test_nothing_of_tokens_times_vocabulary_is_ever_alive(dtype, dense, largest_tensor):
    """T V is 2,000,000 elements here, the entries times the width about 480,000; allowed is E's size, or a chunk of its rows."""
    p = problem(dtype, False, tokens=1000, vocabulary=2000)
    limit = max(2000, segments.CHUNK_ENTRIES) * 40
    assert len(p.ids) * 24 > 2 * limit
    with largest_tensor:
        fused(p, dense, chunk=40)[0].sum().backward()
    assert largest_tensor.elements <= limit


def with_part(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Problem], Problem]:
    return lambda p: replace(p, **{name: change(getattr(p, name).detach())})


SHARED_ERRORS = [
    (with_part("hidden", lambda x: x[0]), r"hidden: shape \[24\], expected \[T, d\] = \[any, any\]"),
    (with_part("hidden", lambda x: x.int()), r"hidden: dtype torch.int32, expected torch.bfloat16 or"),
    (with_part("hidden", lambda x: x.T.contiguous().T), r"hidden: shape \[23, 24\] with strides \[1, 23\], expected a contiguous"),
    (with_part("head", lambda x: x[:, :-1]), r"head: shape \[301, 23\], expected \[V, d\] = \[any, 24\]"),
    (with_part("head", lambda x: x.repeat(1, 2)[:, ::2]), r"head: shape \[301, 24\] with strides \[48, 2\], expected a contiguous"),
    (with_part("embedding", lambda x: x[:-1]), r"embedding: shape \[300, 40\], expected \[V, n0\] = \[301, any\]"),
    (with_part("embedding", lambda x: x.to("meta")), r"embedding: on meta, expected cpu, where hidden is"),
    (with_part("noisy", lambda x: x[:, :-1]), r"noisy: shape \[23, 39\], expected \[T, n0\] = \[23, 40\]"),
    (with_part("noisy", lambda x: x.to("meta")), r"noisy: on meta, expected cpu, where hidden is"),
    (with_part("tau", lambda x: x.bfloat16()), r"tau: dtype torch.bfloat16, expected torch.float32 or torch.float64"),
    (with_part("tau", lambda x: x * 0), r"tau: shape \[23\] with 23 elements not above 0, expected every"),
    (with_part("sigma", lambda x: x[:-1]), r"sigma: shape \[22\], expected \[T\] = \[23\]"),
    (with_part("sigma", lambda x: x - 1), r"sigma: shape \[23\] with \d+ elements not above 0, expected every"),
    (with_part("sigma", lambda x: x * torch.nan), r"sigma: shape \[23\] with 23 elements not above 0, expected every"),
]
SUPPORT_ERRORS = [
    (with_part("ids", lambda x: x.float()), r"support_ids: dtype torch.float32, expected torch.int32 or torch.int64"),
    (with_part("ids", lambda x: x - x.min() - 1), r"support_ids: values from -1 to \d+, expected ids in \[0, 301\)"),
    (with_part("ids", lambda x: x + 301), r"support_ids: values from 3\d\d to \d+, expected ids in \[0, 301\)"),
    (with_part("ids", lambda x: x[None]), r"support_ids: shape \[1, \d+\], expected \[N\] = \[any\]"),
    (with_part("offsets", lambda x: x[:-1]), r"support_offsets: shape \[23\], expected \[T \+ 1\] = \[24\]"),
    (with_part("offsets", lambda x: x.int()), r"support_offsets: dtype torch.int32, expected torch.int64"),
    (with_part("offsets", lambda x: x + 1), r"support_offsets: shape \[24\], expected offsets that rise from 0 to \d+"),
    (with_part("offsets", lambda x: x.where(x != x[5], x[4])), r"support_offsets: shape \[24\] with 1 empty rows, expected"),
]


@pytest.mark.parametrize(
    ("dense", "change", "message"),
    [(dense, *case) for dense in (False, True) for case in SHARED_ERRORS] + [(False, *case) for case in SUPPORT_ERRORS],
)
def test_wrong_inputs_are_named_before_any_work(dense, change, message, monkeypatch):
    for function in ("_SupportLogprob", "_DenseLogprob"):
        monkeypatch.setattr(f"kernels.soft_logprob.{function}.apply", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(ValueError, match=message):
        fused(change(problem(torch.float32, False)), dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": torch.zeros(2, 3).bfloat16()}, r"mean: dtype torch.bfloat16, expected torch.float32 or torch.float64"),
        ({"other_mean": torch.zeros(2, 3).double()}, r"other_mean: dtype torch.float64, expected torch.float32"),
        ({"other_mean": torch.zeros(2, 3, device="meta")}, r"other_mean: on meta, expected cpu, where mean is"),
        ({"sigma": torch.ones(3)}, r"sigma: shape \[3\], expected \[T\] = \[2\]"),
        ({"sigma": torch.ones(2).int()}, r"sigma: dtype torch.int32, expected torch.float32 or torch.float64"),
        ({"sigma": torch.ones(2, device="meta")}, r"sigma: on meta, expected cpu, where mean is"),
        ({"sigma": torch.tensor([0.0, -1.0])}, r"sigma: shape \[2\] with 2 elements not above 0, expected every element above 0"),
        ({"sigma": torch.tensor([1.0, torch.nan])}, r"sigma: shape \[2\] with 1 elements not above 0"),
    ],
)
def test_wrong_inputs_of_the_divergence_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        soft_kl(**{"mean": torch.zeros(2, 3), "other_mean": torch.ones(2, 3), "sigma": torch.ones(2)} | change)


def test_a_chunk_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match=r"chunk_tokens: 0, expected a number above 0"):
        fused(problem(torch.float32, False), True, chunk=0)

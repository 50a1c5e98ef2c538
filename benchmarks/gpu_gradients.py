"""gpu_check's sections on the learner's side: stages (ragged rows, chunks of logits) and logprob (values and gradients).

References are float64: each stage written out, and the log-probabilities by plain autograd on [T, V] tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_plan import TAUS, Check, Setting, relative, through_triton, violations, worst
from cluster.bench_logprobs import GAMMA, RMS_OF_WIDTH, TAU, make_supports
from kernels import matmul, triton_segments, triton_softmax
from kernels.segments import rows_of, segment_sum
from kernels.soft_embedding import select_support
from kernels.soft_logprob import soft_logprob, soft_logprob_dense
from kernels.token_logprob import token_logprob

HALF, BFLOAT16, FLOAT32 = torch.float16, torch.bfloat16, torch.float32
GRADIENT_BARS = {BFLOAT16: 2e-3, FLOAT32: 1e-5}  # relative, one rounding to bf16 included
VALUE_BARS = {BFLOAT16: 2e-5, FLOAT32: 1e-5}  # bf16 inputs, float32 arithmetic
HALF_STEP = 2.0**-11  # of float16
LIKELY_TOKENS = 12  # of a row, a factor of 6 apart at TAU


# Stages


def check_stages(setting: Setting) -> list[Check]:
    """Every kernel of the learner's log-probabilities against its definition in float64."""
    return [*_ragged_stages(setting), *_chunk_stages(setting)]


def _ragged_stages(setting: Setting) -> list[Check]:
    device, vocabulary, width = setting.device, setting.scale.small_vocabulary, setting.scale.small_width
    ids, offsets = make_supports(setting.scale.exact_tokens, vocabulary, torch.Generator().manual_seed(2))
    empty = torch.cat((offsets, offsets[-1:]))  # the last row has no entries
    ids, offsets = ids.to(device), empty.to(device)
    rows, tokens = rows_of(offsets, len(ids)), len(offsets) - 1
    tau = torch.tensor(TAUS, device=device).repeat(tokens // len(TAUS) + 1)[:tokens].contiguous()
    dots_error, sums_error, wrong = 0.0, 0.0, 0.0
    for left_dtype, table_dtype in ((FLOAT32, FLOAT32), (FLOAT32, BFLOAT16), (BFLOAT16, HALF)):
        left = torch.randn(tokens, width, device=device).to(left_dtype)
        table = torch.randn(vocabulary, width, device=device).to(table_dtype)
        products = left.double()[rows] * table.double()[ids.long()]
        dots = triton_segments.entry_dots(left, rows, table, ids)
        dots_error = max(dots_error, worst((dots - products.sum(-1)).abs() / products.abs().sum(-1)))
        weights = torch.randn(len(ids), device=device)
        terms = weights.double()[:, None] * table.double()[ids.long()]
        zeros = torch.zeros(tokens, width, dtype=torch.float64, device=device)
        exact, size = (zeros.index_add(0, rows, x) for x in (terms, terms.abs()))
        sums = triton_segments.entry_sums(table, ids, weights, offsets, FLOAT32)
        sums_error = max(sums_error, worst((sums - exact).abs() / (size + 1e-30)))
        wrong += violations(triton_segments.entry_sums(table, ids, weights, offsets, BFLOAT16) == sums.bfloat16())
        part = slice(int(offsets[1]), int(offsets[2]))
        alone = triton_segments.entry_sums(table, ids[part], weights[part], offsets[1:3] - offsets[1], FLOAT32)
        wrong += violations(alone == sums[1:2])
    logits, d_probs = torch.randn(2, len(ids), device=device) * 3
    probs = triton_segments.segment_softmax(logits, tau, offsets)
    exact_probs = _exact_segment_softmax(logits, tau, rows, offsets)
    d_logits = triton_segments.softmax_gradient(probs, d_probs, tau, offsets)
    p, g = probs.double(), d_probs.double()
    average = segment_sum(p * g, offsets)[rows]
    size = p * (g.abs() + segment_sum((p * g).abs(), offsets)[rows]) / tau[rows]
    return [
        Check("entry_dots, of the sum of magnitudes", dots_error, 1e-6),
        Check("entry_sums, of the sum of magnitudes", sums_error, 1e-6),
        Check("entry_sums: coordinates not rounded once to bf16, or that depend on the other rows", wrong, 0),
        Check("segment_softmax, relative above 1e-6", worst((probs - exact_probs).abs() / exact_probs.clamp_min(1e-6)), 1e-6),
        Check(
            "softmax_gradient, of the sum of magnitudes",
            worst((d_logits - p * (g - average) / tau[rows]).abs() / (size + 1e-30)),
            1e-6,
        ),
    ]


def _exact_segment_softmax(logits: Tensor, tau: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    peak = torch.full((len(tau),), -torch.inf, dtype=torch.float64, device=logits.device)
    peak = peak.scatter_reduce(0, rows, logits.double(), "amax")
    weights = ((logits.double() - peak[rows]) / tau.double()[rows]).exp()
    return weights / segment_sum(weights, offsets)[rows]


def _chunk_stages(setting: Setting) -> list[Check]:
    device = setting.device
    tau = torch.tensor(TAUS, device=device)
    checks = []
    for vocabulary in (setting.scale.vocabulary, triton_softmax.BLOCK + 1, 2):
        logits = torch.randn(len(TAUS), vocabulary, device=device) * 3
        logits[1, : vocabulary // 2] = -torch.inf
        logits[:2, -2:] = 11.0  # exact ties at the top
        logits[3] += 1000
        d_probs = torch.randn(len(TAUS), vocabulary, device=device)
        targets = torch.full((len(TAUS),), vocabulary - 1, device=device)
        errors = {"weights": 0.0, "their sum": 0.0, "gradients": 0.0}
        z = logits.double()
        for dtype, step, floor in ((FLOAT32, 0.0, 1e-8), (HALF, HALF_STEP, 2.0**-14)):
            scale = matmul.weight_scale(dtype)
            exact = scale * ((z - z.amax(-1, keepdim=True)) / tau.double()[:, None]).exp()
            weights, total, peak = triton_softmax.softmax_weights(logits, tau, dtype)
            w, g = weights.double(), d_probs.double()
            away = ((w - exact).abs() - step * exact.clamp_min(floor)).clamp_min(0.0) / exact.clamp_min(floor)
            errors["weights"] = max(errors["weights"], worst(away))
            errors["their sum"] = max(errors["their sum"], worst((total[:, 0] / w.sum(-1) - 1).abs()))
            again = triton_softmax.softmax_weights(logits, tau, dtype, peak)
            gradients = triton_softmax.weight_gradients(weights, total, d_probs)
            expected = w * (g - (w * g).sum(-1, keepdim=True) / w.sum(-1, keepdim=True))
            size = w * (g.abs() + g.abs().amax()) + 1e-30
            away = ((gradients - expected).abs() - step * expected.abs() - (0.0 if step == 0 else 2.0**-25)).clamp_min(0.0) / size
            errors["gradients"] = max(errors["gradients"], worst(away))
            errors["weights"] += violations(again[0] == weights, again[1] == total, peak[:, 0] == logits.amax(-1))
        shape = f"V = {vocabulary:,}"
        bars = {"weights": 1e-5, "their sum": 1e-6, "gradients": 2e-6}
        checks += [
            Check(f"{shape}: softmax {what}, relative beyond one rounding", error, bars[what]) for what, error in errors.items()
        ]
        checks += _token_stages(logits, targets, tau.clamp_min(0.5), shape)
    return checks


def _token_stages(logits: Tensor, targets: Tensor, tau: Tensor, shape: str) -> list[Check]:
    found = triton_softmax.token_statistics(logits, targets, tau)
    scaled = logits.double() / tau.double()[:, None]
    exact = torch.log_softmax(scaled, -1)
    probs = exact.exp()
    expected = (exact.gather(1, targets[:, None])[:, 0], -torch.xlogy(probs, probs).sum(-1), tau * scaled.logsumexp(-1))
    # Logits of 1000 bring a logsumexp of 1000, whose last bit is 6e-5, and 6e-5 / tau in a probability.
    error = max(worst((a - b).abs() / (1 + 0.05 * b.abs())) for a, b in zip(found, expected, strict=True))
    exact_gradient = torch.nn.functional.one_hot(targets, logits.shape[1]) - probs
    gradients = (
        triton_softmax.token_gradient(logits, targets, tau, found[2], dtype) / matmul.FULL_SCALE for dtype in (FLOAT32, HALF)
    )
    plain, half = (worst((gradient - exact_gradient).abs()) for gradient in gradients)
    return [
        Check(f"{shape}: token log-probability, entropy, logsumexp", error, 2e-5),
        Check(f"{shape}: token gradient, absolute", plain, 1.5e-4),
        Check(f"{shape}: token gradient in float16, absolute", half, 1.5e-4 + HALF_STEP),
    ]


# Log-probabilities


@dataclass(frozen=True, slots=True)
class Problem:
    """T soft steps whose distributions are a language model's: a dozen likely tokens each, at TAU."""

    hidden: Tensor  # [T, d]
    head: Tensor  # [V, d]
    embedding: Tensor  # [V, d]; is head when tied
    noisy: Tensor  # [T, d]
    ids: Tensor
    offsets: Tensor
    tau: Tensor  # float32 [T]
    sigma: Tensor  # float32 [T]
    weights: Tensor  # float32 [T] d loss / d log pi
    targets: Tensor  # int64 [T]

    @property
    def leaves(self) -> list[Tensor]:
        """What wants gradients."""
        return [self.hidden, self.head] + ([] if self.embedding is self.head else [self.embedding])


def make_problem(setting: Setting, vocabulary: int, width: int, dtype: torch.dtype, tied: bool) -> Problem:
    """Logits some 18 at most, 0.9 apart, over a background of standard deviation 2; the support is their own."""
    tokens, device, rms = setting.scale.exact_tokens, setting.device, RMS_OF_WIDTH / width**0.5
    head = (torch.randn(vocabulary, width, device=device) * rms).to(dtype)
    embedding = head if tied else (torch.randn(vocabulary, width, device=device) * rms).to(dtype)
    likely = torch.randint(0, vocabulary, (tokens, LIKELY_TOKENS), device=device)
    heights = (18.0 - 0.9 * torch.arange(LIKELY_TOKENS, device=device)) / (width * rms**2)
    hidden = (heights[:, None] * head[likely].float()).sum(1) + 0.3 * torch.randn(tokens, width, device=device)
    hidden = hidden.to(dtype)
    tau = torch.full((tokens,), TAU, device=device)
    support = select_support((hidden.float() @ head.float().T).contiguous(), tau)
    sigma = torch.full((tokens,), GAMMA * rms, device=device)
    noisy = (embedding[likely[:, 0]].float() + sigma[:, None] * torch.randn(tokens, width, device=device)).to(dtype)
    problem = Problem(
        hidden, head, embedding, noisy, support.ids, support.offsets, tau, sigma,
        torch.randn(tokens, device=device), likely[:, 1].contiguous(),
    )  # fmt: skip
    for leaf in problem.leaves:
        leaf.requires_grad_()
    return problem


def check_logprob(setting: Setting) -> list[Check]:
    """Values and gradients of the three log-probabilities against float64, in float32 and bf16, apart and tied."""
    small = setting.scale.small_vocabulary, setting.scale.small_width
    large = setting.scale.vocabulary, setting.scale.width
    checks = []
    with through_triton(setting):
        for dtype, (vocabulary, width), tied in ((FLOAT32, small, False), (BFLOAT16, small, True), (BFLOAT16, large, False)):
            problem = make_problem(setting, vocabulary, width, dtype, tied)
            shape = f"V = {vocabulary:,}, d = {width:,}, {str(dtype).removeprefix('torch.')}{', tied' if tied else ''}"
            for form in ("support", "dense", "token"):
                checks += _against_float64(problem, form, shape)
            if tied:
                checks.append(Check(f"{shape}, support: gradients of two runs that differ", _differing_runs(problem), 0))
                checks.append(Check(f"{shape}, support: tokens that depend on their batch", _dependent_tokens(problem), 0))
            del problem
    return checks


def forward(problem: Problem, form: str) -> Tensor:
    """log pi or log p, [T], by the kernels."""
    p = problem
    if form == "support":
        return soft_logprob(p.hidden, p.head, p.embedding, p.noisy, p.ids, p.offsets, p.tau, p.sigma)[0]
    if form == "dense":
        return soft_logprob_dense(p.hidden, p.head, p.embedding, p.noisy, p.tau, p.sigma)[0]
    return token_logprob(p.hidden, p.head, p.targets)[0]


def _leaves(problem: Problem, form: str) -> list[Tensor]:
    return [problem.hidden, problem.head] if form == "token" else problem.leaves


def _naive(problem: Problem, form: str) -> tuple[Tensor, list[Tensor]]:
    """(values [T], gradients) by plain autograd in float64."""
    p = problem
    wide = {leaf: leaf.detach().double().requires_grad_() for leaf in _leaves(p, form)}
    logits = wide[p.hidden] @ wide[p.head].T
    if form == "token":
        values = torch.log_softmax(logits, -1).gather(1, p.targets[:, None]).squeeze(1)
    else:
        logits = logits / p.tau.double()[:, None]
        if form == "support":
            outside = torch.ones_like(logits, dtype=torch.bool)
            outside[rows_of(p.offsets, len(p.ids)), p.ids.long()] = False
            logits = logits.masked_fill(outside, -torch.inf)
        residual = p.noisy.double() - logits.softmax(-1) @ wide[p.embedding]
        values = residual.square().sum(-1) * (-0.5 / p.sigma.double().square())
    return values.detach(), list(torch.autograd.grad((values * p.weights).sum(), list(wide.values())))


def _against_float64(problem: Problem, form: str, shape: str) -> list[Check]:
    values = forward(problem, form)
    found = list(torch.autograd.grad((values * problem.weights).sum(), _leaves(problem, form)))
    exact_values, exact = _naive(problem, form)
    dtype = problem.hidden.dtype
    error = relative(values.detach(), exact_values)
    gradients = max(relative(mine, true) for mine, true in zip(found, exact, strict=True))
    return [
        Check(f"{shape}, {form}: values", error, VALUE_BARS[dtype]),
        Check(f"{shape}, {form}: gradients", gradients, GRADIENT_BARS[dtype]),
        Check(f"{shape}, {form}: elements of the gradients of a zero loss that are not 0", _nonzero(problem, form), 0),
    ]


def _nonzero(problem: Problem, form: str) -> float:
    """Of a filler's gradients, whose weights are all zero; a NaN is not 0."""
    found = torch.autograd.grad((forward(problem, form) * 0.0).sum(), _leaves(problem, form))
    return violations(*(gradient == 0 for gradient in found))


def _differing_runs(problem: Problem) -> float:
    first, second = (torch.autograd.grad(forward(problem, "support").sum(), problem.leaves) for _ in range(2))
    return violations(*(a == b for a, b in zip(first, second, strict=True)))


def _dependent_tokens(problem: Problem) -> float:
    """Of the means: log pi adds up their residuals in torch, which takes another order for another number of rows."""
    p = problem
    together = soft_logprob(p.hidden, p.head, p.embedding, p.noisy, p.ids, p.offsets, p.tau, p.sigma)[1]
    same = []
    for t in range(len(together)):
        row, entries = slice(t, t + 1), slice(int(p.offsets[t]), int(p.offsets[t + 1]))
        ids, offsets = p.ids[entries].clone(), p.offsets[t : t + 2] - p.offsets[t]
        tau, sigma = p.tau[row].clone(), p.sigma[row].clone()
        alone = soft_logprob(p.hidden[row], p.head, p.embedding, p.noisy[row], ids, offsets, tau, sigma)[1]
        same.append(torch.equal(alone[0], together[t]))
    return violations(*same)

"""`softrl bench kernels`: what the learner's log-probabilities cost on this CPU, in time and in memory.

    round 1   token, support, dense, torch     forward and backward of each on the same hidden states, side by side in time,
    round 2   token, support, dense, torch     so a machine that slows down slows down all of them
    ...                                        -> medians of the rounds' ratios to `token`
    then      select + mix of 64 rows          what a step of soft decoding adds to the engine's
    then      each form at 2k, 8k, 32k tokens  in a process of its own -> peak memory above its inputs

`token` is kernels.token_logprob, the ordinary chunked log-probability that every RL learner computes; `support` and `dense` are
the two forms of kernels.soft_logprob; `torch` is torch's own chunked F.linear_cross_entropy, which spares a product by taking
the gradient in the forward pass. Shapes are SmolLM2-135M's, inputs random; supports are as large and as alike as those measured
on GSM8K at tau = 0.5 (1876 steps: 43 tokens on average, 410 at the 99th percentile, 2907 different ones in 256 steps).
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from cluster.live import make_table
from configs.errors import RunError
from kernels.soft_embedding import mix, select_support
from kernels.soft_logprob import soft_logprob, soft_logprob_dense
from kernels.token_logprob import token_logprob

BARS = {"support_over_token": 1.2, "dense_over_token": 1.8, "rows_per_token": 16.0}  # the most that each may be
VOCABULARY, WIDTH = 49152, 576  # SmolLM2-135M, whose head is its embedding
TAU, SIGMA = 0.5, 0.0447  # sigma = 0.33 RMS of its embedding
SUPPORT_LOG_MEAN, SUPPORT_LOG_STD, SUPPORT_MAX = 2.81, 1.38, 741  # of the support sizes: mean 43, 99th percentile 410
COMMON_IDS, COMMON_POWER = 4000, 4  # ids are number COMMON_IDS u^COMMON_POWER, u uniform, of so many spread over the vocabulary
MIXTURE_ROWS, MIXTURE_REPEATS = 64, 20
MEMORY_TOKENS = (2048, 8192, 32768)
MEMORY_FORMS = ("token", "support", "dense")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What T soft steps, or as many answer tokens, bring to a log-probability."""

    hidden: Tensor  # float32 [T, d] wants a gradient
    weight: Tensor  # float32 [V, d] head and embedding; wants a gradient
    noisy: Tensor  # float32 [T, d]
    ids: Tensor  # int32 [N]
    offsets: Tensor  # int64 [T + 1]
    tau: Tensor  # float32 [T]
    sigma: Tensor  # float32 [T]
    targets: Tensor  # int64 [T]


def bench_kernels(
    *, tokens: int = 1024, rounds: int = 5, memory_tokens: tuple[int, ...] = MEMORY_TOKENS, vocabulary: int = VOCABULARY
) -> dict[str, Any]:
    """Ratios at `tokens` tokens, milliseconds of the mixture, and peak memory at each of `memory_tokens`.

    Raises RunError when a form does not fit in memory, or where the peak cannot be read (it is read from Linux's /proc).
    """
    inputs = make_inputs(tokens, vocabulary, WIDTH)
    seconds = _alternate(inputs, rounds)
    memory = {form: {count: measure_peak(form, count, vocabulary) for count in memory_tokens} for form in MEMORY_FORMS}
    return {
        **{f"{form}_over_token": _ratio(seconds, form) for form in ("support", "dense", "torch")},
        "seconds": {form: median(values) for form, values in seconds.items()},
        "rounds": seconds,
        "mixture": _mixture(inputs.weight.detach()),
        "memory": {form: _growth(peaks) for form, peaks in memory.items()},
        "bars": BARS,
        "device": f"{processor()}, {torch.get_num_threads()} threads",
        "dtype": "float32",
        "versions": {"torch": importlib.metadata.version("torch"), "python": platform.python_version()},
        "shape": {"tokens": tokens, "vocabulary": vocabulary, "width": WIDTH, "tied": True},
        "support": {"tau": TAU, "mean": len(inputs.ids) / tokens, "max": int(inputs.offsets.diff().max())},
    }


def print_kernels(figures: dict[str, Any], console: Console | None = None) -> None:
    """The figures as tables."""
    console = console or Console()
    shape, bars = figures["shape"], figures["bars"]
    console.print(
        f"log-probabilities of {shape['tokens']} tokens, V = {shape['vocabulary']:,}, d = {shape['width']}, tied, float32, "
        f"on {figures['device']}",
        highlight=False,
        soft_wrap=True,
    )
    rows = []
    for form, label in (
        ("token", "token"),
        ("support", "soft, recorded support"),
        ("dense", "soft, whole vocabulary"),
        ("torch", "token, torch's own"),
    ):
        key = f"{form}_over_token"
        ratio = f"{figures[key]:.2f}" if key in figures else "1"
        rows.append([label, f"{figures['seconds'][form]:.2f}", ratio, f"{bars[key]:.1f}" if key in bars else ""])
    console.print(make_table("", ["forward + backward", "s", "of token", "bar"], rows))
    sizes = list(figures["memory"]["token"]["peak_bytes"])
    peaks = [
        [form, *(f"{memory['peak_bytes'][size] / 2**20:,.0f}" for size in sizes), f"{memory['rows_per_token']:.1f}"]
        for form, memory in figures["memory"].items()
    ]
    header = [
        "peak MiB above the inputs",
        *(f"{int(size):,} tokens" for size in sizes),
        f"rows/token (bar {bars['rows_per_token']:g})",
    ]
    console.print(make_table("", header, peaks))
    mixture = figures["mixture"]
    console.print(
        f"mixture of {mixture['rows']} rows: {mixture['milliseconds']:.1f} ms (select {mixture['select_milliseconds']:.1f}), "
        f"{mixture['support_mean']:.0f} tokens a row",
        highlight=False,
    )


# Inputs


def make_inputs(tokens: int, vocabulary: int, width: int, seed: int = 0) -> Inputs:
    """Random inputs with logits like a language model's: most within some 2 of 0, a few near 20."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(vocabulary, width, generator=g) * (SIGMA / 0.33)
    targets = torch.randint(0, vocabulary, (tokens,), generator=g)
    hidden = 1.7 * weight[targets] + 0.64 * torch.randn(tokens, width, generator=g)
    noisy = weight[targets] + SIGMA * torch.randn(tokens, width, generator=g)
    ids, offsets = make_supports(tokens, vocabulary, g)
    return Inputs(
        hidden=hidden.requires_grad_(),
        weight=weight.requires_grad_(),
        noisy=noisy,
        ids=ids,
        offsets=offsets,
        tau=torch.full((tokens,), TAU),
        sigma=torch.full((tokens,), SIGMA),
        targets=targets,
    )


def make_supports(rows: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(ids int32 [N] ascending within a row, offsets int64 [R + 1]) of supports with measured sizes and overlap."""
    common = min(COMMON_IDS, vocabulary)
    sizes = torch.empty(rows).log_normal_(SUPPORT_LOG_MEAN, SUPPORT_LOG_STD, generator=generator)
    supports = []
    for size in sizes.round().clamp(1, min(SUPPORT_MAX, common)).int().tolist():
        chosen = torch.empty(0, dtype=torch.int64)
        while len(chosen) < size:  # an id that comes twice counts once
            drawn = (torch.rand(size - len(chosen), generator=generator).pow(COMMON_POWER) * common).long()
            chosen = torch.cat((chosen, drawn)).unique()
        supports.append((chosen * (vocabulary // common)).int())
    counts = torch.tensor([len(support) for support in supports])
    return torch.cat(supports), F.pad(counts.cumsum(0), (1, 0))


# Time


def run(form: str, inputs: Inputs) -> None:
    """Forward and backward of one form; the gradients are dropped."""
    i = inputs
    if form == "token":
        logprob = token_logprob(i.hidden, i.weight, i.targets)[0].sum()
    elif form == "support":
        logprob = soft_logprob(i.hidden, i.weight, i.weight, i.noisy, i.ids, i.offsets, i.tau, i.sigma)[0].sum()
    elif form == "dense":
        logprob = soft_logprob_dense(i.hidden, i.weight, i.weight, i.noisy, i.tau, i.sigma)[0].sum()
    else:
        options = torch.nn.LinearCrossEntropyOptions()
        logprob = -F.linear_cross_entropy(i.hidden, i.weight, i.targets, reduction="sum", options=options)
    torch.autograd.grad(logprob, (i.hidden, i.weight))


def _alternate(inputs: Inputs, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round, after one that warms up."""
    forms = ("token", "support", "dense", "torch")
    seconds: dict[str, list[float]] = {form: [] for form in forms}
    for round_ in range(rounds + 1):
        for form in forms:
            elapsed = _seconds(partial(run, form, inputs))
            if round_ > 0:
                seconds[form].append(elapsed)
    return seconds


def _ratio(seconds: dict[str, list[float]], form: str) -> float:
    return median(mine / token for mine, token in zip(seconds[form], seconds["token"], strict=True))


def _mixture(weight: Tensor) -> dict[str, Any]:
    """Milliseconds to select the supports of MIXTURE_ROWS rows of float32 logits and to mix the embeddings."""
    g = torch.Generator().manual_seed(1)
    vocabulary = len(weight)
    ids, offsets = make_supports(MIXTURE_ROWS, vocabulary, g)
    rows = torch.repeat_interleave(offsets.diff())
    logits = torch.randn(MIXTURE_ROWS, vocabulary, generator=g) * 2.2
    # The tokens of a support have probabilities from 1 to 1e-6 in equal parts of their logarithm.
    logits[rows, ids.long()] = 20.0 + TAU * torch.rand(len(ids), generator=g) * torch.tensor(1e-6).log()
    tau = torch.full((MIXTURE_ROWS,), TAU)
    support = select_support(logits, tau)
    select, both = [], []
    for _ in range(MIXTURE_REPEATS):
        select.append(_seconds(lambda: select_support(logits, tau)))
        both.append(select[-1] + _seconds(lambda: mix(support.ids, support.probs, support.offsets, weight, torch.float32)))
    return {
        "rows": MIXTURE_ROWS,
        "milliseconds": 1e3 * median(both),
        "select_milliseconds": 1e3 * median(select),
        "support_mean": len(support.ids) / MIXTURE_ROWS,
    }


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# Memory


def measure_peak(form: str, tokens: int, vocabulary: int) -> int:
    """Bytes that forward and backward of `form` need above their inputs, measured in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_peak_of_form, form, tokens, vocabulary, torch.get_num_threads()).result()
        except BrokenProcessPool:
            raise RunError(f"bench: `{form}` at {tokens:,} tokens was killed; this machine has too little memory free") from None


def _peak_of_form(form: str, tokens: int, vocabulary: int, threads: int) -> int:
    torch.set_num_threads(threads)
    inputs = make_inputs(tokens, vocabulary, WIDTH)
    return peak_bytes(lambda: run(form, inputs))


def peak_bytes(work: Callable[[], object]) -> int:
    """How far the process's resident memory rises above what it was. Raises RunError where there is no Linux /proc."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present
        before = _status("VmRSS")
        work()
        return _status("VmHWM") - before
    except OSError as error:
        raise RunError(f"bench: cannot read peak memory ({error}); run it on Linux") from error


def _status(key: str) -> int:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _growth(peaks: dict[int, int]) -> dict[str, Any]:
    """Peaks, and by how many float32 rows of `WIDTH` they grow per token; a row of logits is V / WIDTH such rows."""
    (few, low), (many, high) = list(peaks.items())[-2:]
    return {
        "peak_bytes": {str(tokens): peak for tokens, peak in peaks.items()},
        "rows_per_token": (high - low) / (many - few) / (4 * WIDTH),
    }


def processor() -> str:
    """The CPU's name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

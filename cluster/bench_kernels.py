"""`softrl bench kernels`: what the learner's log-probabilities cost on this CPU, in time and in memory.

    round 1   token, support, dense, torch     forward and backward of each on the same hidden states, side by side in time,
    round 2   token, support, dense, torch     so a machine that slows down slows down all of them
    ...                                        -> medians of the rounds' ratios to `token`
    then      select + mix of 64 rows          what a step of soft decoding adds to the engine's
    then      each form at 2k, 8k, 32k tokens  in a process of its own -> peak memory above its inputs

The forms and their inputs are those of cluster/bench_logprobs.py; shapes are SmolLM2-135M's.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from cluster.bench_logprobs import TAU, Inputs, make_inputs, make_logits, run
from cluster.live import make_table
from configs.errors import RunError
from kernels.soft_embedding import mix, select_support

BARS = {"support_over_token": 1.2, "dense_over_token": 1.8, "rows_per_token": 16.0}  # the most that each may be
VOCABULARY, WIDTH = 49152, 576  # SmolLM2-135M, whose head is its embedding
MIXTURE_ROWS, MIXTURE_REPEATS = 64, 20
MEMORY_TOKENS = (2048, 8192, 32768)
MEMORY_FORMS = ("token", "support", "dense")


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
        "mixture": _mixture(inputs.head.detach()),
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


# Time


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
    logits = make_logits(MIXTURE_ROWS, len(weight), torch.Generator().manual_seed(1))
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

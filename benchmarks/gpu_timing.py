"""gpu_check's timings: the device's own peaks, each kernel against its roofline and its dense form, the learner's memory.

A roofline is the larger of bytes over the bandwidth of a copy and FLOPs over the rate of a bf16 product, both measured here in the
same run; the datasheet's numbers stand beside them. Bars are those that the design was given for an H100.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_plan import FULL, THRESHOLD, Setting, captured, through_triton
from cluster.bench_logprobs import GAMMA, RMS_OF_WIDTH, TAU, Inputs, forward, make_inputs, make_logits, run
from kernels import matmul, segments, triton_noise, triton_segments, triton_select, triton_soft_embedding, triton_softmax
from kernels.noise import STREAM_SOFT

try:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
except ImportError:  # optional
    LigerFusedLinearCrossEntropyLoss = None

Figures = dict[str, Any]

DATASHEET = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}  # SXM: bytes/s, dense bf16 FLOP/s
WARM_UP, FEWEST, MOST = 3, 5, 200  # runs of what is timed
FLUSH_BYTES = 256 << 20  # several times an L2 cache
MIXTURE_BARS = {1: 20e-6, 32: 35e-6, 256: 130e-6}  # seconds by rows
NOISE_BAR = 10e-6  # what the noise adds to 256 rows
LOGPROB_BARS = {("support", "both"): 30e-3, ("dense", "forward"): 55e-3, ("dense", "both"): 200e-3}  # at FULL.tokens
DENSE_OVER_TOKEN_BAR = 1.9
ROWS_PER_TOKEN_BAR = 16.0  # memory that grows with T, in float32 rows of d; a row of logits is 31
TRANSIENT_BAR = 2e9  # bytes that the dense forward pass needs at the fewest tokens
CHUNK = 1024  # tokens whose logits are alive at once: the default of the log-probabilities


# Clocks


def seconds_of(work: Callable[[], object], setting: Setting, cold: bool = False) -> float:
    """Median seconds of one run on the device. `cold`: the L2 cache is overwritten before each."""
    if not setting.on_gpu:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=setting.device) if cold else None

    def timed(runs: int) -> list[float]:
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
        for begin, end in events:
            if flush is not None:
                flush.zero_()
            begin.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    typical = median(timed(WARM_UP))
    return median(timed(max(FEWEST, min(MOST, int(setting.scale.seconds / max(typical, 1e-7))))))


def kernel_seconds(work: Callable[[], object], setting: Setting) -> float:
    """Of work that never waits for the device: as a CUDA graph, so that no launch is waited for either, with a cold cache."""
    return seconds_of(captured(work, setting.device), setting, cold=True)


def peak_bytes(work: Callable[[], object], setting: Setting) -> int:
    """How far the tensors on the GPU rise above what they were; 0 where there is no GPU."""
    if not setting.on_gpu:
        work()
        return 0
    free_memory(setting)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory(setting: Setting) -> None:
    """Give back what no tensor holds."""
    gc.collect()
    if setting.on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@dataclass(frozen=True, slots=True)
class Peaks:
    """What the device reaches where nothing but it is the limit."""

    bytes_per_s: float  # a copy, bytes read and written
    flops_per_s: float  # a bf16 product

    def roofline(self, moved: float, flops: float) -> float:
        """Seconds."""
        return max(moved / self.bytes_per_s, flops / self.flops_per_s)


def measure_peaks(setting: Setting) -> Peaks:
    """By a copy of 2 GiB and a product of 8192^3; smaller ones where there is no GPU."""
    size, side = (1 << 31, 8192) if setting.on_gpu else (1 << 16, 64)
    source = torch.empty(size, dtype=torch.int8, device=setting.device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), setting)
    left, right = torch.randn(2, side, side, device=setting.device).bfloat16()
    product = seconds_of(lambda: left @ right, setting)
    return Peaks(2 * size / copy, 2 * side**3 / product)


def figure(name: str, seconds: float, peaks: Peaks, moved: float = 0.0, flops: float = 0.0, bar: float | None = None) -> Figures:
    """One line of the report: seconds, the work, its roofline, and the bar where there is one."""
    roofline = peaks.roofline(moved, flops)
    found: Figures = {"name": name, "seconds": seconds, "bytes": moved, "flops": flops, "roofline": roofline}
    found["of_roofline"] = roofline / seconds
    return found if bar is None else found | {"bar": bar, "met": seconds <= bar}


def bar_of(name: str, value: float, bar: float) -> Figures:
    """A bar that is no time of one line: the most that `value` may be."""
    return {"name": name, "value": value, "bar": bar, "met": value <= bar}


def against(found: Figures, what: str, seconds: float) -> Figures:
    """The figure beside another way to the same end: how many times as long that takes."""
    return found | {"against": what, "against_seconds": seconds, "speed_up": seconds / found["seconds"]}


# The rollout's side


def time_rollout(setting: Setting) -> Figures:
    """Noise, selection, gather, and the two of them in a CUDA graph as a decoding step runs them."""
    peaks = measure_peaks(setting)
    s, device = setting.scale, setting.device
    rows = s.tokens
    order = torch.arange(rows, device=device)
    seconds = kernel_seconds(lambda: triton_noise.normal_rows(order, order, s.width), setting)
    normals = figure(f"noise, {rows:,} x {s.width:,}", seconds, peaks, 4 * rows * s.width)
    lines = [against(normals, "torch.randn", kernel_seconds(lambda: torch.randn(rows, s.width, device=device), setting))]
    embedding = (torch.randn(s.vocabulary, s.width, device=device) * RMS_OF_WIDTH / s.width**0.5).bfloat16()
    for batch in s.batches:
        lines += _time_mixture(setting, peaks, batch, embedding)
    return {"peaks": _described(peaks), "timings": lines}


def _described(peaks: Peaks) -> Figures:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    sheet = next((numbers for model, numbers in DATASHEET.items() if model in name), None)
    found: Figures = {"copy_bytes_per_s": peaks.bytes_per_s, "bf16_flops_per_s": peaks.flops_per_s}
    return found | ({} if sheet is None else {"datasheet_bytes_per_s": sheet[0], "datasheet_bf16_flops_per_s": sheet[1]})


def _time_mixture(setting: Setting, peaks: Peaks, batch: int, embedding: Tensor) -> list[Figures]:
    device, (vocabulary, width) = setting.device, embedding.shape
    logits = make_logits(batch, vocabulary, torch.Generator().manual_seed(batch)).to(device)
    tau, order = torch.full((batch,), TAU, device=device), torch.arange(batch, device=device)
    keys = torch.full((batch,), GAMMA * RMS_OF_WIDTH / width**0.5, device=device), order, order
    support = triton_select.allocate(batch, vocabulary, triton_select.CAPACITY, device)
    fed = torch.empty(batch, width, dtype=torch.bfloat16, device=device)

    def select() -> None:
        triton_select.select(support, logits, tau, THRESHOLD)

    def gather() -> None:
        triton_soft_embedding.soft_embeddings(support, logits, tau, embedding, *keys, fed)

    def both() -> None:
        select()
        gather()

    def dense() -> Tensor:
        return torch.softmax(logits / tau[:, None], -1).bfloat16() @ embedding

    select()
    entries = int(support.counts.sum())
    logit_bytes, row_bytes = 4.0 * batch * vocabulary, 2.0 * width * (entries + batch)
    selection, gathering, mixture, densely = (kernel_seconds(work, setting) for work in (select, gather, both, dense))
    bar = MIXTURE_BARS.get(batch) if setting.on_gpu else None
    name = f"{batch} rows, {entries / batch:.0f} tokens a row"
    product = 2.0 * batch * vocabulary * width
    lines = [
        figure(f"select, {name}", selection, peaks, logit_bytes),
        figure(f"gather and noise, {name}", gathering, peaks, row_bytes),
        against(figure(f"mixture, {name}", mixture, peaks, logit_bytes + row_bytes, bar=bar), "softmax(z / tau) E", densely),
        figure(f"softmax(z / tau) E, {batch} rows", densely, peaks, 2.0 * vocabulary * width + logit_bytes, product),
    ]
    if batch == max(setting.scale.batches):
        lines.append(_time_noise_of_gather(setting, peaks, support, embedding, keys, fed))
    lines[2]["dropped_mass_largest"] = float(support.dropped_mass.max())
    lines[2]["overflows"] = int(support.overflow.sum())
    return lines


def _time_noise_of_gather(
    setting: Setting,
    peaks: Peaks,
    support: triton_select.FixedSupport,
    embedding: Tensor,
    keys: tuple[Tensor, Tensor, Tensor],
    fed: Tensor,
) -> Figures:
    """The gather from a record with noise less the one without: the kernel alone, because its checks wait for the device."""
    counts, capacity = support.counts.long(), support.ids.shape[1]
    used = torch.arange(capacity, device=setting.device) < counts[:, None]
    ids, probs, offsets = support.ids[used], support.probs[used], F.pad(counts.cumsum(0), (1, 0))
    grid = triton_soft_embedding._grid(fed)

    def gather(noise: bool) -> None:
        triton_soft_embedding._embed_csr[grid](
            ids, probs, offsets, embedding, *embedding.shape, *keys, fed,
            DTYPE=triton_soft_embedding.FLOATS[fed.dtype], NOISE=noise, STREAM=STREAM_SOFT, **triton_soft_embedding.LAUNCH,
        )  # fmt: skip

    noisy, plain = (kernel_seconds(partial(gather, noise), setting) for noise in (True, False))
    bar = NOISE_BAR if setting.on_gpu else None
    return figure(f"what noise adds to the gather of {len(fed)} rows", max(noisy - plain, 1e-9), peaks, bar=bar)


# The learner's side


def time_learner_kernels(setting: Setting) -> Figures:
    """The stages of a chunk, the gathers of ragged rows, and the log-probabilities that are made of them."""
    peaks = measure_peaks(setting)
    s = setting.scale
    inputs = make_inputs(s.tokens, s.vocabulary, s.width, tied=False, dtype=torch.bfloat16, device=setting.device)
    with through_triton(setting):
        lines = [*_time_chunk(setting, peaks, inputs), *_time_ragged(setting, peaks, inputs)]
        free_memory(setting)
        lines += _time_logprobs(setting, peaks, inputs)
    figures = {"peaks": _described(peaks), "timings": lines, "support_mean": len(inputs.ids) / s.tokens, "tokens": s.tokens}
    if setting.on_gpu:
        (dense,) = (line for line in lines if line["name"].startswith("dense, forward + backward"))
        figures["bars"] = [bar_of("dense over token, forward + backward", 1 / dense["speed_up"], DENSE_OVER_TOKEN_BAR)]
    return figures


def _time_chunk(setting: Setting, peaks: Peaks, inputs: Inputs) -> list[Figures]:
    """Products and stages of one chunk of the dense form. Bytes as kernels/triton_softmax.py counts them."""
    head, hidden = inputs.head.detach(), inputs.hidden.detach()[:CHUNK]
    tau, targets = inputs.tau[: len(hidden)], inputs.targets[: len(hidden)]
    logits = matmul.wide_mm(hidden, head.T)
    fine = matmul.fine_factor(torch.bfloat16)
    weights, total, peak = triton_softmax.softmax_weights(logits, tau, fine)
    d_probs = torch.randn_like(logits)
    log_total = triton_softmax.token_statistics(logits, targets, tau)[2]
    table, inner = head.to(fine), hidden.to(fine)
    sums = torch.zeros(head.shape, device=setting.device)
    size, product = float(logits.numel()), 2.0 * logits.numel() * head.shape[1]
    torch_softmax = kernel_seconds(lambda: torch.softmax(logits, -1), setting)
    torch_logs = kernel_seconds(lambda: torch.log_softmax(logits, -1), setting)

    def timed(name: str, work: Callable[[], object], moved: float = 0.0, flops: float = 0.0) -> Figures:
        return figure(f"{name}, chunk of {len(hidden):,}", kernel_seconds(work, setting), peaks, moved, flops)

    return [
        timed("z = H W^T, float32 out", lambda: matmul.wide_mm(hidden, head.T), 4 * size, product),
        timed("w E, float16 in, float32 out", lambda: matmul.wide_mm(weights, table), 2 * size, product),
        timed("dW += dz^T H, float16 in", lambda: matmul.add_mm(sums, weights.T, inner, 0.5), 2 * size, product),
        against(
            timed("softmax_weights", lambda: triton_softmax.softmax_weights(logits, tau, fine), 10 * size),
            "torch.softmax",
            torch_softmax,
        ),
        timed("softmax_weights with peak", lambda: triton_softmax.softmax_weights(logits, tau, fine, peak), 6 * size),
        timed("weight_gradients", lambda: triton_softmax.weight_gradients(weights, total, d_probs), 6 * size),
        against(
            timed("token_statistics", lambda: triton_softmax.token_statistics(logits, targets, tau), 8 * size),
            "torch.log_softmax",
            torch_logs,
        ),
        timed("token_gradient", lambda: triton_softmax.token_gradient(logits, targets, tau, log_total, fine), 6 * size),
    ]


def _time_ragged(setting: Setting, peaks: Peaks, inputs: Inputs) -> list[Figures]:
    """Gathers of the recorded supports. Bytes count every row that an entry names, whether the cache has it or not."""
    head, wide = inputs.head.detach(), inputs.hidden.detach().float()
    ids, offsets, tau = inputs.ids, inputs.offsets, inputs.tau
    rows, count, (tokens, width) = segments.rows_of(offsets, len(ids)), float(len(ids)), wide.shape
    dots = triton_segments.entry_dots(wide, rows, head, ids)
    probs = triton_segments.segment_softmax(dots, tau, offsets)

    def timed(name: str, work: Callable[[], object], moved: float) -> Figures:
        return figure(f"{name}, {tokens:,} tokens", kernel_seconds(work, setting), peaks, moved)

    gathered, written = 2.0 * count * width, 4.0 * tokens * width
    return [
        timed("entry_dots", lambda: triton_segments.entry_dots(wide, rows, head, ids), gathered + written),
        timed("segment_softmax", lambda: triton_segments.segment_softmax(dots, tau, offsets), 8 * count),
        timed("softmax_gradient", lambda: triton_segments.softmax_gradient(probs, dots, tau, offsets), 12 * count),
        timed("entry_sums", lambda: triton_segments.entry_sums(head, ids, probs, offsets, torch.float32), gathered + written),
    ]


def _time_logprobs(setting: Setting, peaks: Peaks, inputs: Inputs) -> list[Figures]:
    """Forward, and forward with backward, of each form."""
    s = setting.scale
    product, gather = 2.0 * s.tokens * s.vocabulary * s.width, 2.0 * len(inputs.ids) * s.width
    work = {  # (products of T x V x d, bytes) of forward, of both
        "token": ((1, 0.0), (4, 0.0)),
        # Rows of W and E forward; E, W, H and float32 r backward, and dW and dE written.
        "support": ((0, 2 * gather), (0, 7 * gather + 4.0 * s.vocabulary * s.width)),
        "dense": ((2, 0.0), (7, 0.0)),
    }
    lines: dict[tuple[str, str], Figures] = {}
    for form, parts in work.items():
        for part, do, (products, moved) in zip(("forward", "both"), (_no_gradient, run), parts, strict=True):
            seconds = seconds_of(partial(do, form, inputs), setting)
            name = f"{form}, {'forward' if part == 'forward' else 'forward + backward'}, {s.tokens:,} tokens"
            bar = LOGPROB_BARS.get((form, part)) if setting.on_gpu and s.tokens == FULL.tokens else None
            lines[form, part] = figure(name, seconds, peaks, moved, products * product, bar)
            free_memory(setting)
    token = lines["token", "both"]
    for form in ("support", "dense"):
        lines[form, "both"] = against(lines[form, "both"], "token", token["seconds"])
    lines["token", "both"] = _against_torch(setting, token, inputs) | _against_liger(setting, token, inputs)
    return list(lines.values())


def _no_gradient(form: str, inputs: Inputs) -> None:
    with torch.no_grad():
        forward(form, inputs)


def _against_torch(setting: Setting, token: Figures, inputs: Inputs) -> Figures:
    """The token form beside torch's own chunked one where torch has it, else beside logits of all tokens at once."""
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return against(token, "F.linear_cross_entropy", seconds_of(lambda: run("torch", inputs), setting))

    def at_once() -> None:
        loss = F.cross_entropy((inputs.hidden @ inputs.head.T).float(), inputs.targets, reduction="sum")
        torch.autograd.grad(loss, (inputs.hidden, inputs.head))

    try:
        return against(token, "F.cross_entropy of all logits at once", seconds_of(at_once, setting))
    except torch.cuda.OutOfMemoryError:
        return token | {"against": "F.cross_entropy of all logits at once: out of memory"}


def _against_liger(setting: Setting, token: Figures, inputs: Inputs) -> Figures:
    """Seconds of Liger's fused linear cross entropy on the same inputs, and how many times as long as the token form that is."""
    if LigerFusedLinearCrossEntropyLoss is None:
        return {"liger": "liger-kernel is not installed"}
    if not setting.on_gpu:
        return {"liger": "LigerFusedLinearCrossEntropyLoss needs a GPU"}
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    leaves = inputs.hidden, inputs.head

    def liger() -> None:
        torch.autograd.grad(loss(inputs.head, inputs.hidden, inputs.targets), leaves)

    seconds = seconds_of(liger, setting)
    return {"liger": "LigerFusedLinearCrossEntropyLoss", "liger_seconds": seconds, "liger_speed_up": seconds / token["seconds"]}


# Memory


def measure_memory(setting: Setting) -> Figures:
    """Peak bytes of each form above its inputs, and by how many float32 rows of d they grow per token."""
    s = setting.scale
    peaks: dict[str, dict[str, int]] = {form: {} for form in ("token", "support", "dense", "dense forward")}
    for tokens in s.memory_tokens:
        inputs = make_inputs(tokens, s.vocabulary, s.width, tied=False, dtype=torch.bfloat16, device=setting.device)
        with through_triton(setting):
            for form in ("token", "support", "dense"):
                run(form, inputs)  # cuBLAS's workspace, which stays, is not the form's
                peaks[form][str(tokens)] = peak_bytes(partial(run, form, inputs), setting)
            peaks["dense forward"][str(tokens)] = peak_bytes(partial(_no_gradient, "dense", inputs), setting)
        del inputs
        free_memory(setting)
    few, many = s.memory_tokens[-2:]
    growth = {form: (peak[str(many)] - peak[str(few)]) / (many - few) / (4 * s.width) for form, peak in peaks.items()}
    figures: Figures = {"peak_bytes": peaks, "rows_per_token": growth, "rows_per_token_of_logits": s.vocabulary / s.width}
    if setting.on_gpu:
        transient = peaks["dense forward"][str(s.memory_tokens[0])]
        figures["bars"] = [
            bar_of("float32 rows of d that memory grows by per token", max(growth.values()), ROWS_PER_TOKEN_BAR),
            bar_of(f"bytes above its inputs of dense, forward, {s.memory_tokens[0]:,} tokens", transient, TRANSIENT_BAR),
        ]
    return figures

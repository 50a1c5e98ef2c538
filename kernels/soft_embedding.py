"""Noisy soft tokens: h~ = p E + sigma eps, p = softmax(z / tau) (paper, section 3), on the support that is recorded.

```
 logits [R, V] -- tile maxima --> elements of hot tiles -- p > threshold --> ids, probs (CSR)       select_support
 ids, probs, E --------------------------------------- sum of p_v E_v --> mean [R, n0]              mix
 mean + sigma * noise(seed, position) ---------------- rounded once ----> h~   [R, n0]              rebuild
```

**The policy is defined on the support** S = {v : p_v > 1e-6}, renormalised: 43 tokens on average at tau = 0.5 where the whole
vocabulary has 49152, with a mean that is 21 times closer to the dense one than a top-64's at the 99th percentile. The learner
evaluates that same policy, so truncation is no approximation; what lies outside is reported as dropped mass.

**Two levels.** One pass over the logits finds the maximum of every 128 of them; the elements of the few tiles whose maximum
reaches the threshold are all that is looked at again.

**Screen and rescore.** Logits rounded to bf16 move the mean by 0.4 sigma and make exact ties common. With bf16 logits the tiles
only screen, with a margin that covers the rounding; the candidates' logits are then recomputed as float32 dot products of the
hidden state with gathered head rows, and threshold, argmax and softmax use those.

On a GPU the work is done by kernels.triton_select (from float32 logits) and kernels.triton_soft_embedding, which also have forms
that allocate nothing and wait for nothing, for an engine's CUDA graph.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.checks import (
    FLOATS,
    check_noise,
    check_rebuild,
    check_record,
    require_dtype,
    require_every,
    require_positive,
    require_same_device,
    require_shape,
)
from kernels.noise import STREAM_SOFT, normal_rows
from kernels.segments import entry_dots, segment_max, segment_sum, weighted_rows

TILE = 128  # logits per tile of the first level
SCAN_ELEMENTS = 1 << 21  # logits scanned at once on a CPU: 8 MB stay in its cache
MIX_ENTRIES = 1 << 12  # embedding rows gathered at once on a CPU (whole rows of the batch, at least one): they stay in its cache
RMS_ROWS = 1 << 13  # embedding rows squared at once

# A bf16 logit is off by at most 2**-8 of its magnitude; the threshold, through the normaliser, by as much again. Twice that is
# the margin, because some GEMMs also round their partial sums.
SCREEN_MARGIN = 4 * 2.0**-8


@dataclass(frozen=True, slots=True)
class SupportBatch:
    """The recorded supports of R rows with N entries in all, in CSR form. A bad row (see `bad_rows`) has no entries."""

    ids: Tensor  # int32 [N] ascending within a row
    probs: Tensor  # float32 [N] renormalised: each row sums to 1
    offsets: Tensor  # int64 [R + 1]
    dropped_mass: Tensor  # float32 [R] probability outside the support, before renormalisation
    top_ids: Tensor  # int64 [R] the most probable token; the lowest id among exact ties; 0 in a bad row


class Candidates(NamedTuple):
    """The tokens that may belong to the supports of R rows, N in all, by row, then by id."""

    rows: Tensor  # int64 [N]
    ids: Tensor  # int64 [N]
    logits: Tensor  # float32 [N] as they were given
    counts: Tensor  # int64 [R] candidates of each row
    log_outside: Tensor  # float64 [R] ln of the sum of exp(z / tau) over the row's other tokens


def bad_rows(logits: Tensor) -> Tensor:
    """bool [R]: rows of logits [R, V] that define no distribution: a NaN, a +inf, or nothing above -inf."""
    return ~logits.amax(-1).isfinite()


def select_support(
    logits: Tensor, tau: Tensor, hidden: Tensor | None = None, head: Tensor | None = None, threshold: float = 1e-6
) -> SupportBatch:
    """The tokens with softmax(logits / tau) > threshold, per row; the most probable ones always belong.

    logits [R, V] float32, or bf16 with hidden [R, d] and head [>= V, d] to rescore from; tau float32 [R] above 0 (1e-4 is
    fine). A logit of -inf (vocabulary padding) is never selected. A row's result does not depend on the other rows.
    Raises ValueError on wrong shapes, dtypes or devices, a tau not above 0 (for which it waits for the device), or bf16 logits
    without hidden and head; not for a bad row.
    """
    _check_logits(logits, tau, threshold)
    if logits.dtype != torch.float32:
        if hidden is None or head is None:
            raise ValueError("logits: bfloat16 without hidden and head, expected both (to rescore from) or float32 logits")
        _check_rescore(hidden, head, len(logits), logits, "logits")
        if len(head) < logits.shape[1]:
            raise ValueError(f"head: shape {list(head.shape)}, expected a row for each of the {logits.shape[1]} logits")
    if logits.is_cuda and logits.dtype == torch.float32:
        from kernels import triton_select  # not at the top: a CPU needs no Triton

        return triton_select.select_support(logits, tau.contiguous(), threshold)
    found = screen(logits, tau, threshold)
    if logits.dtype == torch.float32:
        return settle(found, found.logits, tau, threshold)
    assert hidden is not None and head is not None
    return settle(found, rescore(found.rows, found.ids, hidden, head), tau, threshold)


@torch.no_grad()
def screen(logits: Tensor, tau: Tensor, threshold: float = 1e-6) -> Candidates:
    """The first half of `select_support`, from its arguments: all that a second look at their logits may select."""
    _check_logits(logits, tau, threshold)
    ragged = -logits.shape[1] % TILE
    tiles = (F.pad(logits, (0, ragged), value=-math.inf) if ragged else logits).unflatten(1, (-1, TILE))
    unit = tau * math.log(2.0)  # exp(z / tau) = 2**(z / unit): on a CPU where torch's exp is MKL's, it takes four times as long
    tile_max, tile_sum = _scan(tiles, unit)
    peak, log_total = tile_max.amax(-1), tile_sum.sum(-1).log()
    # Below 0, never 0: even a top probability under the threshold stays selected.
    cut = (tau * (log_total + math.log(threshold))).clamp_max(-torch.finfo(torch.float32).tiny)
    if logits.dtype != torch.float32:
        cut -= SCREEN_MARGIN * torch.maximum(peak.abs(), (peak + cut).abs())

    row, tile = (tile_max - peak[:, None] > cut[:, None]).nonzero(as_tuple=True)
    values = tiles[row, tile].float()
    below_peak = values - peak[row, None]
    chosen = below_peak > cut[row, None]  # never a NaN
    hit, lane = chosen.nonzero(as_tuple=True)
    # The mass of all other tokens is summed as such: as 1 less that of the candidates it would have no digits.
    tile_sum[row, tile] = below_peak.div_(unit[row, None]).exp2_().masked_fill_(chosen, 0.0).sum(-1)
    log_outside = tile_sum.double().sum(-1).log() + peak.double() / tau.double()
    rows = row[hit]
    return Candidates(rows, tile[hit] * TILE + lane, values[hit, lane], torch.bincount(rows, minlength=len(logits)), log_outside)


def rescore(rows: Tensor, ids: Tensor, hidden: Tensor, head: Tensor) -> Tensor:
    """The logits of candidates anew: hidden[rows[i]] . head[ids[i]] in float32, [N]; hidden [R, d], head [>= V, d].

    rows, ids int64 [N]. Raises ValueError on wrong shapes, dtypes or devices.
    """
    require_shape("rows", rows, (None,), "[N]")
    require_shape("ids", ids, (len(rows),), "[N]")
    require_dtype("rows", rows, torch.int64)
    require_dtype("ids", ids, torch.int32, torch.int64)
    _check_rescore(hidden, head, None, rows, "rows")
    require_same_device("ids", ids, "rows", rows)
    return entry_dots(hidden.float(), rows, head, ids)


def mix(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """The mean of each row's soft embedding: float32 [R, n0] = sum over the row's support, in id order, of p_v E_v.

    ids int32 or int64 [N], probs float32 [N], offsets int64 [R + 1]; embedding [V, n0], whose rows are first rounded to `dtype`,
    the engine's, so that a learner with float32 masters sees what the engine saw. Deterministic; the bits of a row do not depend
    on the other rows. An empty row is 0. Raises ValueError on wrong shapes, dtypes, devices, ids or offsets, and on
    entries of no mass, before any work; to see the values it waits for the device.
    """
    if embedding.is_cuda:
        from kernels import triton_soft_embedding

        return triton_soft_embedding.mix(ids, probs, offsets, embedding, dtype)
    check_record(ids, probs, offsets, embedding, dtype)
    return _mix(ids, probs, offsets, embedding, dtype)


def _mix(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """`mix` on a CPU."""
    if embedding.dtype == dtype == torch.float32:
        return weighted_rows(embedding, ids, probs, offsets)
    means = torch.empty(len(offsets) - 1, embedding.shape[1], dtype=torch.float32, device=embedding.device)
    for rows, entries in _row_blocks(offsets, len(ids)):
        gathered = embedding.index_select(0, ids[entries]).to(dtype).float()
        order = torch.arange(len(gathered), device=ids.device)
        block = offsets[rows.start : rows.stop + 1] - entries.start
        means[rows] = weighted_rows(gathered, order, probs[entries], block)
    return means


def rebuild(
    ids: Tensor,
    probs: Tensor,
    offsets: Tensor,
    embedding: Tensor,
    sigma: Tensor,
    seeds: Tensor,
    positions: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The soft embeddings [R, n0] in `dtype`: mix + sigma * noise in float32, rounded once (paper, section 3).

    The engine makes its next input with this call and the learner repeats it: same record, same bits. sigma float32 [R] is the
    standard deviation per coordinate (0: no noise); seeds, positions int64 [R] as for `normal_rows`; the rest as for `mix`.
    Raises ValueError as `mix` does, and on a sigma below 0.
    """
    if embedding.is_cuda:
        from kernels import triton_soft_embedding

        keys = (sigma.contiguous(), seeds.contiguous(), positions.contiguous())
        return triton_soft_embedding.rebuild(ids, probs, offsets, embedding, *keys, dtype)
    check_rebuild(ids, probs, offsets, embedding, sigma, seeds, positions, dtype)
    return add_noise(_mix(ids, probs, offsets, embedding, dtype), sigma, seeds, positions, dtype)


def add_noise(mean: Tensor, sigma: Tensor, seeds: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """The last step of `rebuild`, from the mean float32 [R, n0], which is overwritten: [R, n0] in `dtype`.

    Raises ValueError on wrong shapes, dtypes or devices. Values are not looked at: an engine's step must not wait for its GPU.
    """
    require_shape("mean", mean, (None, None), "[R, n0]")
    require_dtype("mean", mean, torch.float32)
    check_noise(sigma, seeds, positions, len(mean), mean, "mean")
    # Two roundings, product and sum: a fused multiply-add would differ between devices.
    noise = normal_rows(seeds, positions, mean.shape[1], STREAM_SOFT).mul_(sigma[:, None])
    return mean.add_(noise).to(dtype)


def rms(embedding: Tensor) -> float:
    """RMS over all entries of E [V, n0]: sigma = gamma * RMS(E) (paper, section 4.1).

    In float64: a bf16 or float32 sum over V n0 squares would lose digits that sigma needs. Raises ValueError on a wrong shape or
    dtype, or where there are no entries.
    """
    require_shape("embedding", embedding, (None, None), "[V, n0]")
    require_dtype("embedding", embedding, *FLOATS, torch.float64)
    if not embedding.numel():
        raise ValueError(f"embedding: shape {list(embedding.shape)}, expected entries to average over")
    blocks = embedding.split(RMS_ROWS)  # a float64 copy of a large E would take gigabytes
    return (sum(float(block.double().square().sum()) for block in blocks) / embedding.numel()) ** 0.5


def dense_mean(logits: Tensor, tau: Tensor, embedding: Tensor) -> Tensor:
    """softmax(logits / tau) E over the whole vocabulary, float32 [R, n0]: the paper's own form, the reference for `mix`.

    logits float32 [R, V], tau float32 [R] above 0, embedding [V, n0]. Raises ValueError on wrong shapes, dtypes or devices, or a
    tau not above 0, for which it waits for the device.
    """
    require_shape("embedding", embedding, (None, None), "[V, n0]")
    require_dtype("embedding", embedding, *FLOATS)
    require_shape("logits", logits, (None, len(embedding)), "[R, V]")
    require_dtype("logits", logits, torch.float32)
    require_same_device("embedding", embedding, "logits", logits)
    _check_logits(logits, tau)
    shifted = (logits - logits.amax(-1, keepdim=True)) / tau[:, None]
    return shifted.softmax(-1) @ embedding.float()


def _check_logits(logits: Tensor, tau: Tensor, threshold: float = 1e-6) -> None:
    require_shape("logits", logits, (None, None), "[R, V]")
    require_dtype("logits", logits, torch.float32, torch.bfloat16)
    _check_tau(tau, len(logits), logits, "logits")
    require_every("tau", tau > 0, "above 0")
    require_positive("threshold", threshold)


def _check_tau(tau: Tensor, rows: int, like: Tensor, like_name: str) -> None:
    require_shape("tau", tau, (rows,), "[R]")
    require_dtype("tau", tau, torch.float32)
    require_same_device("tau", tau, like_name, like)


def _check_rescore(hidden: Tensor, head: Tensor, rows: int | None, like: Tensor, like_name: str) -> None:
    require_shape("hidden", hidden, (rows, None), "[R, d]")
    require_shape("head", head, (None, hidden.shape[1]), "[V, d]")
    for name, matrix in (("hidden", hidden), ("head", head)):
        require_dtype(name, matrix, *FLOATS)
        require_same_device(name, matrix, like_name, like)


def _scan(tiles: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each tile, and its sum of 2**((z - peak of the row) / unit): float32 [R, V / TILE] each.

    tiles [R, V / TILE, TILE], unit float32 [R]. Tile sums are too short to be split over threads: their bits do not depend on the
    batch.
    """
    row_count, tile_count, _ = tiles.shape
    tile_max, tile_sum = (torch.empty(row_count, tile_count, device=tiles.device) for _ in range(2))
    block = max(1, SCAN_ELEMENTS // (tile_count * TILE) if tiles.device.type == "cpu" else row_count)
    scratch = torch.empty(min(block, row_count), tile_count, TILE, device=tiles.device)
    for start in range(0, row_count, block):
        part = slice(start, start + block)
        room = scratch[: len(tiles[part])]
        logits = tiles[part] if tiles.dtype == torch.float32 else room.copy_(tiles[part])
        peak = torch.amax(logits, -1, out=tile_max[part]).amax(-1)
        # Relative to the peak first: z / tau itself would lose digits at tau = 1e-4.
        weights = torch.sub(logits, peak[:, None, None], out=room).div_(unit[part, None, None]).exp2_()
        torch.sum(weights, -1, out=tile_sum[part])
    return tile_max, tile_sum


def settle(found: Candidates, values: Tensor, tau: Tensor, threshold: float = 1e-6) -> SupportBatch:
    """The second half of `select_support`: threshold, argmax and softmax of candidates whose logits are `values`, float32 [N].

    tau and threshold as there. Raises ValueError on wrong shapes, dtypes or devices.
    """
    require_shape("values", values, (len(found.ids),), "[N]")
    require_dtype("values", values, torch.float32)
    require_same_device("values", values, "found", found.ids)
    _check_tau(tau, len(found.counts), found.ids, "found")
    require_positive("threshold", threshold)
    rows, ids, counts, log_outside = found.rows, found.ids, found.counts, found.log_outside
    tau = tau.double()
    peak = segment_max(values, _offsets(counts))
    weights = ((values - peak[rows]).double() / tau[rows]).exp_()
    rest = (log_outside - peak.double() / tau).exp()
    total = segment_sum(weights, _offsets(counts)) + rest
    keep = (weights > threshold * total[rows]) | (values == peak[rows])

    top_ids = torch.full_like(counts, torch.iinfo(torch.int64).max)
    top_ids.scatter_reduce_(0, rows, torch.where(values == peak[rows], ids, top_ids[rows]), "amin")
    rows, ids, weights = rows[keep], ids[keep], weights[keep]
    kept_counts = torch.bincount(rows, minlength=len(counts))
    offsets = _offsets(kept_counts)
    kept = segment_sum(weights, offsets)
    good = kept_counts > 0
    return SupportBatch(
        ids=ids.int(),
        probs=(weights / kept[rows]).float(),
        offsets=offsets,
        dropped_mass=torch.where(good, (total - kept) / total, 0.0).float(),
        top_ids=torch.where(good, top_ids, 0),
    )


def _offsets(counts: Tensor) -> Tensor:
    """int64 [R] entries per row -> CSR offsets [R + 1]."""
    return F.pad(counts.cumsum(0), (1, 0))


def _row_blocks(offsets: Tensor, entries: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive (rows, entries) of at most MIX_ENTRIES entries, or of one row."""
    row_count = len(offsets) - 1
    if entries <= MIX_ENTRIES:
        yield slice(0, row_count), slice(0, entries)
        return
    bounds = offsets.tolist()
    first = 0
    for row in range(1, row_count + 1):
        if row == row_count or bounds[row + 1] - bounds[first] > MIX_ENTRIES:
            yield slice(first, row), slice(bounds[first], bounds[row])
            first = row

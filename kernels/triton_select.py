"""The supports of a batch selected on a GPU, at fixed addresses: nothing is allocated, nothing waits for the host.

```
 logits [R, V] --stats--> maximum and sum of every 64 logits, of every 4096        the one full read of the logits
               --count--> how many tokens of each 4096 belong, and their mass      only tiles that hold some are read again
               --write--> ids, probs [R, K], counts, dropped mass, top ids         the same tiles
```

All three are launched on a grid of (row, block of 4096 logits), whatever R is: a row's bits do not depend on the other rows.
Every sum has a fixed order and no atomics are used, so two runs give the same bits. Shapes and addresses depend on
`FixedSupport` alone, so the launches can be captured in a CUDA graph.

A row with more than K tokens **overflows**: its list is cut short and it is flagged, but `kernels.triton_soft_embedding` still
mixes all of its support, and `support_batch` still returns all of it. A row with tau 0 is skipped: it has no support.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import require_contiguous, require_dtype, require_positive, require_same_device, require_shape
from kernels.soft_embedding import SupportBatch

TILE = 64  # logits per tile
TILES = 64  # tiles per program: 64 x 64 logits, 16 KB, so one row of 128k is read by 32 programs
BLOCK = TILES * TILE
STEP = 16  # tiles looked at together where few are hot: 64 at once would need the registers of three programs
WARPS = 4
CAPACITY = 1024  # tokens a row has room for: at tau = 0.5 the 99th percentile is 410 and the largest seen 741


@dataclass(frozen=True, slots=True)
class FixedSupport:
    """Room for the supports of up to R rows, K entries each, and what is computed on the way. Made by `allocate`.

    T and B are the tiles and blocks of the vocabulary, rounded up.
    """

    ids: Tensor  # int32 [R, K] ascending; entries from counts[r] on are stale
    probs: Tensor  # float32 [R, K] renormalised over the whole support
    counts: Tensor  # int32 [R] size of the support, which may exceed K; 0 in a bad or skipped row
    overflow: Tensor  # bool [R] counts > K: ids and probs hold only the K lowest ids
    dropped_mass: Tensor  # float32 [R] as in SupportBatch
    top_ids: Tensor  # int64 [R] as in SupportBatch
    peak: Tensor  # float32 [R] the largest logit
    cut: Tensor  # float32 [R] a token belongs if its logit less the peak is above this
    kept: Tensor  # float32 [R] sum over the support of exp((z - peak) / tau)
    tile_max: Tensor  # float32 [R, T]
    tile_sum: Tensor  # float32 [R, T] sum over the tile of exp((z - maximum of its block) / tau)
    block_max: Tensor  # float32 [R, B]
    block_sum: Tensor  # float32 [R, B] sum over the block of exp((z - its maximum) / tau)
    block_count: Tensor  # int32 [R, B] tokens of the support
    block_kept: Tensor  # float32 [R, B] their share of `kept`
    block_dropped: Tensor  # float32 [R, B] the same sum over the tokens that do not belong
    block_top: Tensor  # int32 [R, B] the lowest id at the peak; V if there is none


def allocate(rows: int, vocabulary: int, capacity: int, device: torch.device) -> FixedSupport:
    """Empty supports for up to `rows` rows of `vocabulary` logits with `capacity` entries each.

    With capacity = vocabulary no row can overflow, at 8 bytes an entry. Raises ValueError on a size below 1.
    """
    for name, size in (("rows", rows), ("vocabulary", vocabulary), ("capacity", capacity)):
        require_positive(name, size)
    blocks = triton.cdiv(vocabulary, BLOCK)

    def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.zeros(rows, *shape, dtype=dtype, device=device)

    f32, i32 = torch.float32, torch.int32
    return FixedSupport(
        ids=zeros(i32, capacity), probs=zeros(f32, capacity), counts=zeros(i32), overflow=zeros(torch.bool),
        dropped_mass=zeros(f32), top_ids=zeros(torch.int64), peak=zeros(f32), cut=zeros(f32), kept=zeros(f32),
        tile_max=zeros(f32, blocks * TILES), tile_sum=zeros(f32, blocks * TILES),
        block_max=zeros(f32, blocks), block_sum=zeros(f32, blocks), block_count=zeros(i32, blocks),
        block_kept=zeros(f32, blocks), block_dropped=zeros(f32, blocks), block_top=zeros(i32, blocks),
    )  # fmt: skip


def select(support: FixedSupport, logits: Tensor, tau: Tensor, threshold: float = 1e-6) -> None:
    """Fill the first R rows of `support` with the tokens of softmax(logits / tau) > threshold, as `select_support` does.

    logits float32 [R, V], rows contiguous but possibly strided; tau float32 [R]: above 0, or 0 to skip the row. Three launches
    and no host synchronisation. A probability is within 4e-6 of its float64 value (relative). Raises ValueError before any launch.
    """
    check_batch(support, logits, tau)
    require_positive("threshold", threshold)
    grid = (len(logits), support.block_max.shape[1])
    if not len(logits):
        return
    s = support
    vocabulary, stride = logits.shape[1], logits.stride(0)
    shared = {"TILES": TILES, "TILE": TILE, "num_warps": WARPS, "enable_fp_fusion": False}
    sparse = shared | {"STEP": STEP, "BLOCKS": triton.next_power_of_2(grid[1])}
    _stats[grid](logits, stride, tau, s.tile_max, s.tile_sum, s.block_max, s.block_sum, vocabulary, **shared)
    _count[grid](
        logits, stride, tau, s.tile_max, s.tile_sum, s.block_max, s.block_sum,
        s.peak, s.cut, s.block_count, s.block_kept, s.block_dropped, s.block_top,
        vocabulary, math.log(threshold), **sparse,
    )  # fmt: skip
    _write[grid](
        logits, stride, tau, s.tile_max, s.peak, s.cut, s.block_count, s.block_kept, s.block_dropped, s.block_top,
        s.ids, s.probs, s.counts, s.overflow, s.dropped_mass, s.top_ids, s.kept,
        vocabulary, s.ids.shape[1], **sparse,
    )  # fmt: skip


def select_support(logits: Tensor, tau: Tensor, threshold: float = 1e-6) -> SupportBatch:
    """As `kernels.soft_embedding.select_support` from float32 logits, in new memory. Waits for the device."""
    support = allocate(max(1, len(logits)), logits.shape[1], min(CAPACITY, logits.shape[1]), logits.device)
    select(support, logits, tau, threshold)
    return support_batch(support, logits, tau, threshold)


def support_batch(support: FixedSupport, logits: Tensor, tau: Tensor, threshold: float = 1e-6) -> SupportBatch:
    """The rows that `select` filled from these very arguments, in CSR form and as copies. Waits for the device.

    When rows have overflowed the batch is selected again with room for the largest: the same bits, and all of them.
    Raises ValueError before any launch.
    """
    check_batch(support, logits, tau)
    rows = len(logits)
    largest = int(support.counts[:rows].max()) if rows else 0
    if largest > support.ids.shape[1]:
        support = allocate(rows, logits.shape[1], largest, logits.device)
        select(support, logits, tau, threshold)
    s = support
    return compact(s.ids[:rows], s.probs[:rows], s.counts[:rows], s.dropped_mass[:rows].clone(), s.top_ids[:rows].clone())


def compact(ids: Tensor, probs: Tensor, counts: Tensor, dropped_mass: Tensor, top_ids: Tensor) -> SupportBatch:
    """Rows of a FixedSupport, none of which has overflowed, in CSR form; on any device, for which it waits."""
    used = torch.arange(ids.shape[1], device=ids.device) < counts[:, None]
    return SupportBatch(
        ids=ids[used],
        probs=probs[used],
        offsets=torch.nn.functional.pad(counts.long().cumsum(0), (1, 0)),
        dropped_mass=dropped_mass,
        top_ids=top_ids,
    )


def check_batch(support: FixedSupport, logits: Tensor, tau: Tensor) -> None:
    """Logits and temperatures that fit `support`; ValueError otherwise."""
    require_shape("logits", logits, (None, None), "[R, V]")
    require_dtype("logits", logits, torch.float32)
    if logits.stride(1) != 1:
        raise ValueError(f"logits: strides {list(logits.stride())}, expected contiguous rows (last stride 1)")
    rows, blocks = support.block_max.shape
    if len(logits) > rows or triton.cdiv(logits.shape[1], BLOCK) != blocks:
        expected = f"at most {rows} rows and {(blocks - 1) * BLOCK + 1} to {blocks * BLOCK} columns"
        raise ValueError(f"logits: shape {list(logits.shape)}, expected [R, V] with {expected}, as allocated")
    require_shape("tau", tau, (len(logits),), "[R]")
    require_dtype("tau", tau, torch.float32)
    require_contiguous("tau", tau)
    require_same_device("logits", logits, "support", support.ids)
    require_same_device("tau", tau, "logits", logits)


@triton.jit
def _stats(logits, stride, taus, tile_max, tile_sum, block_max, block_sum, vocabulary, TILES: tl.constexpr, TILE: tl.constexpr):
    """Grid (R, B): maxima, and sums of exp((z - block maximum) / tau), of the 64 tiles of a block and of the block."""
    row, block = tl.program_id(0), tl.program_id(1)
    at = row * tl.num_programs(1) + block
    tau = tl.load(taus + row)
    ids = _tile_ids(block * TILES, TILES, TILE)
    limit = tl.where(tau > 0, vocabulary, 0)  # a skipped row is not read: all -inf, so nothing of it is selected
    z = tl.load(logits + row.to(tl.int64) * stride + ids, mask=ids < limit, other=-float("inf"))
    z = tl.where(z == z, z, float("inf"))  # a NaN must show in the maximum, which would skip it
    maxima = tl.max(z, 1)
    peak = tl.max(maxima, 0)
    base = tl.where(peak > -float("inf"), peak, 0.0)
    # Relative to the peak first: z / tau itself would lose digits at tau = 1e-4.
    sums = tl.sum(tl.exp((z - base) * (1.0 / tl.where(tau > 0, tau, 1.0))), 1)
    tiles = at * TILES + tl.arange(0, TILES)
    tl.store(tile_max + tiles, maxima)
    tl.store(tile_sum + tiles, sums)
    tl.store(block_max + at, peak)
    tl.store(block_sum + at, tl.sum(sums, 0))


@triton.jit
def _count(
    logits, stride, taus, tile_max, tile_sum, block_max, block_sum,
    peaks, cuts, block_count, block_kept, block_dropped, block_top,
    vocabulary, log_threshold, BLOCKS: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (R, B): what of a block belongs to the row's support, and the sums of exp((z - peak) / tau) on either side."""
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    at = row * blocks + block
    tau = tl.load(taus + row)
    tau = tl.where(tau > 0, tau, 1.0)

    i = tl.arange(0, BLOCKS)
    maxima = tl.load(block_max + row * blocks + i, mask=i < blocks, other=-float("inf"))
    sums = tl.load(block_sum + row * blocks + i, mask=i < blocks, other=0.0)
    peak = tl.max(maxima, 0)
    good = (peak > -float("inf")) & (peak < float("inf"))
    total = tl.sum(sums * tl.exp((maxima - peak) / tau), 0)
    # Below 0, never 0: even a top probability under the threshold stays selected. A bad row selects nothing.
    cut = tl.minimum(tau * (tl.log(total) + log_threshold), -1.1754943508222875e-38)
    cut = tl.where(good, cut, float("inf"))

    count, kept, top = 0, 0.0, vocabulary
    last = tl.minimum(block * TILES + TILES, tl.cdiv(vocabulary, TILE))
    relative = tl.load(block_max + at) - peak
    if relative > cut:
        cold_sum, dropped = 0.0, 0.0
        for first in range(block * TILES, last, STEP):
            ids, hot, z = _hot_logits(logits, row, stride, vocabulary, tile_max, blocks * TILES, first, peak, cut, STEP, TILE)
            of_tiles = tl.load(tile_sum + row * blocks * TILES + first + tl.arange(0, STEP))
            cold_sum += tl.sum(tl.where(hot, 0.0, of_tiles), 0)
            keep = z - peak > cut
            weights = tl.exp((z - peak) / tau)
            count += tl.sum(tl.sum(keep.to(tl.int32), 1), 0)
            kept += tl.sum(tl.sum(tl.where(keep, weights, 0.0), 1), 0)
            dropped += tl.sum(tl.sum(tl.where(keep, 0.0, weights), 1), 0)
            top = tl.minimum(top, tl.min(tl.min(tl.where(z == peak, ids, vocabulary), 1), 0))
        dropped += cold_sum * tl.exp(relative / tau)
    else:
        dropped = tl.load(block_sum + at) * tl.exp(relative / tau)
    tl.store(block_count + at, count)
    tl.store(block_kept + at, kept)
    tl.store(block_dropped + at, dropped)
    tl.store(block_top + at, top)
    if block == 0:
        tl.store(peaks + row, peak)
        tl.store(cuts + row, cut)


@triton.jit
def _write(
    logits, stride, taus, tile_max, peaks, cuts, block_count, block_kept, block_dropped, block_top,
    ids_out, probs_out, counts_out, overflow_out, dropped_out, top_out, kept_out,
    vocabulary, capacity, BLOCKS: tl.constexpr, TILES: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (R, B): the entries of a block, in id order, after those of the blocks before it; the first block sums up the row."""
    row, block = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(1)
    i = tl.arange(0, BLOCKS)
    there = i < blocks
    counts = tl.load(block_count + row * blocks + i, mask=there, other=0)
    kept = tl.sum(tl.load(block_kept + row * blocks + i, mask=there, other=0.0), 0)
    count = tl.sum(counts, 0)
    if tl.sum(tl.where(i == block, counts, 0), 0) > 0:
        tau, peak, cut = tl.load(taus + row), tl.load(peaks + row), tl.load(cuts + row)
        before = tl.sum(tl.where(i < block, counts, 0), 0)
        last = tl.minimum(block * TILES + TILES, tl.cdiv(vocabulary, TILE))
        for first in range(block * TILES, last, STEP):
            ids, _, z = _hot_logits(logits, row, stride, vocabulary, tile_max, blocks * TILES, first, peak, cut, STEP, TILE)
            keep = z - peak > cut
            of_tile = tl.sum(keep.to(tl.int32), 1)
            slot = (before + tl.cumsum(of_tile, 0) - of_tile)[:, None] + tl.cumsum(keep.to(tl.int32), 1) - 1
            entry = row.to(tl.int64) * capacity + slot
            fits = keep & (slot < capacity)
            tl.store(ids_out + entry, ids, mask=fits)
            tl.store(probs_out + entry, support_prob(z, peak, tau, kept), mask=fits)
            before += tl.sum(of_tile, 0)
    if block == 0:
        dropped = tl.sum(tl.load(block_dropped + row * blocks + i, mask=there, other=0.0), 0)
        top = tl.min(tl.load(block_top + row * blocks + i, mask=there, other=vocabulary), 0)
        tl.store(counts_out + row, count)
        tl.store(overflow_out + row, count > capacity)
        tl.store(dropped_out + row, tl.where(count > 0, dropped / (kept + dropped), 0.0))
        tl.store(top_out + row, tl.where(count > 0, top, 0).to(tl.int64))
        tl.store(kept_out + row, kept)


@triton.jit
def support_prob(z, peak, tau, kept):
    """The renormalised probability of a token of the support."""
    return tl.exp((z - peak) / tau) / kept


@triton.jit
def _hot_logits(logits, row, stride, vocabulary, tile_max, tiles, first, peak, cut, STEP: tl.constexpr, TILE: tl.constexpr):
    """Of STEP tiles of a row: their ids [STEP, TILE], which are hot [STEP], and their logits; -inf in a cold one, unread."""
    hot = tl.load(tile_max + row * tiles + first + tl.arange(0, STEP)) - peak > cut
    ids = _tile_ids(first, STEP, TILE)
    there = hot[:, None] & (ids < vocabulary)
    return ids, hot, tl.load(logits + row.to(tl.int64) * stride + ids, mask=there, other=-float("inf"))


@triton.jit
def _tile_ids(first, COUNT: tl.constexpr, TILE: tl.constexpr):
    """int32 [COUNT, TILE]: the token ids of tiles first, first + 1, ..."""
    return (first + tl.arange(0, COUNT))[:, None] * TILE + tl.arange(0, TILE)[None, :]

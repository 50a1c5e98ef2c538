"""Gathers and sums over ragged rows on a GPU, in Triton: `entry_dots`, `segment_softmax`, `softmax_gradient` and `entry_sums`
of kernels.segments, which is their reference.

Bound by memory: each entry reads one row of a table once, in its own dtype, and nothing [N, width] is ever written. Sums are
float32 (float64 where only one number per entry goes in), in an order that depends on nothing but the row's entries, and each
result is written once, by one program: no atomics, the same bits in every run and every batch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DIMS = 256  # columns per program: 8 a lane, so a bf16 row is read in 16-byte loads
ENTRIES = 16  # entries per program of `_entry_dots`
DOT_WARPS = 4
ROWS = 16  # rows in flight per program of `_entry_sums`
SEGMENT = 128  # entries of a row looked at at once by the softmax kernels: 95 of 100 supports at tau = 0.5 are smaller
SEGMENT_WARPS = 1
SUM_WARPS = 1

FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def entry_dots(left: Tensor, rows: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """left[rows[i]] . table[ids[i]] per entry, float32 [N]; left [T, w] and table [V, w] of any float dtype up to float32."""
    dots = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
    if len(ids):
        _entry_dots[(triton.cdiv(len(ids), ENTRIES),)](
            left, rows, table, ids, dots, len(ids), table.shape[1],
            ENTRIES=ENTRIES, DIMS=DIMS, num_warps=DOT_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return dots


def segment_softmax(logits: Tensor, tau: Tensor, offsets: Tensor) -> Tensor:
    """softmax of logits / tau within each row: float32 [N], computed in float64. tau [R], offsets int64 [R + 1]."""
    probs = torch.empty_like(logits)
    if len(logits):
        _segment_softmax[(len(tau),)](logits, tau, offsets, probs, SEGMENT=SEGMENT, num_warps=SEGMENT_WARPS, enable_fp_fusion=False)
    return probs


def softmax_gradient(probs: Tensor, d_probs: Tensor, tau: Tensor, offsets: Tensor) -> Tensor:
    """d loss / d logits, float32 [N], from probs and d loss / d probs, both float32 [N]; the row's sum is in float64."""
    d_logits = torch.empty_like(probs)
    if len(probs):
        _softmax_gradient[(len(tau),)](
            probs, d_probs, tau, offsets, d_logits, SEGMENT=SEGMENT, num_warps=SEGMENT_WARPS, enable_fp_fusion=False
        )
    return d_logits


def entry_sums(table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """out[r] = sum over the entries i of row r of weights[i] * table[index[i]], rounded once to `dtype`: [R, w].

    table [M, w] of any float dtype up to float32, weights float32 [N]; an empty row is 0.
    """
    out = torch.empty(len(offsets) - 1, table.shape[1], dtype=dtype, device=table.device)
    if out.numel():
        _entry_sums[(len(out), triton.cdiv(out.shape[1], DIMS))](
            table, index, weights, offsets, out, out.shape[1],
            DTYPE=FLOATS[dtype], DIMS=DIMS, ROWS=ROWS, num_warps=SUM_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _entry_dots(left, rows, table, ids, dots, entries, width, ENTRIES: tl.constexpr, DIMS: tl.constexpr):
    """Grid (cdiv(N, ENTRIES),): by entries, not by rows, because one support in a hundred is ten times the average."""
    entry = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    there = entry < entries
    row = tl.load(rows + entry, mask=there, other=0).to(tl.int64) * width
    token = tl.load(ids + entry, mask=there, other=0).to(tl.int64) * width
    total = tl.zeros((ENTRIES, DIMS), tl.float32)
    for first in range(0, width, DIMS):
        dim = first + tl.arange(0, DIMS)
        inside = there[:, None] & (dim < width)[None, :]
        a = tl.load(left + row[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(table + token[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(dots + entry, tl.sum(total, 1), mask=there)


@triton.jit
def _segment_softmax(logits, taus, offsets, probs, SEGMENT: tl.constexpr):
    """Grid (R,)."""
    row = tl.program_id(0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    tau = tl.load(taus + row).to(tl.float64)
    lane = tl.arange(0, SEGMENT)
    peak = tl.full((SEGMENT,), -float("inf"), tl.float32)
    for first in range(begin, end, SEGMENT):
        peak = tl.maximum(peak, tl.load(logits + first + lane, mask=first + lane < end, other=-float("inf")))
    top = tl.max(peak, 0)
    total = tl.zeros((SEGMENT,), tl.float64)
    for first in range(begin, end, SEGMENT):
        z = tl.load(logits + first + lane, mask=first + lane < end, other=-float("inf"))
        total += tl.exp((z - top).to(tl.float64) / tau)
    normaliser = tl.sum(total, 0)
    for first in range(begin, end, SEGMENT):
        z = tl.load(logits + first + lane, mask=first + lane < end, other=-float("inf"))
        p = tl.exp((z - top).to(tl.float64) / tau) / normaliser
        tl.store(probs + first + lane, p.to(tl.float32), mask=first + lane < end)


@triton.jit
def _softmax_gradient(probs, d_probs, taus, offsets, d_logits, SEGMENT: tl.constexpr):
    """Grid (R,): dz = p (g - sum p g) / tau."""
    row = tl.program_id(0)
    begin, end = tl.load(offsets + row), tl.load(offsets + row + 1)
    tau = tl.load(taus + row).to(tl.float32)
    lane = tl.arange(0, SEGMENT)
    total = tl.zeros((SEGMENT,), tl.float64)
    for first in range(begin, end, SEGMENT):
        p = tl.load(probs + first + lane, mask=first + lane < end, other=0.0)
        g = tl.load(d_probs + first + lane, mask=first + lane < end, other=0.0)
        total += (p * g).to(tl.float64)
    average = tl.sum(total, 0).to(tl.float32)
    for first in range(begin, end, SEGMENT):
        p = tl.load(probs + first + lane, mask=first + lane < end, other=0.0)
        g = tl.load(d_probs + first + lane, mask=first + lane < end, other=0.0)
        tl.store(d_logits + first + lane, p * (g - average) / tau, mask=first + lane < end)


@triton.jit
def _entry_sums(table, index, weights, offsets, out, width, DTYPE: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr):
    """Grid (R, cdiv(w, DIMS))."""
    row = tl.program_id(0).to(tl.int64)
    dim = tl.program_id(1) * DIMS + tl.arange(0, DIMS)
    end = tl.load(offsets + row + 1)
    total = tl.zeros((DIMS,), tl.float32)
    for first in range(tl.load(offsets + row), end, ROWS):
        entry = first + tl.arange(0, ROWS)
        there = entry < end
        source = tl.load(index + entry, mask=there, other=0).to(tl.int64) * width
        weight = tl.load(weights + entry, mask=there, other=0.0)
        inside = there[:, None] & (dim < width)[None, :]
        values = tl.load(table + source[:, None] + dim[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * values, 0)
    tl.store(out + row * width + dim, rounded(total, DTYPE), mask=dim < width)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """float32 values rounded to nearest even to what DTYPE can hold.

    On the bits for bf16, because Triton's own cast is not the same everywhere: its interpreter truncates.
    """
    if tl.bfloat16 == DTYPE:
        bits = values.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(values == values, bits.to(tl.float32, bitcast=True), float("nan"))
    return values.to(DTYPE).to(tl.float32)

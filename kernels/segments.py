"""Ragged rows in CSR form: entry i of row r stands at offsets[r] <= i < offsets[r + 1]. Sums over them, gathers for them.

Every reduction adds the entries of a row in order, on its own: the result of a row does not depend on the other rows, and no
atomics are used on any device. kernels.triton_soft_logprob has `entry_dots`, `segment_softmax`, `softmax_gradient` and
`entry_sums` for a GPU: same arguments, same results but for rounding.
"""

from bisect import bisect_right

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ENTRIES = 1024  # rows gathered at once: 1024 rows of 576 floats (2 MB) stay in a CPU's cache


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels compute in: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def rows_of(offsets: Tensor, entries: int) -> Tensor:
    """int64 [N]: the row of each of the N = `entries` entries, from offsets int64 [R + 1]."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return torch.repeat_interleave(rows, offsets.diff(), output_size=entries)


def segment_sum(values: Tensor, offsets: Tensor) -> Tensor:
    """[N] -> [R]; 0 for an empty row."""
    return torch.segment_reduce(values, "sum", offsets=offsets, initial=0.0, unsafe=True)


def segment_max(values: Tensor, offsets: Tensor) -> Tensor:
    """[N] -> [R]; -inf for an empty row."""
    return torch.segment_reduce(values, "max", offsets=offsets, initial=float("-inf"), unsafe=True)


def segment_softmax(logits: Tensor, tau: Tensor, offsets: Tensor) -> Tensor:
    """softmax of logits / tau within each row, tau [R]: [N] in the dtype of `logits`, computed in float64, since N is small."""
    rows = rows_of(offsets, len(logits))
    peak = segment_max(logits, offsets)
    # Relative to the peak first: z / tau itself would lose digits at tau = 1e-4.
    weights = ((logits - peak[rows]).double() / tau.double()[rows]).exp_()
    return (weights / segment_sum(weights, offsets)[rows]).to(logits.dtype)


def softmax_gradient(probs: Tensor, d_probs: Tensor, tau: Tensor, offsets: Tensor) -> Tensor:
    """d loss / d logits [N] of `segment_softmax`, from its result and d loss / d probs, both [N]; sums in float64."""
    rows = rows_of(offsets, len(probs))
    average = segment_sum((probs * d_probs).double(), offsets).to(probs.dtype)
    return probs * (d_probs - average[rows]) / tau.to(probs.dtype)[rows]


def entry_dots(left: Tensor, rows: Tensor, table: Tensor, ids: Tensor, chunk: int = CHUNK_ENTRIES) -> Tensor:
    """left[rows[i]] . table[ids[i]] per entry: [N] float32 (float64 when `left` is); `chunk` entries are gathered at a time."""
    wide = accumulation_dtype(left)
    dots = torch.empty(len(ids), dtype=wide, device=ids.device)
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        gathered = table.index_select(0, ids[part]).to(wide)
        dots[part] = gathered.mul_(left.index_select(0, rows[part])).sum(-1)
    return dots


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """out[r] = sum over the entries i of row r of weights[i] * table[index[i]], in entry order: a CSR matrix times `table`.

    table [M, w] and weights [N] share a dtype (float32 or float64); index int [N]; -> [R, w]. Nothing [N, w] is formed.
    """
    return F.embedding_bag(index.long(), table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def entry_sums(
    table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor, dtype: torch.dtype, chunk: int = CHUNK_ENTRIES
) -> Tensor:
    """`weighted_rows` of a table of any float dtype, summed in that of `weights` and rounded once to `dtype`: [R, w].

    A table that needs widening is gathered `chunk` entries at a time; a row may be split over chunks.
    """
    if table.dtype == weights.dtype:
        return weighted_rows(table, index, weights, offsets).to(dtype)
    out = torch.zeros(len(offsets) - 1, table.shape[1], dtype=weights.dtype, device=table.device)
    bounds = offsets.tolist()
    for start in range(0, len(index), chunk):
        stop = min(start + chunk, len(index))
        rows = slice(bisect_right(bounds, start) - 1, bisect_right(bounds, stop - 1))
        gathered = table.index_select(0, index[start:stop]).to(weights.dtype)
        local = (offsets[rows.start : rows.stop + 1] - start).clamp(0, stop - start)
        out[rows] += weighted_rows(gathered, torch.arange(stop - start, device=index.device), weights[start:stop], local)
    return out.to(dtype)

"""Ragged rows in CSR form: entry i of row r stands at offsets[r] <= i < offsets[r + 1]. Sums over them, gathers for them.

Every reduction adds the entries of a row in order, on its own: the result of a row does not depend on the other rows, and no
atomics are used on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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


def segment_softmax(logits: Tensor, tau: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """softmax of logits / tau within each row: [N] in the dtype of `logits`, computed in float64, since N is small."""
    peak = segment_max(logits, offsets)
    weights = ((logits - peak[rows]).double() / tau.double()[rows]).exp_()
    return (weights / segment_sum(weights, offsets)[rows]).to(logits.dtype)


def weighted_rows(table: Tensor, index: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """out[r] = sum over the entries i of row r of weights[i] * table[index[i]], in entry order: a CSR matrix times `table`.

    table [M, w] and weights [N] share a dtype (float32 or float64); index int [N]; -> [R, w]. Nothing [N, w] is formed.
    """
    return F.embedding_bag(index.long(), table, offsets, mode="sum", per_sample_weights=weights, include_last_offset=True)


def entry_dots(left: Tensor, rows: Tensor, table: Tensor, ids: Tensor, chunk: int) -> Tensor:
    """left[rows[i]] . table[ids[i]] per entry: [N] float32 (float64 when `left` is); `chunk` entries are gathered at a time."""
    wide = accumulation_dtype(left)
    dots = torch.empty(len(ids), dtype=wide, device=ids.device)
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        gathered = table.index_select(0, ids[part]).to(wide)
        dots[part] = gathered.mul_(left.index_select(0, rows[part])).sum(-1)
    return dots


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """What the kernels compute in: float64 for float64 inputs, float32 for every other."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32

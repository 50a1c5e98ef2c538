"""Noisy soft tokens on a GPU, in Triton: h~ = p E + sigma eps, gathered from the few rows of E that a support names.

```
 FixedSupport (kernels.triton_select) --soft_embeddings--> h~ [R, n0]     engine: in place, capturable in a CUDA graph
 record (ids, probs, offsets), CSR ----mix, rebuild------> the same bits  learner, and replay after preemption
```

One program makes DIMS coordinates of one row. It adds p_v E_v in id order, product and sum each rounded, from the first entry
to the last, so the bits depend on nothing but the row's support: not on the batch, the capacity, or which of these functions
is called. The noise of the same coordinates is computed in registers and never stored. Rounding to bf16 is done on the bits,
to nearest even, because Triton's own cast is not the same everywhere (its interpreter truncates).

A row that overflows K entries is mixed from its logits instead: every token is tested again and those that belong are added in
the same order. It is slow, all of E's rows for a flat distribution, and it is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import (
    check_noise,
    check_rebuild,
    check_record,
    check_table,
    require_contiguous,
    require_dtype,
    require_same_device,
    require_shape,
)
from kernels.noise import STREAM_SOFT
from kernels.triton_noise import normal_block
from kernels.triton_segments import FLOATS, rounded
from kernels.triton_select import TILE, FixedSupport, check_batch, support_prob

DIMS = 256  # coordinates per program: one warp, 8 a lane, so a bf16 row of E is read in 16-byte loads
UNROLL = 16  # rows of E in flight per program
WARPS = 1
LAUNCH = {"DIMS": DIMS, "UNROLL": UNROLL, "num_warps": WARPS, "enable_fp_fusion": False}


def soft_embeddings(
    support: FixedSupport,
    logits: Tensor,
    tau: Tensor,
    embedding: Tensor,
    sigma: Tensor,
    seeds: Tensor,
    positions: Tensor,
    out: Tensor,
) -> None:
    """The soft embeddings of the supports just selected from `logits` and `tau`, into out [>= R, n0] in its dtype.

    embedding [>= V, n0]; sigma float32 [R], at least 0; seeds, positions int64 [R] as for `normal_rows`. A row with no support is
    noise alone. One launch, no host synchronisation. Raises ValueError on wrong arguments before it.
    """
    _check_fixed(support, logits, tau, embedding, out, out.dtype)
    if len(embedding) < logits.shape[1]:
        raise ValueError(f"embedding: shape {list(embedding.shape)}, expected a row for each of the {logits.shape[1]} logits")
    check_noise(sigma, seeds, positions, len(logits), support.ids)
    _check_contiguous(sigma, seeds, positions)
    _launch_fixed(support, logits, tau, embedding, 0, (sigma, seeds, positions), out, out.dtype)


def partial_means(support: FixedSupport, logits: Tensor, tau: Tensor, rows: Tensor, first_id: int, out: Tensor) -> None:
    """One tensor-parallel rank's part of the means of the supports just selected, into out float32 [>= R, n0].

    The sum of p_v E_v over the ids v whose rows the rank holds: `rows` [V', n0] are those of ids first_id, first_id + 1, and so on.
    Added up over the ranks, then `sigma * normal_rows`, then one rounding to the dtype of `rows`: the soft embeddings. One launch,
    no host synchronisation. Raises ValueError on wrong arguments before it.
    """
    _check_fixed(support, logits, tau, rows, out, rows.dtype)
    require_dtype("out", out, torch.float32)
    _launch_fixed(support, logits, tau, rows, first_id, None, out, rows.dtype)


def mix(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, dtype: torch.dtype) -> Tensor:
    """As `kernels.soft_embedding.mix`: float32 [R, n0]. Raises ValueError before any launch, for which it waits for the device."""
    check_record(ids, probs, offsets, embedding, dtype)
    means = torch.empty(len(offsets) - 1, embedding.shape[1], dtype=torch.float32, device=embedding.device)
    if means.numel():
        _embed_csr[_grid(means)](
            ids, probs, offsets, embedding, *embedding.shape, None, None, None, means,
            DTYPE=FLOATS[dtype], NOISE=False, STREAM=STREAM_SOFT, **LAUNCH,
        )  # fmt: skip
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
    """As `kernels.soft_embedding.rebuild`: [R, n0] in `dtype`, the bits of `soft_embeddings`. Raises as `mix` does."""
    check_rebuild(ids, probs, offsets, embedding, sigma, seeds, positions, dtype)
    _check_contiguous(sigma, seeds, positions)
    noisy = torch.empty(len(offsets) - 1, embedding.shape[1], dtype=dtype, device=embedding.device)
    if noisy.numel():
        _embed_csr[_grid(noisy)](
            ids, probs, offsets, embedding, *embedding.shape, sigma, seeds, positions, noisy,
            DTYPE=FLOATS[dtype], NOISE=True, STREAM=STREAM_SOFT, **LAUNCH,
        )  # fmt: skip
    return noisy


def _launch_fixed(
    support: FixedSupport,
    logits: Tensor,
    tau: Tensor,
    embedding: Tensor,
    first_id: int,
    noise_keys: tuple[Tensor, Tensor, Tensor] | None,
    out: Tensor,
    dtype: torch.dtype,
) -> None:
    s, (held, width) = support, embedding.shape
    if len(logits):
        _embed_fixed[(len(logits), triton.cdiv(width, DIMS))](
            s.ids, s.probs, s.counts, s.ids.shape[1], logits, logits.stride(0), logits.shape[1], tau,
            s.tile_max, s.tile_max.shape[1], s.peak, s.cut, s.kept, embedding, first_id, held, width,
            *(noise_keys or (None, None, None)), out,
            DTYPE=FLOATS[dtype], NOISE=noise_keys is not None, STREAM=STREAM_SOFT, TILE=TILE, **LAUNCH,
        )  # fmt: skip


def _grid(out: Tensor) -> tuple[int, int]:
    return len(out), triton.cdiv(out.shape[1], DIMS)


def _check_fixed(support: FixedSupport, logits: Tensor, tau: Tensor, embedding: Tensor, out: Tensor, dtype: torch.dtype) -> None:
    check_batch(support, logits, tau)
    check_table(embedding, dtype, support.ids)
    require_shape("out", out, (None, embedding.shape[1]), "[R, n0]")
    if len(out) < len(logits):
        raise ValueError(f"out: shape {list(out.shape)}, expected a row for each of the {len(logits)} rows of logits")
    require_contiguous("out", out)
    require_same_device("out", out, "support", support.ids)


def _check_contiguous(sigma: Tensor, seeds: Tensor, positions: Tensor) -> None:
    for name, values in (("sigma", sigma), ("seeds", seeds), ("positions", positions)):
        require_contiguous(name, values)


@triton.jit
def _embed_fixed(
    ids, probs, counts, capacity, logits, logits_stride, vocabulary, taus, tile_max, tiles, peaks, cuts, kepts,
    embedding, first_id, held, width, sigmas, seeds, positions, out,
    DTYPE: tl.constexpr, NOISE: tl.constexpr, STREAM: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (R, cdiv(n0, DIMS)). With NOISE the soft embedding in DTYPE, without it the mean over `held` ids in float32."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * DIMS
    count = tl.load(counts + row)
    mean = tl.zeros((DIMS,), tl.float32)
    if count <= capacity:
        mean = _add_listed(
            mean, ids + row * capacity, probs + row * capacity, count, embedding, first_id, held, first, width, DTYPE, DIMS, UNROLL
        )
    else:
        mean = _add_unlisted(
            mean, logits + row * logits_stride, vocabulary, tl.load(taus + row), tile_max + row * tiles,
            tl.load(peaks + row), tl.load(cuts + row), tl.load(kepts + row), embedding, first_id, held, first, width,
            DTYPE, TILE, DIMS, UNROLL,
        )  # fmt: skip
    if NOISE:
        mean = rounded(_add_noise(mean, row, first, sigmas, seeds, positions, STREAM, DIMS), DTYPE)
    _store_row(out + row * width, mean, first, width, DIMS)


@triton.jit
def _embed_csr(
    ids, probs, offsets, embedding, held, width, sigmas, seeds, positions, out,
    DTYPE: tl.constexpr, NOISE: tl.constexpr, STREAM: tl.constexpr, DIMS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (R, cdiv(n0, DIMS)). With NOISE the soft embedding in DTYPE, without it the mean in float32."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * DIMS
    begin = tl.load(offsets + row)
    count = (tl.load(offsets + row + 1) - begin).to(tl.int32)
    mean = tl.zeros((DIMS,), tl.float32)
    mean = _add_listed(mean, ids + begin, probs + begin, count, embedding, 0, held, first, width, DTYPE, DIMS, UNROLL)
    if NOISE:
        mean = rounded(_add_noise(mean, row, first, sigmas, seeds, positions, STREAM, DIMS), DTYPE)
    _store_row(out + row * width, mean, first, width, DIMS)


@triton.jit
def _add_listed(
    mean, ids, probs, count, embedding, first_id, held, first, width,
    DTYPE: tl.constexpr, DIMS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """mean + sum of probs[i] * embedding[ids[i]] over i < count, in order."""
    tokens, weights = _entries(ids, probs, 0, count, UNROLL)
    for i in range(0, count, UNROLL):
        rows = _table_rows(embedding, tokens, first_id, held, first, width, DIMS, UNROLL)
        next_tokens, next_weights = _entries(ids, probs, i + UNROLL, count, UNROLL)  # while the rows are under way
        mean = _add_rows(mean, weights, rows, DTYPE, UNROLL)
        tokens, weights = next_tokens, next_weights
    return mean


@triton.jit
def _add_unlisted(
    mean, logits, vocabulary, tau, tile_max, peak, cut, kept, embedding, first_id, held, first, width,
    DTYPE: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """The same sum over the whole support of a row, found in its logits: tokens that do not belong add an exact 0."""
    for tile in range(tl.cdiv(vocabulary, TILE)):
        if tl.load(tile_max + tile) - peak > cut:
            for token in range(tile * TILE, tile * TILE + TILE, UNROLL):
                tokens, weights = tl.tuple(()), tl.tuple(())
                for u in tl.static_range(UNROLL):
                    z = tl.load(logits + token + u, mask=token + u < vocabulary, other=-float("inf"))
                    belongs = z - peak > cut
                    tokens += (tl.where(belongs, token + u, -1),)
                    weights += (tl.where(belongs, support_prob(z, peak, tau, kept), 0.0),)
                rows = _table_rows(embedding, tokens, first_id, held, first, width, DIMS, UNROLL)
                mean = _add_rows(mean, weights, rows, DTYPE, UNROLL)
    return mean


@triton.jit
def _entries(ids, probs, i, count, UNROLL: tl.constexpr):
    """Entries i .. i + UNROLL - 1 of a list as two tuples of scalars; token -1 and weight 0 past its end."""
    tokens, weights = tl.tuple(()), tl.tuple(())
    for u in tl.static_range(UNROLL):
        tokens += (tl.load(ids + i + u, mask=i + u < count, other=-1),)
        weights += (tl.load(probs + i + u, mask=i + u < count, other=0.0),)
    return tokens, weights


@triton.jit
def _table_rows(embedding, tokens, first_id, held, first, width, DIMS: tl.constexpr, UNROLL: tl.constexpr):
    """A tuple of blocks [DIMS]: coordinates first .. of rows of E, all requested before any is used; 0, unread, for token -1 and
    for tokens that are not among the `held` ids from first_id on."""
    coordinate = first + tl.arange(0, DIMS)
    rows = tl.tuple(())
    for u in tl.static_range(UNROLL):
        row = tokens[u] - first_id
        limit = tl.where((row >= 0) & (row < held), width, 0)
        rows += (tl.load(embedding + tl.cast(row, tl.int64) * width + coordinate, mask=coordinate < limit, other=0.0),)
    return rows


@triton.jit
def _add_rows(mean, weights, rows, DTYPE: tl.constexpr, UNROLL: tl.constexpr):
    """mean + weights[0] * rows[0] + weights[1] * rows[1] + ..., the rows as the engine's dtype has them."""
    for u in tl.static_range(UNROLL):
        mean = mean + weights[u] * rounded(rows[u].to(tl.float32), DTYPE)
    return mean


@triton.jit
def _add_noise(mean, row, first, sigmas, seeds, positions, STREAM: tl.constexpr, DIMS: tl.constexpr):
    groups = first // 4 + tl.arange(0, DIMS // 4)
    noise = normal_block(tl.load(seeds + row), tl.load(positions + row), STREAM, groups)
    return mean + tl.load(sigmas + row) * noise


@triton.jit
def _store_row(out, values, first, width, DIMS: tl.constexpr):
    coordinate = first + tl.arange(0, DIMS)
    tl.store(out + coordinate, values, mask=coordinate < width)

"""Attention over a packed micro-batch: linear layers see R rows, attention sees each prompt once and each sample after its prompt.

    packed rows      | prompt 0 | sample 0 | sample 1 | prompt 1 | sample 2 |                                 projections, MLP
                          |           |                                                gather
    prompts          | prompt 0 |                     x  the same                                             attention, causal
    samples          | sample 0 |                     x  | prompt 0 | sample 0 |                              attention, causal
                          |                                                            gather back
    packed rows      | prompt 0 | sample 0 | ...

Queries are the last rows of their keys, so "causal" is aligned at the end. One mask over all rows would cost R x R, most of it not
visible: 8 times as much for three prompts of 110 tokens with eight samples of 31, 18 times for one prompt of 150 with 32 samples of
168. On a GPU, flash-attention's varlen kernels take the lists as they are, where flash-attn is installed; otherwise torch's own
attention takes them padded to the longest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.segments import accumulation_dtype

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # optional
    flash_attn_varlen_func = None

NAME = "softrl_packed"  # of this attention among transformers' implementations


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """n lists of packed rows, N in all."""

    flat: Tensor  # int64 [N] one list after another
    offsets: Tensor  # int32 [n+1] where each begins
    padded: Tensor  # int64 [n, longest] a list a line, row 0 after its end


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Who sees whom among R rows: B prompts, and M samples that follow one of them."""

    prompts: Rows  # B lists
    samples: Rows  # M lists, without the prompt's rows
    keys: Rows  # M lists: the prompt's rows, then the sample's own
    visible: Tensor  # bool [M, 1, longest sample, longest keys] True where a sample's row sees a key
    place: Tensor  # int64 [R] where a row stands in prompts.flat, then samples.flat
    padded_place: Tensor  # int64 [R] the same of prompts.padded, then samples.padded, line after line


def segments(prompts: Sequence[range], samples: Sequence[tuple[range, int]]) -> Segments:
    """From the rows of each prompt, and the rows of each sample with the index of its prompt; together rows 0 .. R-1."""
    own = [[rows] for rows, _ in samples]
    before = [[prompts[index]] for _, index in samples]
    listed, answering = _rows([[rows] for rows in prompts]), _rows(own)
    keys = _rows([a + b for a, b in zip(before, own, strict=True)])
    query = torch.arange(answering.padded.shape[1])[:, None]
    key = torch.arange(keys.padded.shape[1])
    lengths = keys.offsets.diff()[:, None, None]
    ends = lengths - answering.offsets.diff()[:, None, None]  # where a sample's own rows begin
    flat = torch.cat([listed.flat, answering.flat])
    padded = torch.cat([_places(listed), len(listed.padded.flatten()) + _places(answering)])
    return Segments(
        prompts=listed,
        samples=answering,
        keys=keys,
        visible=((key < lengths) & (key <= ends + query))[:, None],
        place=_inverse(flat, torch.arange(len(flat))),
        padded_place=_inverse(flat, padded),
    )


def _rows(lists: Sequence[Sequence[range]]) -> Rows:
    parts = [torch.cat([torch.arange(r.start, r.stop) for r in ranges]) for ranges in lists]
    lengths = torch.tensor([0, *(len(part) for part in parts)])
    return Rows(
        flat=torch.cat([torch.empty(0, dtype=torch.int64), *parts]),
        offsets=lengths.cumsum(0).int(),
        padded=pad_sequence(parts, batch_first=True) if parts else torch.empty(0, 0, dtype=torch.int64),
    )


def _places(rows: Rows) -> Tensor:
    """int64 [N] where the entries of `flat` stand in `padded`, line after line."""
    longest = rows.padded.shape[1]
    return (torch.arange(longest) < rows.offsets.diff()[:, None]).flatten().nonzero()[:, 0]


def _inverse(rows: Tensor, places: Tensor) -> Tensor:
    """int64 [R] the place of each row."""
    found = torch.empty_like(places)
    found[rows] = places
    return found


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, H, R, D], key and value [1, H_kv, R, D] -> ([1, R, H, D], None).

    Without segments it is transformers' own sdpa. Raises RuntimeError in a model that drops its keyword arguments on the way.
    """
    if segments is None:
        if attention_mask is not None:
            raise RuntimeError(f"{type(module).__name__} does not pass `segments` on: packed samples would see each other")
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)
    flash = _takes_lists(query)

    def attend(queries: Rows, keys: Rows, visible: Tensor | None) -> Tensor:
        """[N, H, D] by flash-attn, or [n x longest, H, D] by torch's attention."""
        (q,) = _gathered([query], queries.flat if flash else queries.padded)
        k, v = _gathered([key, value], keys.flat if flash else keys.padded)
        if flash:
            return _varlen(q, k, v, queries, keys, kwargs.get("scaling"))
        heads_first = (x.transpose(1, 2) for x in (q, k, v))
        return sdpa_attention_forward(module, *heads_first, visible, **kwargs)[0].flatten(0, 1)

    # Causal is mask enough for padded prompts: what stands after a prompt's end is seen by nothing that counts.
    found = [attend(segments.prompts, segments.prompts, None)]
    if segments.samples.flat.numel():  # answers of one token are predicted by the prompt and have no row
        found.append(attend(segments.samples, segments.keys, segments.visible))
    return torch.cat(found).index_select(0, segments.place if flash else segments.padded_place)[None], None


def _takes_lists(query: Tensor) -> bool:
    """Whether flash-attn is there and serves this device and dtype."""
    return flash_attn_varlen_func is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Rows, keys: Rows, scaling: float | None) -> Tensor:
    """flash-attn over lists: q [N, H, D], k and v [N', H_kv, D] -> [N, H, D]. Its causal mask is aligned at the end since 2.1."""
    lists = {
        "cu_seqlens_q": queries.offsets,
        "cu_seqlens_k": keys.offsets,
        "max_seqlen_q": queries.padded.shape[1],
        "max_seqlen_k": keys.padded.shape[1],
    }
    return cast(Tensor, flash_attn_varlen_func(q, k, v, **lists, softmax_scale=scaling, causal=True))


def _gathered(states: Sequence[Tensor], rows: Tensor) -> Sequence[Tensor]:
    """Each [1, H, R, D] -> [..., H, D] of rows [...]."""
    heads, width = [x.shape[1] for x in states], states[0].shape[3]
    table = torch.cat([x[0] for x in states]).transpose(0, 1).flatten(1)
    return cast(Tensor, _Gather.apply(table, rows)).unflatten(-1, (sum(heads), width)).split(heads, dim=-2)


class _Gather(torch.autograd.Function):
    """table [R, W] -> [..., W] of rows [...]. All samples take their prompt's rows; their gradients are added up in float32 and
    always in the same order, as an index into a bf16 table would not do."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(table)
        return embedding(rows, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = grad.to(accumulation_dtype(grad))
        return torch.ops.aten.embedding_dense_backward(wide, rows, ctx.count, -1, False).to(grad.dtype), None


# Outside the graphs of torch.compile: with their shapes unknown, its backward mistakes the strides of the gathered rows (2.13).
AttentionInterface.register(NAME, torch.compiler.disable(packed_attention))
AttentionMaskInterface.register(NAME, sdpa_mask)

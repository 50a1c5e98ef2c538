"""Attention over a packed micro-batch: linear layers see R rows, attention sees each prompt once and each sample after its prompt.

    packed rows      | prompt 0 | sample 0 | sample 1 | prompt 1 | sample 2 |                                 projections, MLP
                          |           |                                                gather
    prompts          | prompt 0 | pad |           x  the same, causal                                         attention, [B, P, P]
    samples          | sample 0 | pad |           x  | prompt 0 | pad | sample 0 | pad |                      [M, C, P + C]
                          |                                                            gather back
    packed rows      | prompt 0 | sample 0 | ...

One mask over all rows would cost R x R, most of it not visible: 8 times as much for three prompts of 110 tokens with eight samples
of 31, 18 times for one prompt of 150 with 32 samples of 168. Flash-attention's varlen kernels could do the two products unpadded;
what a prompt costs less by standing once (its projections and its MLP) they could not save.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kernels.segments import accumulation_dtype

NAME = "softrl_packed"  # of this attention among transformers' implementations


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """B prompts of at most P rows and M samples of at most C rows. Places after a prompt's or a sample's end hold row 0."""

    prompt_rows: Tensor  # int64 [B, P]
    sample_rows: Tensor  # int64 [M, C] without the prompt's
    key_rows: Tensor  # int64 [M, P + C] the prompt's, then the sample's own
    visible: Tensor  # bool [M, 1, C, P + C] True where a sample's row sees a key
    place: Tensor  # int64 [R] where a row stands among B x P + M x C places


def segments(prompts: Sequence[range], samples: Sequence[tuple[range, int]]) -> Segments:
    """From the rows of each prompt, and the rows of each sample with the index of its prompt; together rows 0 .. R-1."""
    prompt_rows, prompt_valid = _padded(prompts)
    sample_rows, sample_valid = _padded([rows for rows, _ in samples])
    of_sample = torch.tensor([prompt for _, prompt in samples], dtype=torch.int64)
    longest = sample_rows.shape[1]
    own = torch.ones(longest, longest, dtype=torch.bool).tril() & sample_valid[:, None, :]
    shared = prompt_valid[of_sample][:, None, :].expand(-1, longest, -1)
    places = torch.cat([prompt_valid.flatten(), sample_valid.flatten()]).nonzero()[:, 0]
    rows = torch.cat([prompt_rows.flatten(), sample_rows.flatten()])[places]
    place = torch.empty_like(places)
    place[rows] = places
    return Segments(
        prompt_rows=prompt_rows,
        sample_rows=sample_rows,
        key_rows=torch.cat([prompt_rows[of_sample], sample_rows], dim=1),
        visible=torch.cat([shared, own], dim=2)[:, None],
        place=place,
    )


def _padded(parts: Sequence[range]) -> tuple[Tensor, Tensor]:
    """(rows int64 [N, longest] with 0 after the end, whether a place is a row [N, longest])."""
    column = torch.arange(max((len(part) for part in parts), default=0))
    start, length = (torch.tensor([f(part) for part in parts], dtype=torch.int64)[:, None] for f in (lambda p: p.start, len))
    valid = column < length
    return torch.where(valid, start + column, 0), valid


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
    keys = torch.cat([key, value], dim=1)

    def attend(query_rows: Tensor, key_rows: Tensor, mask: Tensor | None) -> Tensor:
        k, v = _gathered(keys, key_rows).split([key.shape[1], value.shape[1]], dim=1)
        return sdpa_attention_forward(module, _gathered(query, query_rows), k, v, mask, **kwargs)[0].flatten(0, 1)

    # Causal is mask enough for prompts: what stands after a prompt's end is seen by nothing that counts.
    found = [attend(segments.prompt_rows, segments.prompt_rows, None)]
    if segments.sample_rows.numel():  # answers of one token are predicted by the prompt and have no row
        found.append(attend(segments.sample_rows, segments.key_rows, segments.visible))
    return torch.cat(found).index_select(0, segments.place)[None], None


def _gathered(states: Tensor, rows: Tensor) -> Tensor:
    """[1, H, R, D] -> [N, H, L, D] of rows [N, L]."""
    _, heads, _, width = states.shape
    table = states[0].transpose(0, 1).flatten(1)
    return cast(Tensor, _Gather.apply(table, rows)).unflatten(2, (heads, width)).transpose(1, 2)


class _Gather(torch.autograd.Function):
    """table [R, W] -> [N, L, W] of rows [N, L]. All samples take their prompt's rows; their gradients are added up in float32 and
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


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

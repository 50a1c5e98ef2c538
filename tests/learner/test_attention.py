"""Attention by segments is attention under the mask that says it plainly: a sample sees its prompt and itself."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from learner import attention
from learner.attention import Segments, packed_attention, segments

# Rows of two prompts with three samples and one sample; a prompt of one row with a sample of none.
PROMPTS = [range(0, 3), range(9, 14), range(16, 17)]
SAMPLES = [(range(3, 7), 0), (range(7, 8), 0), (range(8, 9), 0), (range(14, 16), 1), (range(17, 17), 2)]
ROWS = 17


def visible() -> Tensor:
    """bool [R, R], written down row by row."""
    seen = torch.zeros(ROWS, ROWS, dtype=torch.bool)
    for own, before in [(p, range(0)) for p in PROMPTS] + [(rows, PROMPTS[p]) for rows, p in SAMPLES]:
        for query in own:
            for key in [*before, *(k for k in own if k <= query)]:
                seen[query, key] = True
    return seen


class Grouped(nn.Module):
    """What transformers' attention reads of its module: two query heads to a key head."""

    num_key_value_groups = 2
    is_causal = True


def states(seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(1, heads, ROWS, 8, generator=g, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]


def attend(inputs: list[Tensor], found: Segments) -> Tensor:
    return packed_attention(Grouped(), *inputs, torch.empty(1, 1, ROWS, 0), segments=found, scaling=0.3)[0]


def assert_same(output: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    """Values, and gradients of a weighted sum of them."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad((x * weight).sum(), inputs) for x in (output, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_segments_give_the_output_and_the_gradients_of_the_whole_mask() -> None:
    inputs, found = states(), segments(PROMPTS, SAMPLES)
    query, key, value = inputs
    wide = [x.repeat_interleave(2, dim=1) for x in (key, value)]
    expected = scaled_dot_product_attention(query, *wide, attn_mask=visible()[None, None], scale=0.3).transpose(1, 2)
    assert_same(attend(inputs, found), expected, inputs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """flash-attn's function as its documentation words it: lists of queries and keys, causal from the bottom right corner."""
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q.diff().max()) == max_seqlen_q and int(cu_seqlens_k.diff().max()) == max_seqlen_k
    found = []
    for i in range(len(cu_seqlens_q) - 1):
        query, key, value = (
            x[offsets[i] : offsets[i + 1]].transpose(0, 1)
            for x, offsets in ((q, cu_seqlens_q), (k, cu_seqlens_k), (v, cu_seqlens_k))
        )
        rows, columns = query.shape[1], key.shape[1]
        mask = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        wide = [x.repeat_interleave(2, dim=0) for x in (key, value)]
        found.append(scaled_dot_product_attention(query, *wide, attn_mask=mask, scale=softmax_scale).transpose(0, 1))
    return torch.cat(found)


def test_lists_give_what_padding_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = states(), segments(PROMPTS, SAMPLES)
    padded = attend(inputs, found)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", flash_attn_varlen_func)
    monkeypatch.setattr(attention, "_takes_lists", lambda query: True)
    assert_same(attend(inputs, found), padded, inputs)


def test_every_row_has_its_place_and_padding_reaches_nothing() -> None:
    found = segments(PROMPTS, SAMPLES)
    flat = torch.cat([found.prompts.flat, found.samples.flat])
    padded = torch.cat([found.prompts.padded.flatten(), found.samples.padded.flatten()])
    assert torch.equal(flat[found.place], torch.arange(ROWS)) and torch.equal(padded[found.padded_place], torch.arange(ROWS))
    assert found.visible.shape == (5, 1, 4, 7) and found.visible[..., 0].all()  # no row sees nothing: it would be NaN
    inputs = states()
    with torch.no_grad():
        before = attend(inputs, found)
        inputs[1][:, :, 0], inputs[2][:, :, 0] = 1e6, -1e6  # row 0, which stands for padding, is seen by the first prompt's only
        after = attend(inputs, found)
    assert torch.equal(before[:, 9:], after[:, 9:]) and not torch.equal(before[:, :9], after[:, :9])


def test_samples_without_rows_leave_the_prompts() -> None:
    found = segments([range(0, 3), range(3, 5)], [(range(3, 3), 0), (range(5, 5), 1)])
    inputs = [x[:, :, :5] for x in states()]
    assert packed_attention(Grouped(), *inputs, None, segments=found)[0].shape == (1, 5, 4, 8)


def test_a_model_that_loses_the_segments_is_stopped() -> None:
    with pytest.raises(RuntimeError, match="Grouped does not pass `segments` on"):
        packed_attention(Grouped(), *states(), torch.empty(1, 1, ROWS, 0))


def test_gradients_of_a_shared_prompt_are_added_up_in_float32() -> None:
    """A thousand samples of one prompt row, whose values each weighs by a half: in bf16 a sum of ones and halves stops at 256."""
    takers = 1022
    found = segments([range(0, 1)], [(range(1 + i, 2 + i), 0) for i in range(takers)])
    query, key = (torch.zeros(1, heads, 1 + takers, 8, dtype=torch.bfloat16) for heads in (2, 1))
    value = torch.zeros_like(key).requires_grad_()
    packed_attention(Grouped(), query, key, value, None, segments=found, scaling=1.0)[0].sum().backward()
    assert value.grad is not None
    assert value.grad[0, 0, 0].tolist() == [2 * 1.0 + takers * 2 * 0.5] * 8  # both query heads: of itself, and of every sample

"""The recorded support is the brute-force one, its mixture the dense mean up to the dropped mass, whatever the batch."""

import pytest
import torch
from torch import Tensor

from kernels import soft_embedding
from kernels.noise import normal_rows
from kernels.soft_embedding import (
    SupportBatch,
    add_noise,
    bad_rows,
    dense_mean,
    mix,
    rebuild,
    rescore,
    rms,
    screen,
    select_support,
    settle,
)

THRESHOLD = 1e-6
TAUS = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0])


def exact_probs(logits: Tensor, tau: Tensor) -> Tensor:
    return torch.softmax(logits.double() / tau.double()[:, None], -1)


def dense_form(support: SupportBatch, vocabulary: int) -> Tensor:
    """float64 [R, V]: the support's probabilities at their ids."""
    rows = torch.repeat_interleave(support.offsets.diff())
    dense = torch.zeros(len(support.top_ids), vocabulary, dtype=torch.float64)
    dense[rows, support.ids.long()] = support.probs.double()
    return dense


def assert_is_support(support: SupportBatch, probs: Tensor, neighbour: float, tolerance: float) -> None:
    """`support` holds the tokens with probs > THRESHOLD, but for those within `neighbour` (relative) of the threshold."""
    dense = dense_form(support, probs.shape[1])
    kept = dense > 0
    differs = kept != (probs > THRESHOLD)
    assert ((probs[differs] / THRESHOLD - 1).abs() < neighbour).all()
    renormalised = probs * kept / (probs * kept).sum(-1, keepdim=True)
    assert ((dense - renormalised).abs() <= tolerance * renormalised).all()
    assert torch.allclose(dense.sum(-1), torch.ones(len(probs), dtype=torch.float64), atol=1e-6)
    for row in range(len(probs)):
        ids = support.ids[support.offsets[row] : support.offsets[row + 1]]
        assert len(ids) and (ids.diff() > 0).all()


def row_of(support: SupportBatch, row: int) -> tuple[Tensor, ...]:
    entries = slice(int(support.offsets[row]), int(support.offsets[row + 1]))
    return support.ids[entries], support.probs[entries], support.dropped_mass[row], support.top_ids[row]


def model_like(rows: int, vocabulary: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """bf16 (hidden [R, d], head [V, d]) whose logits are peaked like a language model's."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(vocabulary, width, generator=generator)
    pull = head[torch.randint(0, vocabulary, (rows, 3), generator=generator)].sum(1)
    hidden = (pull * 0.5 + torch.randn(rows, width, generator=generator) * 0.5) * (4 / width**0.5)
    return hidden.bfloat16(), head.bfloat16()


@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 50), (7, 64), (7, 65), (1, 1000), (7, 4097), (7, 49152)])
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_the_support_of_float32_logits_is_the_brute_force_one(rows, vocabulary, scale):
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(1)) * scale
    tau = TAUS[-rows:]
    support = select_support(logits, tau)
    probs = exact_probs(logits, tau)
    assert_is_support(support, probs, neighbour=1e-5, tolerance=1e-6)
    dropped = (probs * (dense_form(support, vocabulary) == 0)).sum(-1)
    assert torch.allclose(support.dropped_mass.double(), dropped, rtol=1e-4, atol=1e-12)
    assert torch.equal(support.top_ids, logits.argmax(-1))
    assert (support.ids.dtype, support.probs.dtype) == (torch.int32, torch.float32)
    assert (support.offsets.dtype, support.dropped_mass.dtype, support.top_ids.dtype) == (
        torch.int64,
        torch.float32,
        torch.int64,
    )


def test_ties_keep_every_winner_and_the_lowest_id_is_on_top():
    logits = torch.zeros(3, 200)
    logits[0, [199, 70, 130]] = 9.0
    logits[1, [3, 4]] = 5.0
    support = select_support(logits, torch.tensor([1e-4, 1e-4, 1.0]))
    assert support.top_ids.tolist() == [70, 3, 0]
    assert support.ids[: support.offsets[2]].tolist() == [70, 130, 199, 3, 4]
    assert torch.equal(support.probs[:5], torch.tensor([1 / 3] * 3 + [0.5] * 2))
    assert torch.equal(support.probs[5:], torch.full((200,), 1 / 200))


def test_padding_of_the_vocabulary_is_never_selected():
    logits = torch.randn(4, 130) * 0.01
    logits[:, 100:] = -torch.inf
    logits[3, 1:] = -torch.inf
    support = select_support(logits, torch.tensor([0.5, 2.0, 1e-4, 1e-4]))
    assert support.ids.max() < 100
    assert support.dropped_mass.isfinite().all()
    assert row_of(support, 3)[0].tolist() == [0] and row_of(support, 3)[1].tolist() == [1.0]
    assert support.offsets.diff()[:2].tolist() == [100, 100]


def test_a_top_probability_below_the_threshold_is_still_selected():
    logits = torch.zeros(1, 300)
    logits[0, 123] = 1e-3
    support = select_support(logits, torch.ones(1), threshold=0.01)
    assert support.ids.tolist() == [123] and support.probs.tolist() == [1.0]
    assert abs(support.dropped_mass.item() - 299 / 300) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_rows_are_flagged_get_no_support_and_disturb_no_other_row(dtype):
    hidden, head = model_like(5, 1000, 32)
    logits = (hidden @ head.T).to(dtype)
    good = select_support(logits, TAUS[:5], hidden, head)
    logits[0, 7], logits[2, 9], logits[3] = torch.nan, torch.inf, -torch.inf
    assert bad_rows(logits).tolist() == [True, False, True, True, False]
    support = select_support(logits, TAUS[:5], hidden, head)
    assert (support.offsets.diff() == 0).tolist() == [True, False, True, True, False]
    assert support.top_ids[[0, 2, 3]].tolist() == [0, 0, 0] and support.dropped_mass.isfinite().all()
    for row in (1, 4):
        assert all(torch.equal(a, b) for a, b in zip(row_of(support, row), row_of(good, row), strict=True))


@pytest.mark.parametrize("tau", [1e-4, 3e-3, 0.05, 0.5, 1.0, 2.0])
def test_rescored_support_of_bf16_logits_is_that_of_exact_logits(tau):
    hidden, head = model_like(48, 8192, 64)
    logits = hidden @ head.T
    exact = hidden.double() @ head.double().T
    taus = torch.full((48,), tau)
    support = select_support(logits, taus, hidden, head)
    probs = exact_probs(exact, taus)
    assert_is_support(support, probs, neighbour=max(5e-3, 2e-5 / tau), tolerance=max(1e-4, 2e-5 / tau))
    assert torch.equal(support.top_ids, exact.argmax(-1))
    dropped = (probs * (dense_form(support, 8192) == 0)).sum(-1)
    assert torch.allclose(support.dropped_mass.double(), dropped, rtol=0.1, atol=1e-7)


def test_bf16_logits_alone_would_pick_other_tops():
    """What rescoring is for: rounding moves or ties the argmax of some rows."""
    hidden, head = model_like(256, 2048, 16)
    hidden = hidden * 0.3
    rounded, exact = hidden @ head.T, hidden.double() @ head.double().T
    support = select_support(rounded, torch.full((256,), 1e-4), hidden, head)
    assert (rounded.argmax(-1) != exact.argmax(-1)).any()
    assert torch.equal(support.top_ids, exact.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 49152])
def test_a_row_alone_is_bit_for_bit_the_row_in_its_batch(dtype, vocabulary):
    hidden, head = model_like(7, vocabulary, 48)
    logits = (hidden @ head.T).to(dtype)
    batch = select_support(logits, TAUS, hidden, head)
    means = mix(batch.ids, batch.probs, batch.offsets, head, dtype)
    for row in range(7):
        part = slice(row, row + 1)
        alone = select_support(logits[part], TAUS[part], hidden[part], head)
        assert all(torch.equal(a, b) for a, b in zip(row_of(alone, 0), row_of(batch, row), strict=True))
        assert torch.equal(mix(alone.ids, alone.probs, alone.offsets, head, dtype)[0], means[row])


def test_logits_may_be_a_view_that_drops_padding():
    padded = torch.randn(3, 192)
    a, b = select_support(padded[:, :128], TAUS[-3:]), select_support(padded[:, :128].contiguous(), TAUS[-3:])
    assert torch.equal(a.ids, b.ids) and torch.equal(a.probs, b.probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mixture_is_the_weighted_sum_and_blocks_do_not_show(dtype, monkeypatch):
    embedding = torch.randn(500, 40)
    support = select_support(torch.randn(7, 500) * 3, TAUS)
    whole = mix(support.ids, support.probs, support.offsets, embedding, dtype)
    exact = dense_form(support, 500) @ embedding.to(dtype).double()
    assert whole.dtype == torch.float32 and (whole - exact).abs().max() < 1e-6
    assert torch.equal(mix(support.ids, support.probs, support.offsets, embedding.to(dtype), dtype), whole)
    for entries in (1, 300, 700):
        monkeypatch.setattr(soft_embedding, "MIX_ENTRIES", entries)
        assert torch.equal(mix(support.ids, support.probs, support.offsets, embedding, dtype), whole)


def test_the_mixture_is_within_its_bound_of_the_dense_mean():
    """|mean - dense| <= 2 (dropped mass) max |E_v|: the renormalised form's bound."""
    logits, embedding = torch.randn(7, 3000) * 4, torch.randn(3000, 24)
    support = select_support(logits, TAUS)
    mean = mix(support.ids, support.probs, support.offsets, embedding, torch.float32)
    dense = dense_mean(logits, TAUS, embedding)
    bound = 2 * support.dropped_mass * embedding.norm(dim=1).max()
    assert ((mean - dense).norm(dim=1) <= bound + 1e-5).all()
    assert (dense - exact_probs(logits, TAUS) @ embedding.double()).abs().max() < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rebuild_is_mixture_plus_noise_rounded_once(dtype):
    embedding = torch.randn(500, 42).to(dtype)
    support = select_support(torch.randn(7, 500) * 3, TAUS)
    sigma, seeds, positions = torch.linspace(0, 0.3, 7), torch.arange(7) + 2**50, torch.arange(7) * 11
    record = (support.ids, support.probs, support.offsets)
    result = rebuild(*record, embedding, sigma, seeds, positions, dtype)
    mean = mix(*record, embedding, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, (mean + sigma[:, None] * normal_rows(seeds, positions, 42)).to(dtype))
    assert torch.equal(result[0], mean[0].to(dtype))  # sigma 0
    assert torch.equal(rebuild(*record, embedding, sigma[:1].expand(7), seeds[:1].expand(7), positions, dtype)[0], result[0])
    alone = rebuild(
        support.ids[support.offsets[4] : support.offsets[5]],
        support.probs[support.offsets[4] : support.offsets[5]],
        support.offsets[4:6] - support.offsets[4],
        *(embedding, sigma[4:5], seeds[4:5], positions[4:5], dtype),
    )
    assert torch.equal(alone[0], result[4])


def test_no_rows_and_empty_rows():
    embedding = torch.randn(10, 4)
    none = select_support(torch.empty(0, 10), torch.empty(0))
    assert none.offsets.tolist() == [0] and len(none.ids) == 0
    ids, probs = torch.tensor([3], dtype=torch.int32), torch.ones(1)
    for dtype in (torch.float32, torch.bfloat16):
        assert mix(none.ids, none.probs, none.offsets, embedding, dtype).shape == (0, 4)
        means = mix(ids, probs, torch.tensor([0, 0, 1, 1]), embedding, dtype)
        assert torch.equal(means[[0, 2]], torch.zeros(2, 4)) and torch.equal(means[1], embedding[3].to(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_is_over_all_entries_without_rounding(dtype, monkeypatch):
    monkeypatch.setattr(soft_embedding, "RMS_ROWS", 7)  # so that there are several blocks, the last one smaller
    embedding = torch.randn(30, 5).to(dtype)
    embedding[11] *= 1e4
    assert rms(embedding) == pytest.approx(float(embedding.double().square().mean().sqrt()), rel=1e-14)


RECORD = {  # of two rows, in the order of the arguments of `rebuild`
    "ids": torch.tensor([1, 4, 2]).int(),
    "probs": torch.tensor([0.5, 0.5, 1.0]),
    "offsets": torch.tensor([0, 2, 3]),
    "embedding": torch.ones(10, 4),
    "sigma": torch.ones(2),
    "seeds": torch.arange(2),
    "positions": torch.arange(2),
    "dtype": torch.float32,
}
RECORD_ERRORS = [
    ("ids", torch.tensor([1.0, 4.7, 2.0]), r"ids: dtype torch.float32, expected torch.int32 or torch.int64"),
    ("ids", torch.tensor([1, 4, 2], device="meta").int(), r"ids: on meta, expected cpu, where embedding is"),
    ("probs", torch.ones(3).double(), r"probs: dtype torch.float64, expected torch.float32"),
    ("probs", torch.ones(3, device="meta"), r"probs: on meta, expected cpu, where embedding is"),
    ("probs", torch.tensor([0.0, 0.0, 1.0]), r"probs: 1 of 2 rows have entries of no mass, expected probabilities that sum to 1"),
    ("probs", torch.tensor([1.0, torch.nan, 0.0]), r"probs: 2 of 2 rows have entries of no mass"),
    ("probs", torch.ones(6)[::2], r"probs: shape \[3\] with strides \[2\], expected a contiguous tensor"),
    ("offsets", torch.tensor([0, 2, 3]).int(), r"offsets: dtype torch.int32, expected torch.int64"),
    ("offsets", torch.tensor([0, 2, 3], device="meta"), r"offsets: on meta, expected cpu, where embedding is"),
    ("offsets", torch.empty(0, dtype=torch.int64), r"offsets: shape \[0\], expected offsets that rise from 0 to 3, the entries"),
    ("embedding", torch.ones(10, 4).int(), r"embedding: dtype torch.int32, expected torch.float32 or torch.bfloat16 or"),
    ("embedding", torch.ones(10, 8)[:, ::2], r"embedding: shape \[10, 4\] with strides \[8, 2\], expected a contiguous tensor"),
    ("embedding", torch.ones(4), r"embedding: shape \[4\], expected \[V, n0\] = \[any, any\]"),
    ("dtype", torch.int8, r"dtype: torch.int8, expected torch.float32 or torch.bfloat16 or torch.float16"),
]
NOISE_ERRORS = [
    ("sigma", torch.ones(2).double(), r"sigma: dtype torch.float64, expected torch.float32"),
    ("sigma", torch.ones(2, device="meta"), r"sigma: on meta, expected cpu, where \w+ is"),
    ("seeds", torch.arange(2).int(), r"seeds: dtype torch.int32, expected torch.int64"),
    ("seeds", torch.arange(2, device="meta"), r"seeds: on meta, expected cpu, where \w+ is"),
    ("positions", torch.arange(3), r"positions: shape \[3\], expected \[R\] = \[2\]"),
    ("positions", torch.arange(2, device="meta"), r"positions: on meta, expected cpu, where \w+ is"),
]


@pytest.mark.parametrize(("name", "value", "message"), RECORD_ERRORS)
def test_a_wrong_record_is_named_before_it_is_mixed(name, value, message, monkeypatch):
    monkeypatch.setattr(soft_embedding, "_mix", lambda *_: pytest.fail("work was begun"))
    wrong = RECORD | {name: value}
    with pytest.raises(ValueError, match=message):
        mix(*(wrong[argument] for argument in ("ids", "probs", "offsets", "embedding", "dtype")))
    with pytest.raises(ValueError, match=message):
        rebuild(**wrong)


@pytest.mark.parametrize(("name", "value", "message"), NOISE_ERRORS)
def test_wrong_keys_of_the_noise_are_named_before_it_is_made(name, value, message, monkeypatch):
    monkeypatch.setattr(soft_embedding, "_mix", lambda *_: pytest.fail("work was begun"))
    monkeypatch.setattr(soft_embedding, "normal_rows", lambda *_: pytest.fail("work was begun"))
    wrong = RECORD | {name: value}
    with pytest.raises(ValueError, match=message):
        rebuild(**wrong)
    with pytest.raises(ValueError, match=message):
        add_noise(torch.zeros(2, 4), wrong["sigma"], wrong["seeds"], wrong["positions"], torch.float32)


def test_wrong_inputs_are_named():
    logits, tau = torch.randn(2, 10), torch.ones(2)
    with pytest.raises(ValueError, match=r"logits: bfloat16 without hidden and head"):
        select_support(logits.bfloat16(), tau)
    with pytest.raises(ValueError, match=r"tau: shape \[1\], expected \[R\] = \[2\]"):
        select_support(logits, tau[:1])
    with pytest.raises(ValueError, match=r"logits: dtype torch.float16"):
        select_support(logits.half(), tau)
    with pytest.raises(ValueError, match=r"head: shape \[9, 3\], expected a row for each of the 10 logits"):
        select_support(logits.bfloat16(), tau, torch.randn(2, 3), torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"threshold: 0, expected a number above 0"):
        select_support(logits, tau, threshold=0)
    with pytest.raises(ValueError, match=r"logits: shape \[2, 10\], expected \[R, V\] = \[any, 9\]"):
        dense_mean(logits, tau, torch.randn(9, 3))
    with pytest.raises(ValueError, match=r"embedding: on meta, expected cpu, where logits is"):
        dense_mean(logits, tau, torch.ones(10, 3, device="meta"))
    with pytest.raises(ValueError, match=r"tau: dtype torch.float64, expected torch.float32"):
        select_support(logits, tau.double())
    with pytest.raises(ValueError, match=r"tau: on meta, expected cpu, where logits is"):
        select_support(logits, tau.to("meta"))
    with pytest.raises(ValueError, match=r"head: on meta, expected cpu, where logits is"):
        select_support(logits.bfloat16(), tau, torch.randn(2, 3), torch.ones(10, 3, device="meta"))
    with pytest.raises(ValueError, match=r"hidden: dtype torch.int64, expected torch.float32 or"):
        select_support(logits.bfloat16(), tau, torch.ones(2, 3).long(), torch.randn(10, 3))
    found = screen(logits, tau)
    with pytest.raises(ValueError, match=r"values: shape \[0\], expected \[N\] = \[\d+\]"):
        settle(found, found.logits[:0], tau)
    with pytest.raises(ValueError, match=r"ids: dtype torch.float32, expected torch.int32 or torch.int64"):
        rescore(found.rows, found.ids.float(), torch.randn(2, 3), torch.randn(10, 3))
    with pytest.raises(ValueError, match=r"embedding: shape \[0, 3\], expected entries to average over"):
        rms(torch.empty(0, 3))
    support = select_support(logits, tau)
    with pytest.raises(ValueError, match=r"sigma: shape \[3\], expected \[R\] = \[2\]"):
        record = (support.ids, support.probs, support.offsets, torch.randn(10, 4))
        rebuild(*record, torch.ones(3), torch.arange(2), torch.arange(2), torch.float32)
    with pytest.raises(ValueError, match=r"sigma: shape \[2\] with 1 elements not at least 0, expected every element at least 0"):
        rebuild(*record, torch.tensor([0.0, -1.0]), torch.arange(2), torch.arange(2), torch.float32)
    with pytest.raises(ValueError, match=r"tau: shape \[2\] with 2 elements not above 0, expected every element above 0"):
        select_support(logits, torch.tensor([0.0, torch.nan]))
    for ids, message in (([0, 10], "from 0 to 10"), ([-1, 5], "from -1 to 5")):
        with pytest.raises(ValueError, match=rf"ids: values {message}, expected ids in \[0, 10\)"):
            mix(torch.tensor(ids).int(), torch.ones(2), torch.tensor([0, 1, 2]), torch.randn(10, 4), torch.float32)
    for offsets in ([0, 1], [1, 2], [0, 3, 2], []):
        with pytest.raises(ValueError, match=r"offsets: shape \[\d\], expected offsets that rise from 0 to 2, the entries"):
            offsets = torch.tensor(offsets, dtype=torch.int64)
            mix(torch.tensor([0, 1]).int(), torch.ones(2), offsets, torch.randn(10, 4), torch.float32)

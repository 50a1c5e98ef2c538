"""The support that Triton selects is the brute-force one, whatever the vocabulary, the capacity and the other rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kernels import soft_embedding
from kernels.soft_embedding import SupportBatch
from kernels.triton_select import BLOCK, FixedSupport, allocate, select, select_support, support_batch

THRESHOLD = 1e-6
PROBABILITY = 4e-6  # relative error allowed of a probability; 2**-22 a part of exp, division and the sum
TAUS = torch.tensor([1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0, 2.0])
SHAPES = [(1, 1), (1, 50), (2, 64), (7, 65), (7, 1000), (1, BLOCK), (2, BLOCK + 1), (3, 2 * BLOCK + 700)]


def row_of(support: SupportBatch, row: int) -> tuple[Tensor, ...]:
    entries = slice(int(support.offsets[row]), int(support.offsets[row + 1]))
    return support.ids[entries], support.probs[entries], support.dropped_mass[row], support.top_ids[row]


def same(left: SupportBatch, right: SupportBatch) -> bool:
    names = ("ids", "probs", "offsets", "dropped_mass", "top_ids")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


def selected(logits: Tensor, tau: Tensor, capacity: int) -> FixedSupport:
    support = allocate(len(logits), logits.shape[1], capacity, logits.device)
    select(support, logits, tau)
    return support


@pytest.mark.parametrize(("rows", "vocabulary"), SHAPES)
@pytest.mark.parametrize("scale", [0.5, 6.0])
def test_the_support_is_the_brute_force_one(rows, vocabulary, scale, device):
    logits, tau = torch.randn(rows, vocabulary) * scale, TAUS[-rows:]
    support = select_support(logits.to(device), tau.to(device))
    probs = torch.softmax(logits.double() / tau.double()[:, None], -1)
    for row in range(rows):
        ids, found, dropped, top = (part.cpu() for part in row_of(support, row))
        kept = torch.zeros(vocabulary, dtype=torch.bool)
        kept[ids.long()] = True
        differs = kept != (probs[row] > THRESHOLD)
        assert ((probs[row, differs] / THRESHOLD - 1).abs() < 1e-5).all()  # only tokens that stand at the threshold
        assert (ids.diff() > 0).all()
        exact = probs[row, kept] / probs[row, kept].sum()
        assert (found.double() / exact - 1).abs().max() < PROBABILITY
        assert abs(dropped.double() - probs[row, ~kept].sum()) < 1e-4 * probs[row, ~kept].sum() + 1e-12
        assert top == logits[row].argmax()
    reference = soft_embedding.select_support(logits, tau)
    for name in ("ids", "probs", "offsets", "dropped_mass", "top_ids"):
        assert getattr(support, name).dtype == getattr(reference, name).dtype


def test_ties_keep_every_winner_and_the_lowest_id_is_on_top(device):
    logits = torch.zeros(4, BLOCK + 200)
    logits[0, [BLOCK + 199, 70, BLOCK + 3]] = 9.0
    logits[1, [3, 4]] = 5.0
    logits[3] = 1e-3 * (torch.arange(BLOCK + 200) == BLOCK + 5)
    tau = torch.tensor([1e-4, 1e-4, 1.0, 1.0], device=device)
    support = select_support(logits.to(device), tau, 1e-3)
    assert support.top_ids.tolist() == [70, 3, 0, BLOCK + 5]
    assert support.ids[:5].tolist() == [70, BLOCK + 3, BLOCK + 199, 3, 4]
    assert torch.equal(support.probs[:5].cpu(), torch.tensor([1 / 3] * 3 + [0.5] * 2))
    # Every probability of the last two rows is below the threshold: only what is most probable is selected.
    assert support.offsets.diff().tolist() == [3, 2, BLOCK + 200, 1]
    assert support.ids[-1] == BLOCK + 5 and abs(float(support.dropped_mass[3]) - (1 - 1 / (BLOCK + 200))) < 1e-6


def test_bad_padded_and_skipped_rows(device):
    logits = torch.randn(7, BLOCK + 130) * 0.01
    logits[0, 7], logits[1, BLOCK + 9], logits[2] = torch.nan, torch.inf, -torch.inf
    logits[3:, 100:] = -torch.inf
    logits[4, :99] = -torch.inf
    tau = torch.tensor([0.5, 0.5, 0.5, 2.0, 1e-4, 0.0, 0.5], device=device)
    logits = logits.to(device)
    support = selected(logits, tau, 128)
    assert support.counts.tolist() == [0, 0, 0, 100, 1, 0, 100]
    assert support.dropped_mass[:3].tolist() == support.top_ids[:3].tolist() == [0, 0, 0]
    assert not support.overflow.any() and support.dropped_mass.isfinite().all()
    batch = support_batch(support, logits, tau)
    assert batch.ids.max() < 100 and row_of(batch, 4)[0].tolist() == [99] and row_of(batch, 4)[1].tolist() == [1.0]
    alone = select_support(logits[3:5].contiguous(), tau[3:5])
    assert all(torch.equal(a, b) for row in (0, 1) for a, b in zip(row_of(alone, row), row_of(batch, row + 3), strict=True))


@pytest.mark.parametrize("capacity", [1, 37])
def test_a_row_that_overflows_is_flagged_and_still_given_in_full(capacity, device):
    logits, tau = (torch.randn(7, 600) * 4).to(device), TAUS.to(device)
    support, whole = selected(logits, tau, capacity), selected(logits, tau, 600)
    assert not whole.overflow.any() and (whole.counts > 37).any()
    assert torch.equal(support.overflow, whole.counts > capacity) and torch.equal(support.counts, whole.counts)
    for row, count in enumerate(whole.counts.clamp_max(capacity).tolist()):
        assert torch.equal(support.ids[row, :count], whole.ids[row, :count])
        assert torch.equal(support.probs[row, :count], whole.probs[row, :count])
    assert same(support_batch(support, logits, tau), support_batch(whole, logits, tau))


def test_a_row_does_not_depend_on_its_batch_nor_on_what_the_buffers_held(device):
    logits, tau = (torch.randn(4, BLOCK + 99) * 3).to(device), TAUS[::2].contiguous().to(device)
    buffers = allocate(9, BLOCK + 99, 64, device)
    select(buffers, logits.flip(0), tau)
    select(buffers, logits, tau)
    batch = support_batch(buffers, logits, tau)
    assert same(batch, select_support(logits, tau))
    for row in (0, 3):
        alone = select_support(logits[row : row + 1], tau[row : row + 1])
        assert all(torch.equal(a, b) for a, b in zip(row_of(alone, 0), row_of(batch, row), strict=True))


def test_logits_may_be_a_view_that_drops_padding(device):
    padded = torch.randn(3, 192, device=device)
    tau = TAUS[-3:].to(device)
    assert same(select_support(padded[:, :130], tau), select_support(padded[:, :130].contiguous(), tau))


def test_no_rows(device):
    none = select_support(torch.empty(0, 10, device=device), torch.empty(0, device=device))
    assert none.offsets.tolist() == [0] and len(none.ids) == len(none.top_ids) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"logits": a["logits"].bfloat16()}, r"logits: dtype torch.bfloat16, expected torch.float32"),
        (lambda a: a | {"logits": a["logits"][0]}, r"logits: shape \[10\], expected \[R, V\] = \[any, any\]"),
        (lambda a: a | {"logits": torch.randn(10, 2).T}, r"logits: strides \[1, 2\], expected contiguous rows"),
        (lambda a: a | {"logits": torch.randn(3, 10)}, r"logits: shape \[3, 10\], expected \[R, V\] with at most 2 rows"),
        (lambda a: a | {"logits": torch.randn(2, 5000)}, r"logits: shape \[2, 5000\], .* 1 to 4096 columns, as allocated"),
        (lambda a: a | {"tau": a["tau"][:1]}, r"tau: shape \[1\], expected \[R\] = \[2\]"),
        (lambda a: a | {"tau": a["tau"].double()}, r"tau: dtype torch.float64, expected torch.float32"),
        (lambda a: a | {"tau": torch.ones(4)[::2]}, r"tau: shape \[2\] with strides \[2\], expected a contiguous tensor"),
        (lambda a: a | {"tau": torch.ones(2, device="meta")}, r"tau: on meta, expected .*, where logits is"),
        (lambda a: a | {"threshold": 0.0}, r"threshold: 0.0, expected a number above 0"),
    ],
)
def test_wrong_inputs_are_named_before_any_launch(change: Callable, message, device):
    support = allocate(2, 10, 4, device)
    arguments = {"logits": torch.randn(2, 10, device=device), "tau": torch.ones(2, device=device), "threshold": 1e-6}
    changed = {name: value.to(device) if name == "logits" else value for name, value in change(arguments).items()}
    with pytest.raises(ValueError, match=message):
        select(support, **changed)
    assert not support.block_sum.any()


def test_no_room_is_refused():
    with pytest.raises(ValueError, match=r"capacity: 0, expected a number above 0"):
        allocate(2, 10, 0, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_public_function_is_this():
    logits, tau = (torch.randn(7, 5000) * 3).cuda(), TAUS.cuda()
    assert same(soft_embedding.select_support(logits, tau), select_support(logits, tau))

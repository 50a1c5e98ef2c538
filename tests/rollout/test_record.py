"""The arena holds exactly the steps that were appended, whatever their order over the slots and however often it grew."""

from random import Random

import numpy as np
import pytest
import torch

from kernels.soft_embedding import SupportBatch
from rollout import record
from rollout.record import SupportArena, tensor_bytes

SLOTS, STEPS = 5, 9
Step = tuple[list[int], list[float], float]  # ids, probs, dropped mass


def batch_of(steps: list[Step]) -> SupportBatch:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids, _, _ in steps], dtype=np.int64)])
    return SupportBatch(
        ids=torch.tensor([i for ids, _, _ in steps for i in ids], dtype=torch.int32),
        probs=torch.tensor([p for _, probs, _ in steps for p in probs], dtype=torch.float32),
        offsets=torch.from_numpy(offsets),
        dropped_mass=torch.tensor([dropped for _, _, dropped in steps]),
        top_ids=torch.zeros(len(steps), dtype=torch.int64),
    )


def a_step(random: Random, longest: int) -> Step:
    count = random.choice([0, 1, random.randrange(longest), longest])
    probs = [float(np.float32(random.random())) for _ in range(count)]
    return sorted(random.sample(range(10 * longest), count)), probs, float(np.float32(random.random()))


def assert_holds(arena: SupportArena, slot: int, steps: list[Step], first: int, last: int) -> None:
    got = arena.steps(slot, first, last)
    assert [got.ids[a:b].tolist() for a, b in zip(got.offsets[:-1], got.offsets[1:], strict=True)] == [
        ids for ids, _, _ in steps[first:last]
    ]
    assert got.probs.tolist() == [p for _, probs, _ in steps[first:last] for p in probs]
    assert len(got.offsets) == last - first + 1 and got.offsets[0] == 0 and got.offsets[-1] == len(got.ids) == len(got.probs)
    assert arena.dropped[slot, first:last].tolist() == [dropped for _, _, dropped in steps[first:last]]
    assert [array.dtype.name for array in (got.ids, got.probs, got.offsets)] == ["int32", "float32", "int64"]


@pytest.mark.parametrize("seed", range(20))
def test_ragged_appends_are_naive_lists(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of some of the slots in any order; now and then a slot starts over for another request."""
    random = Random(seed)
    longest = random.randint(2, 30)
    monkeypatch.setattr(record, "FIRST_CAPACITY", random.randint(1, 8))
    arena = SupportArena(SLOTS, STEPS)
    naive: list[list[Step]] = [[] for _ in range(SLOTS)]
    for _ in range(25):
        for slot in range(SLOTS):
            if len(naive[slot]) == STEPS or random.random() < 0.02:
                naive[slot] = []
                arena.ends[slot] = 0
        slots = random.sample(range(SLOTS), random.randint(1, SLOTS))
        steps = [a_step(random, longest) for _ in slots]
        arena.append(np.array(slots), np.array([len(naive[slot]) for slot in slots]), batch_of(steps))
        for slot, step in zip(slots, steps, strict=True):
            naive[slot].append(step)
        for slot in range(SLOTS):
            last = random.randint(0, len(naive[slot]))
            assert_holds(arena, slot, naive[slot], random.randint(0, last), last)


def test_it_grows_to_what_is_needed_and_at_least_doubles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FIRST_CAPACITY", 4)
    arena, steps = SupportArena(2, 3), [(list(range(n)), [0.5] * n, 0.25) for n in (4, 1, 20)]
    for t, (step, capacity) in enumerate(zip(steps, (4, 8, 25), strict=True)):
        arena.append(np.array([1]), np.array([t]), batch_of([step]))
        assert arena.ids.shape == arena.probs.shape == (2, capacity)
    assert_holds(arena, 1, steps, 0, 3)
    assert_holds(arena, 0, [], 0, 0)


def test_what_is_handed_out_is_a_copy() -> None:
    arena, steps = SupportArena(1, 2), [([3, 5], [0.5, 0.5], 0.0), ([7], [1.0], 0.0)]
    for t, step in enumerate(steps):
        arena.append(np.array([0]), np.array([t]), batch_of([step]))
    got = arena.steps(0, 0, 2)
    got.ids[:], got.probs[:], got.offsets[:] = 0, 0, 0
    assert_holds(arena, 0, steps, 0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_raw_bytes_give_the_tensor_back(dtype: torch.dtype, rows: int) -> None:
    """Of no rows, too: a request may end before its first step."""
    tensor = torch.randn(6, rows, generator=torch.Generator().manual_seed(0)).to(dtype).T
    raw = tensor_bytes(tensor)
    assert raw.dtype == np.uint8 and raw.shape == (rows, 6 * tensor.element_size())
    if rows:
        assert torch.equal(torch.from_numpy(raw).view(dtype), tensor)
        raw[:] = 0
        assert tensor.all()  # the bytes were a copy

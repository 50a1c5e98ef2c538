"""Packing: what stands in which row, and that nothing is lost, repeated or too long."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import InputError
from configs.schema import Mode
from learner.batch import PackedBatch, pack, split_for_ranks
from rollout.trajectory import STOP_ANSWER_LENGTH, Trajectory


def trajectory(prompt: list[int], mode: Mode, cot: int, prefill: int, answer: int, sample_index: int = 0) -> Trajectory:
    """Made up: shadow ids from 10, prefill from 20, answer from 30; two support entries a soft step."""
    soft = mode is not Mode.hard
    return Trajectory(
        prompt_ids=np.array(prompt, np.int32),
        prompt_index=5,
        sample_index=sample_index,
        mode=mode,
        tau=0.5 if soft else 1.0,
        sigma=0.25 if soft else 0.0,
        noise_seed=77 + sample_index,
        shadow_ids=np.arange(10, 10 + cot, dtype=np.int32),
        support_ids=np.tile(np.array([1, 4], np.int32), cot if soft else 0),
        support_probs=np.tile(np.array([0.25, 0.75], np.float32), cot if soft else 0),
        support_offsets=2 * np.arange(cot + 1) * soft,
        dropped_mass=np.zeros(cot, np.float32),
        soft_embeddings=None,
        prefill_ids=np.arange(20, 20 + prefill, dtype=np.int32),
        answer_ids=np.arange(30, 30 + answer, dtype=np.int32),
        answer_logprobs=-np.ones(answer, np.float32),
        stop_reason=STOP_ANSWER_LENGTH,
        phrase_found=False,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )


def test_rows_of_a_soft_and_a_hard_sample_of_one_prompt() -> None:
    (batch,) = pack([(trajectory([1, 2, 3], Mode.soft, 2, 1, 2, 0), 0.5), (trajectory([1, 2, 3], Mode.hard, 1, 0, 1, 1), -1.0)], 64)
    #                                 prompt   soft 0: 2 CoT, prefill, 1st answer   hard 1: CoT
    assert batch.input_ids.tolist() == [1, 2, 3, 10, 11, 20, 30, 10]
    assert batch.position.tolist() == [0, 1, 2, 3, 4, 5, 6, 3]
    assert batch.segments.prompts.padded.tolist() == [[0, 1, 2]]
    assert batch.segments.samples.padded.tolist() == [[3, 4, 5, 6], [7, 0, 0, 0]]
    assert batch.segments.keys.padded.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 7, 0, 0, 0]]
    assert batch.segments.keys.flat.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 7]
    assert batch.segments.place.tolist() == batch.segments.padded_place.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]

    assert batch.soft.hidden_row.tolist() == [2, 3]  # the prompt's last row predicts the first step
    assert batch.soft.input_row.tolist() == [3, 4]
    assert batch.soft.position.tolist() == [3, 4]  # prompt length + t, the engine's counter of the noise
    assert batch.soft.seed.tolist() == [77, 77]
    assert batch.soft.tau.tolist() == [0.5, 0.5] and batch.soft.sigma.tolist() == [0.25, 0.25]
    assert batch.soft.support_offsets.tolist() == [0, 2, 4]
    assert batch.soft.weight.tolist() == [0.5, 0.5] and batch.soft.sample.tolist() == [0, 0]

    assert batch.hard.hidden_row.tolist() == [2] and batch.hard.target.tolist() == [10]  # the same prompt row
    assert batch.answer.hidden_row.tolist() == [5, 6, 7] and batch.answer.target.tolist() == [30, 31, 30]
    assert batch.answer.weight.tolist() == [0.5, 0.5, -1.0]
    assert 20 not in batch.answer.target.tolist() + batch.hard.target.tolist()  # forced prefill carries no loss
    assert batch.generated == 7


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(list(Mode)), st.integers(1, 12), st.integers(0, 3), st.integers(0, 4)),
        min_size=1,
        max_size=12,
    ),
    st.integers(8, 60),
    st.integers(1, 4),
)
def test_every_sample_is_packed_once_and_fits(shapes: list[tuple[int, Mode, int, int, int]], limit: int, ranks: int) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    weighted = [(trajectory(prompts[p], mode, c, f, a, i), float(i)) for i, (p, mode, c, f, a) in enumerate(shapes)]
    batches = pack(weighted, limit, ranks)
    assert sorted(i for batch in batches for i in batch.sample_index) == list(range(len(weighted)))
    assert all(batch.rows <= limit or len(batch.sample_index) == 1 for batch in batches)
    assert sum(batch.generated for batch in batches) == sum(t.generated for t, _ in weighted)
    for batch in batches:
        for steps in (batch.soft, batch.hard, batch.answer):
            names = torch.tensor(batch.sample_index)[steps.sample]
            assert steps.weight.tolist() == names.float().tolist()
        predicted = torch.cat([batch.soft.position, batch.position[batch.answer.hidden_row] + 1])
        rows = torch.cat([batch.soft.hidden_row, batch.answer.hidden_row])
        assert torch.equal(batch.position[rows] + 1, predicted)
        assert torch.equal(batch.position[batch.soft.input_row], batch.soft.position)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_ranks_get_equally_many_and_fillers_weigh_nothing(ranks: int) -> None:
    weighted = [(trajectory([1, 2, 3], Mode.soft, 4 + i, 1, 2, i), 1.0) for i in range(4)]
    shares = split_for_ranks(pack(weighted, 20), ranks)
    assert len({len(share) for share in shares}) == 1 and len(shares) == ranks
    real = [batch for share in shares for batch in share if not batch.filler]
    assert sorted(i for batch in real for i in batch.sample_index) == [0, 1, 2, 3]
    fillers = [batch for share in shares for batch in share if batch.filler]
    assert all(not steps.weight.any() for batch in fillers for steps in (batch.soft, batch.hard, batch.answer))
    assert len(fillers) == -len(real) % ranks


def test_a_group_that_fits_one_micro_batch_is_still_shared_by_all_ranks() -> None:
    weighted = [(trajectory([1, 2, 3], Mode.soft, 8, 1, 2, i), 1.0) for i in range(8)]
    batches = pack(weighted, 10_000, ranks=4)
    assert [len(batch.sample_index) for batch in batches] == [2, 2, 2, 2]


def test_a_prompt_stands_in_one_micro_batch_where_its_samples_fit() -> None:
    weighted = [(trajectory([p] * 20, Mode.soft, 8, 1, 2, i), 1.0) for i in range(8) for p in range(3)]  # 20 rows + 8 x 10 each
    batches = pack(weighted, 250)
    assert [batch.rows for batch in batches] == [200, 100]
    halves = pack(weighted[::3], 70)  # one prompt that does not fit: its samples are shared out evenly
    assert [batch.rows for batch in halves] == [60, 60]
    three = pack(weighted, 10_000, ranks=3)
    assert [batch.rows for batch in three] == [100, 100, 100]


def test_full_records_travel_only_if_every_sample_has_one() -> None:
    bare = trajectory([1], Mode.soft, 2, 0, 1)
    full = replace(bare, soft_embeddings=np.arange(2 * 16, dtype=np.uint8).reshape(2, 16))
    assert pack([(full, 1.0)], 64)[0].soft.recorded is not None
    assert pack([(full, 1.0), (bare, 1.0)], 64)[0].soft.recorded is None


def test_moving_a_batch_keeps_it() -> None:
    (batch,) = pack([(trajectory([1, 2], Mode.soft, 2, 1, 2), 1.0)], 64)
    moved = batch.to(torch.device("cpu"))
    assert isinstance(moved, PackedBatch) and torch.equal(moved.soft.seed, batch.soft.seed)
    assert moved.sample_index == batch.sample_index


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sigma": 0.0}, "gamma > 0"),
        ({"mode": Mode.hard, "tau": 0.0}, "tau > 0"),
        ({"prompt_ids": np.empty(0, np.int32)}, "prompt is empty"),
        ({"shadow_ids": np.empty(0, np.int32), "answer_ids": np.empty(0, np.int32)}, "nothing to learn"),
    ],
)
def test_what_has_no_log_probability_is_refused_by_name(change: dict[str, object], reason: str) -> None:
    with pytest.raises(InputError, match=f"prompt 5, sample 3.*{reason}"):
        pack([(replace(trajectory([1, 2], Mode.soft, 2, 1, 1, 3), **change), 1.0)], 64)  # type: ignore[arg-type]

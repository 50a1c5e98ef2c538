"""What ranks compute from their parts of a matrix is what one computes from all of it, and every rank gets the same bits."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from kernels.soft_embedding import rebuild, select_support
from rollout.soft_decoding import SoftDecoder
from rollout.vocab_rows import VocabRows
from tests.rollout.crowd import decode
from tests.rollout.slow_decoding import MOST_ANSWER, MOST_COT, PREFILLS, Toy, a_request, a_story, toy_tables
from tests.rollout.test_soft_decoding import DTYPES, assert_same_record

RANKS = pytest.mark.parametrize("ranks", [2, 3])
WAIT_S = 20  # a rank that calls when another does not

T = TypeVar("T")
AllReduce = Callable[[Tensor], Tensor]


def on_ranks(ranks: int, task: Callable[[int, AllReduce], T]) -> list[T]:
    """What `task` returns on each rank; ranks are threads, and an all-reduce sums in rank order and overwrites its argument."""
    barrier, parts = threading.Barrier(ranks), [torch.empty(0)] * ranks

    def of_rank(rank: int) -> T:
        def all_reduce(part: Tensor) -> Tensor:
            parts[rank] = part.clone()
            barrier.wait(WAIT_S)
            assert len({(part.shape, part.dtype) for part in parts}) == 1
            total = parts[0]
            for other in parts[1:]:
                total = total + other
            barrier.wait(WAIT_S)
            return part.copy_(total)

        return task(rank, all_reduce)

    with ThreadPoolExecutor(ranks) as pool:
        return [running.result() for running in [pool.submit(of_rank, rank) for rank in range(ranks)]]


def split(matrix: Tensor, rank: int, ranks: int, all_reduce: AllReduce) -> VocabRows:
    """A rank's part as vLLM cuts it: equally many rows, the last filled up with what must never matter."""
    each = -(-len(matrix) // ranks)
    rows = torch.full((each, matrix.shape[1]), torch.nan, dtype=matrix.dtype)
    mine = matrix[rank * each : (rank + 1) * each]
    rows[: len(mine)] = mine
    return VocabRows(rows, rank * each, all_reduce)


def split_decoder(toy: Toy, slots: int, rank: int, ranks: int, all_reduce: AllReduce) -> SoftDecoder:
    return SoftDecoder(
        slots=slots, max_cot_tokens=MOST_COT, max_answer_tokens=MOST_ANSWER, tables=toy_tables(), prefills=PREFILLS, stop_id=2,
        embedding=split(toy.embedding, rank, ranks, all_reduce), head=split(toy.head, rank, ranks, all_reduce),
    )  # fmt: skip


@DTYPES
@RANKS
def test_a_mixture_of_parts_is_the_mixture_of_the_whole(ranks: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, embedding = 3 * torch.randn(40, 1000), torch.randn(1000, 96).to(dtype)
    support = select_support(logits, torch.rand(40) + 0.1)
    row = (torch.full((40,), 0.33), torch.arange(40), torch.arange(40) + 7)
    record = (support.ids, support.probs, support.offsets)
    whole = rebuild(*record, embedding, *row, dtype)
    found = on_ranks(ranks, lambda rank, sums: split(embedding, rank, ranks, sums).soft_embeddings(*record, *row))
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert torch.allclose(found[0].float(), whole.float(), rtol=2.0**-7 if dtype == torch.bfloat16 else 0, atol=2e-6)


@RANKS
def test_noise_of_parts_is_that_of_the_whole_to_the_bit(ranks: int) -> None:
    embedding = torch.zeros(10, 50)
    record = (torch.tensor([1, 8, 9]).int(), torch.tensor([0.25, 0.75, 1.0]), torch.tensor([0, 2, 3]))
    row = (torch.tensor([0.5, 1.0]), torch.tensor([3, 4]), torch.tensor([5, 6]))
    whole = rebuild(*record, embedding, *row, torch.float32)
    found = on_ranks(ranks, lambda rank, sums: split(embedding, rank, ranks, sums).soft_embeddings(*record, *row))
    assert all(torch.equal(one, whole) for one in found)


@RANKS
def test_rescoring_with_parts_of_the_head_is_rescoring_with_the_whole_to_the_bit(ranks: int) -> None:
    torch.manual_seed(1)
    hidden, head = torch.randn(30, 64).bfloat16(), torch.randn(1000, 64).bfloat16()
    logits = hidden @ head.T
    for tau in (1e-4, 0.5):
        warmth = torch.full((30,), tau)
        whole = select_support(logits, warmth, hidden, head)
        for one in on_ranks(
            ranks, lambda rank, sums, warmth=warmth: split(head, rank, ranks, sums).support(logits, warmth, hidden)
        ):
            for name in ("ids", "probs", "offsets", "dropped_mass", "top_ids"):
                assert torch.equal(getattr(one, name), getattr(whole, name)), name


@RANKS
def test_a_row_is_known_to_every_rank(ranks: int) -> None:
    matrix = torch.randn(10, 4)

    def rows(rank: int, all_reduce: AllReduce) -> Tensor:
        mine = split(matrix, rank, ranks, all_reduce)
        return torch.stack([mine.row(token) for token in range(10)])

    assert all(torch.equal(found, matrix) for found in on_ranks(ranks, rows))


@DTYPES
@RANKS
def test_ranks_decode_as_one_does_whatever_changes_under_them(ranks: int, dtype: torch.dtype) -> None:
    """Batches change, outputs are discarded, the CoT is replayed to the bit; a rank on another path would wait for ever."""
    toy = Toy(dtype)
    stories = [a_story(toy, seed) for seed in range(100, 125)]
    one = decode(toy, toy.decoder(slots=7, stop_id=2), stories, Random(5))
    split_up = on_ranks(ranks, lambda rank, sums: decode(toy, split_decoder(toy, 7, rank, ranks, sums), stories, Random(5)))
    tolerance = 2.0**-6 if dtype == torch.bfloat16 else 1e-6
    for seen in split_up:
        for mine, first, alone in zip(seen, split_up[0], one, strict=True):
            assert (mine.emitted, mine.phases) == (alone.emitted, alone.phases)
            assert all(map(torch.equal, mine.inputs, first.inputs))
            for fed, expected in zip(mine.inputs, alone.inputs, strict=True):
                assert torch.allclose(fed.float(), expected.float(), rtol=tolerance, atol=tolerance)
            assert_same_record(mine.record, first.record)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 1), (torch.bfloat16, 2)], ids=["float32", "bfloat16"])
def test_a_step_of_soft_rows_costs_an_all_reduce_and_another_to_rescore(dtype: torch.dtype, expected: int) -> None:
    toy = Toy(dtype)
    hidden = toy.leaning_to([3, 4, 5, 6], seed=0)

    def step(rank: int, all_reduce: AllReduce) -> int:
        calls = []

        def counted(part: Tensor) -> Tensor:
            calls.append(part.dtype)
            return all_reduce(part)

        decoder = split_decoder(toy, 4, rank, 2, counted)
        slots = torch.tensor([decoder.admit(a_request(seed=seed)) for seed in range(4)])
        calls.clear()
        decoder.advance(slots, torch.zeros(4, dtype=torch.int64), toy.logits(hidden), hidden)
        assert set(calls) == {torch.float32}
        return len(calls)

    assert on_ranks(2, step) == [expected, expected]

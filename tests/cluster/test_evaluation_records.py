"""Every finished sample is a line at once; an interrupted evaluation goes on; every number comes back from the lines."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cluster.evaluation_records import EvaluationRecords, dataset_name, read_plan, read_records, record_of, summarise
from configs.errors import InputError
from tests.cluster.evaluations import PLAN, RIGHT, WRONG, scored

STEPS = [[0.5, 0.5], [0.25] * 4, [1.0]]


def fill(records: EvaluationRecords) -> None:
    """What PLAN asks for: hard greedy is right on problem 0; soft samples are right 2 and 1 times of 3."""
    answers = {("hard_greedy", 0): [RIGHT], ("hard_greedy", 1): [None]}
    answers |= {("soft_sample", 0): ["8", RIGHT, "7.0"], ("soft_sample", 1): ["9", "9", RIGHT]}
    for (setting, problem), texts in answers.items():
        for sample, text in enumerate(texts):
            if (problem, setting, sample) not in records.done:
                done = scored(problem, sample, text, setting=setting, steps=STEPS[: 1 + sample])
                if text == "7.0":
                    done = replace(done, correct=True, reward=100.0)
                records.add(setting, replace(done, timed_out=text == "9"))


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    sample = replace(scored(1, 2, "½ \u2028\\text{x} \ud83d", setting="soft_sample", steps=STEPS), timed_out=True)
    with EvaluationRecords(tmp_path / "test_000004", PLAN) as records:
        record = records.add("soft_sample", sample)
        assert list(read_records(records.path)) == [record]
    assert record == record_of(PLAN.dataset, "soft_sample", sample)
    assert (record.key, record.answer_text, record.timed_out) == ((1, "soft_sample", 2), sample.answer_text, True)
    assert record.entropy == [0.6931, 1.3863, 0.0] and record.support_size == [2, 4, 1] and record.dropped_mass == [1.23e-5] * 3
    assert (record.cot_length, record.answer_length, record.stop_reason) == (3, 2, "closed")
    assert read_plan(tmp_path / "test_000004" / "gsm8k_test.json") == PLAN


def test_each_line_is_there_before_the_next_sample_finishes(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        for sample in range(3):
            records.add("soft_sample", scored(0, sample, RIGHT, setting="soft_sample"))
            assert len(records.path.read_text().splitlines()) == sample + 1


def test_an_interrupted_evaluation_equals_one_that_was_not(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path / "whole", PLAN) as records:
        fill(records)
        whole = records.path.read_text()
        expected = [summary.row() for summary in records.summaries()]
    lines = whole.splitlines(keepends=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "gsm8k_test.jsonl").write_text("".join(lines[:4]) + lines[4][: len(lines[4]) // 2])
    with EvaluationRecords(tmp_path / "killed", PLAN) as records:
        assert records.done == {(0, "hard_greedy", 0), (1, "hard_greedy", 0), (0, "soft_sample", 0), (0, "soft_sample", 1)}
        assert sum(summary.missing for summary in records.summaries()) == 4
        fill(records)
        assert [summary.row() for summary in records.summaries()] == expected
    with EvaluationRecords(tmp_path / "killed", PLAN) as records:
        assert len(records.done) == 8


def test_a_sample_counts_once(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        fill(records)
        with pytest.raises(ValueError, match="recorded already"):
            records.add("hard_greedy", scored(0, 0, WRONG))
        row = records.summaries()[0].row()
        records.path.write_text(records.path.read_text() * 2)
        assert records.summaries()[0].row() == row


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_cot_tokens": 512}, r"gsm8k_test.json: max_cot_tokens = 8: this evaluation has 512, .*remove .*gsm8k_test\.\*"),
        ({"weights": "step 9"}, r"weights = step 4: this evaluation has step 9"),
        ({"seed": 1}, r"seed = 0: this evaluation has 1"),
        ({"fingerprints": ["0", "x", "2"]}, r"gsm8k_test.json: problem 1 of gsm8k:test had another .*remove .*gsm8k_test\.\*"),
        ({"fingerprints": ["x"]}, r"problem 0 of gsm8k:test had another question or answer"),
    ],
)
def test_records_of_two_evaluations_never_share_a_file(tmp_path: Path, change: dict[str, object], message: str) -> None:
    EvaluationRecords(tmp_path, PLAN).__exit__()
    with pytest.raises(InputError, match=message):
        EvaluationRecords(tmp_path, replace(PLAN, **change))


def test_a_plan_may_grow_by_samples_problems_and_settings(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        fill(records)
    grown = replace(PLAN, fingerprints=["0", "1", "2"], samples={"soft_greedy": 1, "hard_greedy": 1, "soft_sample": 4})
    with EvaluationRecords(tmp_path, grown) as records:
        assert len(records.done) == 8
        assert [(s.setting, s.missing) for s in records.summaries()] == [("hard_greedy", 1), ("soft_sample", 6)]
    assert read_plan(tmp_path / "gsm8k_test.json") == grown


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN), pytest.raises(InputError, match="another process writes"):
        EvaluationRecords(tmp_path, PLAN)


def test_a_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        fill(records)
    with open(records.path, "a") as file:
        file.write('{"dataset": "gsm8k:test"}\n')
    with pytest.raises(InputError, match=r"gsm8k_test.jsonl:9: not a sample's record \(missing .*'setting'"):
        list(read_records(records.path))
    (tmp_path / "gsm8k_test.json").write_text("{}")
    with pytest.raises(InputError, match=r"gsm8k_test.json: not the plan of an evaluation"):
        read_plan(tmp_path / "gsm8k_test.json")


# Numbers


def test_a_summary_holds_the_numbers_counted_by_hand(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        fill(records)
        greedy, soft = records.summaries()
    assert (greedy.setting, greedy.share, greedy.boxed, greedy.stop_reasons) == ("hard_greedy", 0.5, 1, {"closed": 1, "length": 1})
    assert soft.correct.tolist() == [2, 1] and soft.drawn.tolist() == [3, 3]
    # two of three right: 2/3, 1 - C(1,2)/C(3,2) = 1; one of three: 1/3, 2/3, 1
    assert soft.pass_at_k().tolist() == [pytest.approx([2 / 3, 1, 1]), pytest.approx([1 / 3, 2 / 3, 1])]
    assert soft.row()["pass_at_k"] == pytest.approx([1 / 2, 5 / 6, 1])
    assert soft.majority.tolist() == [1, 0]  # "7" and "7.0" outvote "8"; two "9" outvote the right one
    assert (soft.timed_out, soft.missing, soft.answer_tokens) == (2, 0, 12)
    assert soft.cot_lengths.tolist() == [1, 1, 2, 2, 3, 3]
    assert soft.entropy.counts.tolist() == [6, 4, 2] and soft.entropy.mean == pytest.approx([0.6931, 1.3863, 0])
    assert soft.support_size.mean.tolist() == [2, 4, 1]
    assert len(greedy.entropy.counts) == 0
    json.dumps(soft.row(), allow_nan=False)


def test_the_order_in_which_samples_finished_does_not_matter(tmp_path: Path) -> None:
    with EvaluationRecords(tmp_path, PLAN) as records:
        fill(records)
    found = list(read_records(records.path))
    shuffled = [found[i] for i in np.random.default_rng(0).permutation(len(found))]
    assert [s.row() for s in summarise(PLAN, shuffled)] == [s.row() for s in summarise(PLAN, found)]
    assert summarise(PLAN, []) == []


def test_a_data_set_has_a_name_that_tells_its_split() -> None:
    assert dataset_name("gsm8k:test") == "gsm8k:test"
    assert dataset_name({"path": "data/my.jsonl", "question": "q", "answer": "a"}) == "my.jsonl"
    assert dataset_name({"path": "/elsewhere/my.jsonl", "question": "q", "answer": "a", "split": "train"}) == "my.jsonl:train"


def test_a_data_set_of_the_hub_is_called_by_its_whole_id() -> None:
    fields = {"path": "org/name", "question": "q", "answer": "a"}
    names = [
        dataset_name(fields | more) for more in ({}, {"split": "test"}, {"config": "en", "split": "test"}, {"path": "other/name"})
    ]
    assert names == ["org/name", "org/name:test", "org/name/en:test", "other/name"]

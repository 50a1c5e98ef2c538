"""Splits never share a problem, bad data is refused with its place, and the order of a run is a pure function of its seed."""

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from configs.errors import InputError
from rollout import tasks
from rollout.tasks import BUILT_IN, batch_indices, final_answer, load_task
from tests.shared_data import SHARED, needs_shared

GSM8K_ROW = {"question": "Tom has 1,000 + 80 apples. How many?", "answer": "1,000 + 80 = <<1000+80=1080>>1,080.\n#### 1,080"}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def fields(path: str, **more: str) -> dict[str, str]:
    return {"path": path, "question": "question", "answer": "answer", **more}


# --- generated problems ----------------------------------------------------------------------------------------------


def operands(spec: str) -> set[tuple[int, ...]]:
    """Operand pairs of a split in ascending order, so that a pair and its swapped twin are one."""
    return {tuple(sorted(int(w) for w in p.question[8:-1].split(" + "))) for p in load_task(spec)}


def test_sums_and_products_are_right() -> None:
    for spec, sign in (("arithmetic:train", "+"), ("arithmetic:far", "+"), ("arithmetic:times", "*")):
        for problem in load_task(spec):
            a, b = (int(word) for word in problem.question.removeprefix("What is ").removesuffix("?").split(f" {sign} "))
            assert int(problem.answer) == (a + b if sign == "+" else a * b)


def test_no_pair_nor_its_twin_is_in_two_splits() -> None:
    train, validation, test = (operands(f"arithmetic:{split}") for split in ("train", "validation", "test"))
    assert not (train & validation or train & test or validation & test)
    assert train | validation | test == {(a, b) for b in range(1, 50) for a in range(1, b + 1)}
    assert len(validation) > 64 and len(test) > 64
    assert not (operands("arithmetic:far") & train)


def test_splits_stay_apart_when_their_ranges_differ() -> None:
    assert not (operands("arithmetic:train?low=1&high=20") & operands("arithmetic:validation"))
    assert operands("arithmetic:train?low=1&high=20") < operands("arithmetic:train")


def test_the_first_problems_are_a_fair_sample() -> None:
    first = [int(problem.answer) for problem in load_task("arithmetic:validation")[:64]]
    assert 40 < sum(first) / len(first) < 60  # all of them: 50


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arithmetic:dev", "no split 'dev'"),
        ("arithmetic:train?hihg=9", "unknown parameter 'hihg'"),
        ("arithmetic:train?high=many", "high='many': expected a whole number"),
        ("arithmetic:train?low=9&high=3", "low <= high"),
        ("arithmetic:train?high=100000", "expected at most 1,000 numbers"),
        ("arithmetic:validation?low=1&high=1", "no problems"),
        ("gsm8", "did you mean 'gsm8k'"),
        ("gsm8k:dev", "no split 'dev'; expected one of train, test, validation"),
        ("math500:validation", "expected one of test"),
        ("gsm8k?high=3", "no parameters"),
        ("data/train.jsonl", "{path: data/train.jsonl, question"),
    ],
)
def test_a_wrong_name_is_refused(spec: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        load_task(spec)
    assert message in str(refused.value) and "\n" not in str(refused.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_local_file_with_gsm8k_fields(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", GSM8K_ROW, "", GSM8K_ROW | {"question": "Again?\u2028Yes?"})
    problems = load_task(OmegaConf.create(fields(path)))
    assert [(p.index, p.question, p.answer) for p in problems] == [
        (0, GSM8K_ROW["question"], "1080"),
        (1, "Again?\u2028Yes?", "1080"),
    ]


def test_json_lists_jsonl_and_parquet_hold_the_same_problems(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    rows = [{"question": f"{i}?", "answer": f"\\boxed{{{i}}}"} for i in range(5)]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    write(tmp_path / "lines.json", *rows)
    write(tmp_path / "lines.jsonl", *rows)
    write_table(pyarrow.Table.from_pylist(rows), tmp_path / "table.parquet")
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress((tmp_path / "lines.jsonl").read_bytes()))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "lines.jsonl").read_bytes())  # as Windows writes it
    loaded = [load_task(fields(str(path))) for path in sorted(tmp_path.iterdir())]
    assert len(loaded) == 6 and all(problems == loaded[0] for problems in loaded)
    assert [p.answer for p in loaded[0]] == list("01234")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question": "a?", "answer": "1"}', '{"question": "b?", '], ":2: broken JSON"),
        ([GSM8K_ROW, {"question": "b?", "solution": "1"}], ":2: no field 'answer'; its fields are question, solution"),
        ([GSM8K_ROW, GSM8K_ROW, {"question": "b?", "answer": "think\n#### "}], ":3: field 'answer' is empty"),
        ([{"question": " ", "answer": "1"}], ":1: field 'question' is empty"),
        ([{"question": "a?", "answer": None}], ":1: field 'answer' is empty"),
        ([{"question": "a?", "answer": "so \\boxed{}."}], ":1: field 'answer' is empty; mend the row or remove it"),
        ([{"question": "a?", "answer": float("nan")}], ":1: field 'answer' is empty"),
        ([{"question": "a?", "answer": {"value": 1}}], ":1: field 'answer' holds a dict; expected text, a number or a list"),
        ([{"question": [{"role": "user"}], "answer": "1"}], ":1: field 'question' holds a list; expected text"),
        ([{"question": "a?", "answer": "Because. " * 200}], ":1: field 'answer' holds 1799 characters without \\boxed{} or ####"),
        (['{"question": "a\\ud800?", "answer": "1"}'], ":1: field 'question' holds half a character"),
        ([{"id": 3} | GSM8K_ROW, {"id": 4} | GSM8K_ROW, {"id": 3} | GSM8K_ROW], ":3: id 3 is also that of "),
        ([{"unique_id": "x"} | GSM8K_ROW] * 2, ":2: unique_id 'x' is also that of "),
        (["[1, 2]"], ": row 1: expected a JSON object with fields, got int"),
        (["3"], ":1: expected a JSON object with fields, got int"),
        ([], "holds no problems"),
        (["[]"], "holds no problems"),
    ],
)
def test_bad_data_is_refused_with_its_place(tmp_path: Path, lines: list[Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(InputError) as refused:
        load_task(fields(path))
    assert message in str(refused.value) and path in str(refused.value) and "\n" not in str(refused.value)


def test_other_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "a?", "answer": "1"}\n{"question": "\xe9?", "answer": "1"}\n')
    (tmp_path / "not.parquet").write_bytes(b"PAR?")
    (tmp_path / "list.json").write_text('[{"question": "a?",\n "answer" "1"}]')
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"question": "a?", "answer": "1"}\n')[:-9])
    (tmp_path / "table.csv").write_text("question,answer\n1?,1\n")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("latin.jsonl", ":2: not UTF-8"),
        ("not.parquet", "not a readable Parquet file"),
        ("list.json", "list.json:2: broken JSON"),
        ("cut.jsonl.gz", "cannot be read"),
        ("table.csv", "expected a name that ends with .jsonl"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(fields(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"path": "a.jsonl", "question": "q"}, "answer=None"),
        ({"path": "a.jsonl", "question": "q", "anwser": "a"}, "unknown key 'anwser'"),
    ],
)
def test_a_data_set_needs_its_three_keys(spec: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_task(spec)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("so 3.\n#### 1,234,567", "1234567"),
        ("so\n#### (1, 2), 1,000", "(1, 2), 1000"),
        ("7 \\boxed{6}\n#### 7\n", "7"),
        ("#### Final Answer\n\\boxed{7}", "7"),  # a heading of Markdown
        ("#### Step 1\n3\n#### Step 2\nso $\\boxed{\\frac12}$.", "\\frac12"),
        ("so \\boxed{7}.\n#### Remark\nIt is odd,\nand prime.", "7"),
        ("so\n#### $\\boxed{7}$", "7"),
        ("thus $\\boxed{\\frac{1}{2}}$, not \\boxed{3", "\\frac{1}{2}"),
        ("it is $\\boxed 7$.", "7"),
        (["$69$", "$84$"], "69, 84"),
        ("\\$18 and $x$", "\\$18 and x"),
        (17, "17"),
        (float("nan"), ""),
        ([3, "$x$", None], "3, x"),
        ([], ""),
    ],
)
def test_the_answer_that_is_graded(value: Any, answer: str) -> None:
    assert final_answer(value) == answer


# --- held-out problems and the hub -----------------------------------------------------------------------------------


def test_a_validation_split_is_held_out_of_train_by_hash(tmp_path: Path) -> None:
    rows = [{"question": f"{i % 900}?", "answer": str(i % 900)} for i in range(1000)]  # a hundred questions stand twice
    path = write(tmp_path / "train.jsonl", *rows)
    shuffled = write(tmp_path / "shuffled.jsonl", *reversed(rows))
    train, validation = (load_task(fields(path, split=split)) for split in ("train", "validation"))
    questions = {p.question for p in validation}
    assert not questions & {p.question for p in train}
    assert len(train) + len(validation) == 1000
    assert questions == {p.question for p in load_task(fields(shuffled, split="validation"))}
    assert [p.index for p in validation] == list(range(len(validation)))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of a hub data set: `datasets` reads both alike, a file for each split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    return folder


@pytest.fixture
def gsm8k_from_disk(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub_folder
    write(folder / "train.jsonl", *({"question": f"{i}?", "answer": f"#### {i}"} for i in range(80)))
    write(folder / "test.jsonl", GSM8K_ROW)
    monkeypatch.setitem(tasks.BUILT_IN, "gsm8k", replace(tasks.BUILT_IN["gsm8k"], path=str(folder), config=None))


@pytest.mark.usefixtures("gsm8k_from_disk")
def test_a_built_in_task_and_its_splits() -> None:
    train, validation, test = load_task("gsm8k"), load_task("gsm8k:validation"), load_task("gsm8k:test")
    assert (len(train), len(validation), len(test)) == (70, 10, 1)
    assert {p.answer for p in train} | {p.answer for p in validation} == {str(i) for i in range(80)}
    assert test[0].answer == "1080"
    assert load_task("gsm8k:train") == train


def test_a_hub_set_without_validation_holds_some_out_of_train(hub_folder: Path) -> None:
    write(hub_folder / "train.jsonl", *({"question": f"{i}?", "answer": f"{i}"} for i in range(80)))
    whole, train, validation = (
        load_task(fields(str(hub_folder), **split)) for split in ({}, {"split": "train"}, {"split": "validation"})
    )
    assert (len(whole), len(train), len(validation)) == (80, 70, 10)
    assert {p.answer for p in train} | {p.answer for p in validation} == {p.answer for p in whole}
    with pytest.raises(InputError, match="no split 'test'; expected one of train"):
        load_task(fields(str(hub_folder), split="test"))


def test_a_hub_set_keeps_its_own_validation(hub_folder: Path) -> None:
    write(hub_folder / "train.jsonl", *({"question": f"{i}?", "answer": f"{i}"} for i in range(80)))
    write(hub_folder / "validation.jsonl", {"question": "100?", "answer": "100"})
    assert len(load_task(fields(str(hub_folder), split="train"))) == 80
    assert [p.answer for p in load_task(fields(str(hub_folder), split="validation"))] == ["100"]


def test_unusable_rows_of_a_hub_set_are_left_out_counted_and_said(hub_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [{"id": i, "question": f"{i}?", "answer": f"{i}"} for i in range(6)]
    bad = [good[2], {"id": 7, "question": "", "answer": "7"}, {"id": 8, "question": "8?", "answer": None}, good[4]]
    write(hub_folder / "train.jsonl", *good, *bad)
    said: list[str] = []
    assert [p.answer for p in load_task(fields(str(hub_folder)), said.append)] == list("012345")
    assert len(said) == 1
    where = f"{hub_folder} [train]: row"
    assert f"left out 4 of 10 rows: {where} 6: id 2 is also that of {where} 2; {where} 7: field 'question' is empty; " in said[0]
    assert said[0].endswith(f"{where} 8: field 'answer' is empty; ...")
    load_task(fields(str(hub_folder)))
    assert capsys.readouterr().err.endswith(f"softrl: {said[0]}\n")  # unless someone else listens


def test_an_unreachable_hub_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(InputError) as refused:
        load_task(fields("no-such-owner/no-such-set"))
    assert "no-such-owner/no-such-set: the Hugging Face hub did not deliver it" in str(refused.value)
    assert "\n" not in str(refused.value)


@needs_shared
@pytest.mark.parametrize(
    ("file", "question", "answer", "count"),
    [
        ("gsm8k/train.jsonl", "question", "answer", 7473),
        ("gsm8k/test.jsonl", "question", "answer", 1319),
        ("math500/test.jsonl", "problem", "answer", 500),
        ("olympiadbench/test.jsonl", "question", "final_answer", 675),
    ],
)
def test_the_real_data_sets_load_with_their_official_counts(file: str, question: str, answer: str, count: int) -> None:
    problems = load_task({"path": str(SHARED / file), "question": question, "answer": answer})
    assert len(problems) == count
    if file.startswith("gsm8k"):
        assert all(problem.answer.lstrip("-").replace(".", "").isdigit() for problem in problems)


@needs_shared
@pytest.mark.parametrize(
    ("name", "hub_file", "file", "count"),
    [
        ("gsm8k:test", "test.jsonl", "gsm8k/test.jsonl", 1319),
        ("math500", "test.jsonl", "math500/test.jsonl", 500),
        ("olympiadbench", "train.jsonl", "olympiadbench/test.jsonl", 675),
    ],
)
def test_built_in_tasks_read_the_hubs_own_fields(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub_file: str, file: str, count: int
) -> None:
    shutil.copyfile(SHARED / file, hub_folder / hub_file)
    task = name.partition(":")[0]
    monkeypatch.setitem(tasks.BUILT_IN, task, replace(BUILT_IN[task], path=str(hub_folder), config=None))
    said: list[str] = []
    problems = load_task(name, said.append)
    assert (len(problems), said) == (count, [])
    by_path = {"path": str(SHARED / file), "question": BUILT_IN[task].question, "answer": BUILT_IN[task].answer}
    assert problems == load_task(by_path)


@needs_shared
def test_the_box_of_every_math_solution_is_its_answer() -> None:
    path = str(SHARED / "math500/test.jsonl")
    answers, boxes = (load_task({"path": path, "question": "problem", "answer": field}) for field in ("answer", "solution"))
    assert sum(a.answer.replace(" ", "") == b.answer.replace(" ", "") for a, b in zip(answers, boxes, strict=True)) >= 498


@needs_shared
def test_gsm8k_holds_out_512() -> None:
    path = str(SHARED / "gsm8k/train.jsonl")
    assert [len(load_task(fields(path, split=split))) for split in ("validation", "train")] == [512, 7473 - 512]


# --- order -----------------------------------------------------------------------------------------------------------


@given(problems=st.integers(1, 60), per_step=st.integers(1, 60), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10**6))
def test_an_epoch_takes_no_problem_twice(problems: int, per_step: int, seed: int, epoch: int) -> None:
    if per_step > problems:
        with pytest.raises(InputError, match=r"rollout\.prompts_per_step"):
            batch_indices(problems, 0, per_step, seed)
        return
    steps = problems // per_step
    drawn = [i for step in range(steps) for i in batch_indices(problems, epoch * steps + step, per_step, seed)]
    assert len(drawn) == steps * per_step == len(set(drawn))
    assert set(drawn) <= set(range(problems))


def test_epochs_and_seeds_differ_and_the_order_is_fixed() -> None:
    assert batch_indices(100, 3, 8, seed=0) == batch_indices(100, 3, 8, seed=0)
    assert batch_indices(100, 0, 8, seed=0) != batch_indices(100, 12, 8, seed=0)  # the next epoch
    assert batch_indices(100, 0, 8, seed=0) != batch_indices(100, 0, 8, seed=1)
    assert batch_indices(1000, 7, 4, seed=5) == [958, 29, 247, 160]
    assert {i for step in range(200) for i in batch_indices(10, step, 4, seed=0)} == set(range(10))

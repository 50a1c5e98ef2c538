"""The problems: from a generator, a local file or the Hugging Face hub into one list of (question, answer), and their order.

    "gsm8k", "gsm8k:validation", "math500:test" ...      built in, from the hub (BUILT_IN)
    "arithmetic:train?low=1&high=49"                     built in, generated (arithmetic.py)
    {path, question, answer[, split, config]}            a .jsonl, .json or .parquet file, or a hub id; the fields' names

Whatever the source, the answer is what a grader compares: after `####` where a solution ends so (GSM8K), else the last
\\boxed{...} (MATH), else the field itself.
"""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from configs.errors import InputError
from rollout import arithmetic
from rollout.reward import extract_boxed

HELD_OUT = 512  # problems of a training set that make its validation split, when it has no other

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")
TASK_KEYS = {"path", "question", "answer", "split", "config"}


@dataclass(frozen=True, slots=True)
class Problem:
    index: int  # its place in the list that `load_task` returned
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class HubTask:
    """Where the hub keeps a built-in task: our split names -> the hub's. A train split also gives a validation split."""

    path: str
    question: str
    answer: str
    splits: Mapping[str, str]
    config: str | None = None


BUILT_IN = {
    "gsm8k": HubTask("openai/gsm8k", "question", "answer", {"train": "train", "test": "test"}, config="main"),
    "math": HubTask(
        "DigitalLearningGmbH/MATH-lighteval", "problem", "solution", {"train": "train", "test": "test"}, config="default"
    ),
    "deepscaler": HubTask("agentica-org/DeepScaleR-Preview-Dataset", "problem", "answer", {"train": "train"}),
    "math500": HubTask("HuggingFaceH4/MATH-500", "problem", "answer", {"test": "test"}),
    "olympiadbench": HubTask("Hothan/OlympiadBench", "question", "final_answer", {"test": "train"}, config="OE_TO_maths_en_COMP"),
}

Row = tuple[str, Mapping[str, Any]]  # (where it stands, for messages; the fields)


def load_task(spec: str | Mapping[str, Any]) -> list[Problem]:
    """All problems of a `task.*` value, in an order that never changes. InputError names the file, line and field at fault."""
    pairs = _named(spec) if isinstance(spec, str) else _from_fields(spec)
    if not pairs:
        raise InputError(f"task: {spec}: holds no problems")
    return [Problem(index, question, answer) for index, (question, answer) in enumerate(pairs)]


def batch_indices(num_problems: int, step: int, prompts_per_step: int, seed: int) -> list[int]:
    """The problems of optimiser step `step` (any whole number from 0): a pure function, so a resumed run sees the same order.

    Each epoch is a fresh permutation cut into whole batches; the few problems left over wait for another epoch, because a batch
    across two epochs could hold a problem twice, and both groups would draw the same noise."""
    batches = num_problems // prompts_per_step
    if batches == 0:
        raise InputError(f"rollout.prompts_per_step: {prompts_per_step} is more than the task's {num_problems} problems")
    epoch, batch = divmod(step, batches)
    # Sorting raw generator output, rather than `permutation`: numpy promises to keep this bit stream across versions.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_problems)
    order = np.argsort(keys, kind="stable")
    return order[batch * prompts_per_step : (batch + 1) * prompts_per_step].tolist()


def final_answer(value: Any) -> str:
    """What is graded of an answer field: text, number or list of them (OlympiadBench). Empty when there is nothing."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(final_answer, value)))
    text = "" if value is None else str(value)
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    text = extract_boxed(text) or text
    # Inside the box it is mathematics already: "$3$, $4$" -> "3, 4"; an escaped \$ is money and stays.
    return text.replace("\\$", "\0").replace("$", "").replace("\0", "\\$").strip()


# --- named tasks -----------------------------------------------------------------------------------------------------


def _named(spec: str) -> list[tuple[str, str]]:
    name, _, query = spec.partition("?")
    name, _, split = name.partition(":")
    if name == "arithmetic":
        _expect_split(spec, split or "train", arithmetic.RANGES)
        return arithmetic.generate(split or "train", dict(parse_qsl(query, keep_blank_values=True)))
    if name not in BUILT_IN:
        names = [*BUILT_IN, "arithmetic"]
        if spec.endswith(FILE_SUFFIXES) or "/" in spec:
            advice = f"a file or hub id is written {{path: {spec}, question: FIELD, answer: FIELD}}"
        else:
            near = difflib.get_close_matches(name, names, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(names)}"
        raise InputError(f"task: unknown task {spec!r}; {advice}")
    task = BUILT_IN[name]
    if query:
        raise InputError(f"task: {spec}: {name} takes no parameters")
    split = split or next(iter(task.splits))
    has_validation = "train" in task.splits
    _expect_split(spec, split, [*task.splits, "validation"] if has_validation else task.splits)
    rows = _hub_rows(task.path, task.config, task.splits["train" if split == "validation" else split])
    pairs = list(_pairs(rows, task.question, task.answer))
    return hold_out(pairs, split) if has_validation and split != "test" else pairs


def _expect_split(spec: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise InputError(f"task: {spec}: no split {split!r}; expected one of {', '.join(splits)}")


def hold_out(pairs: list[tuple[str, str]], split: str) -> list[tuple[str, str]]:
    """The `train` or `validation` side of a training set: the questions with the lowest hashes are held out, 512 of them or an
    eighth of a small set. Equal questions fall on one side. Validation comes in hash order: its first n are a fair sample."""
    ranked = sorted(pairs, key=lambda pair: _hash(pair[0]))
    held_out = {question for question, _ in ranked[: min(HELD_OUT, len(pairs) // 8)]}
    if split == "validation":
        return [pair for pair in ranked if pair[0] in held_out]
    return [pair for pair in pairs if pair[0] not in held_out]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


# --- files and hub ids -----------------------------------------------------------------------------------------------


def _from_fields(spec: Mapping[str, Any]) -> list[tuple[str, str]]:
    if unknown := set(spec) - TASK_KEYS:
        raise InputError(f"task: unknown key {sorted(unknown)[0]!r}; expected path, question, answer and perhaps split, config")
    for key in ("path", "question", "answer"):
        if not isinstance(spec.get(key), str):
            raise InputError(f"task: {key}={spec.get(key)!r}: expected text; a data set is {{path, question, answer}}")
    path, split = spec["path"], spec.get("split")
    if not path.endswith(FILE_SUFFIXES):
        rows = _hub_rows(path, spec.get("config"), split or "train")
        return list(_pairs(rows, spec["question"], spec["answer"]))
    pairs = list(_pairs(_file_rows(Path(path).expanduser()), spec["question"], spec["answer"]))
    if split is None:
        return pairs
    _expect_split(path, split, ("train", "validation"))
    return hold_out(pairs, split)


def _pairs(rows: Iterable[Row], question: str, answer: str) -> Iterator[tuple[str, str]]:
    for where, row in rows:
        for field in (question, answer):
            if field not in row:
                raise InputError(f"{where}: no field {field!r}; its fields are {', '.join(row) or 'none'}")
        pair = (str(row[question] or "").strip(), final_answer(row[answer]))
        for field, text in zip((question, answer), pair, strict=True):
            if not text:
                raise InputError(f"{where}: field {field!r} is empty; remove the row or fill it in")
        yield pair


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        raise InputError(f"{path}: no such file (task path)")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line}: not UTF-8 text") from error
    return _list_rows(path, text) if text.lstrip().startswith("[") else _line_rows(path, text)


def _line_rows(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): JSON strings may hold U+2028 and its like
        if line.strip():
            yield f"{path}:{number}", _object(_json(path, line, first_line=number), f"{path}:{number}")


def _list_rows(path: Path, text: str) -> Iterator[Row]:
    for number, row in enumerate(_json(path, text, first_line=1), start=1):
        yield f"{path}: row {number}", _object(row, f"{path}: row {number}")


def _json(path: Path, text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{first_line + error.lineno - 1}: broken JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise InputError(f"{path}:{first_line}: JSON that cannot be read: {error}") from error


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object with fields, got {type(value).__name__}")
    return value


def _parquet_rows(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {_first_line(error)}") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _hub_rows(path: str, config: str | None, split: str) -> Iterator[Row]:
    import datasets  # seconds to import, and only here

    try:
        rows = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"task: {path} [{split}]: the Hugging Face hub did not deliver it: {_first_line(error)}; check name, split and "
            "network, or download it and give {path: FILE.jsonl, question: FIELD, answer: FIELD}"
        ) from error
    return ((f"{path} [{split}]: row {number}", row) for number, row in enumerate(rows))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

"""The problems: from a generator, a local file or the Hugging Face hub into one list of (question, answer), and their order.

    "gsm8k", "gsm8k:validation", "math500:test" ...      built in, from the hub (BUILT_IN)
    "arithmetic:train?low=1&high=49"                     built in, generated (arithmetic.py)
    {path, question, answer[, split, config]}            a file or a hub id (rows.py); the names of the fields

Whatever the source, the answer is what a grader compares: after `####` where a solution's last line says it so (GSM8K), else the
last \\boxed{...} (MATH), else the field itself. `####` with a box behind it is a heading of Markdown.

A set without a validation split of its own gets one, held out of `train` by the hash of the question (`hold_out`): the same
problems in every run, whatever the order of the rows. A row that cannot be a problem stops the run when it is in a file, which
its owner can mend; in a hub set it is left out, and what was left out is counted and said.
"""

import difflib
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from configs.errors import InputError
from rollout import arithmetic
from rollout.reward import extract_boxed
from rollout.rows import FILE_SUFFIXES, Row, file_rows, fingerprint, hub_rows, repeated_id, say

HELD_OUT = 512  # problems of a training set that make its validation split, when it has no other
LONGEST_ANSWER = 1000  # characters; what is longer is a solution, and nothing in it says which part to compare
SURROGATE = re.compile("[\ud800-\udfff]")
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
TASK_KEYS = {"path", "question", "answer", "split", "config"}

Pair = tuple[str, str]  # (question, answer)
Report = Callable[[str], None]  # takes one line that the user must see


@dataclass(frozen=True, slots=True)
class Problem:
    index: int  # its place in the list that `load_task` returned
    question: str
    answer: str

    @property
    def fingerprint(self) -> str:
        """Of question and answer."""
        return fingerprint(self.question, self.answer)


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


def load_task(spec: str | Mapping[str, Any], report: Report = say) -> list[Problem]:
    """All problems of a `task.*` value, in an order that never changes; `report` hears how many rows of a hub set were left out.
    InputError names the file, line and field at fault."""
    pairs = _named(spec, report) if isinstance(spec, str) else _from_fields(spec, report)
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
    """What is graded of an answer field: text, a number or a list of them (OlympiadBench). Empty when there is nothing."""
    if isinstance(value, list | tuple):
        return ", ".join(filter(None, map(final_answer, value)))
    if value is None or (isinstance(value, float) and math.isnan(value)):  # a hole in a Parquet column
        return ""
    text = str(value)
    _, mark, last = text.rpartition("####")
    boxed = extract_boxed(last)
    if boxed is None and "\n" in last.strip():  # no last line: a heading below the box
        boxed = extract_boxed(text)
    if mark and boxed is None:
        return THOUSANDS.sub("", last).strip()
    text = text if boxed is None else boxed
    # Inside the box it is mathematics already: "$3$, $4$" -> "3, 4"; an escaped \$ is money and stays.
    return text.replace("\\$", "\0").replace("$", "").replace("\0", "\\$").strip()


# --- named tasks -----------------------------------------------------------------------------------------------------


def _named(spec: str, report: Report) -> list[Pair]:
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
    hub_split = task.splits["train" if split == "validation" else split]
    pairs = _hub_pairs(hub_rows(task.path, task.config), task.path, hub_split, task.question, task.answer, report)
    return hold_out(pairs, split) if has_validation and split != "test" else pairs


def _expect_split(spec: str, split: str, splits: Iterable[str]) -> None:
    if split not in splits:
        raise InputError(f"task: {spec}: no split {split!r}; expected one of {', '.join(splits)}")


def hold_out(pairs: list[Pair], split: str) -> list[Pair]:
    """The `train` or `validation` side of a training set: the questions with the lowest hashes are held out, 512 of them or an
    eighth of a small set. Equal questions fall on one side. Validation comes in hash order: its first n are a fair sample."""
    ranked = sorted(pairs, key=lambda pair: _hash(pair[0]))
    held_out = {question for question, _ in ranked[: min(HELD_OUT, len(pairs) // 8)]}
    if split == "validation":
        return [pair for pair in ranked if pair[0] in held_out]
    return [pair for pair in pairs if pair[0] not in held_out]


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


# --- files and hub ids -----------------------------------------------------------------------------------------------


def _from_fields(spec: Mapping[str, Any], report: Report) -> list[Pair]:
    if unknown := set(spec) - TASK_KEYS:
        raise InputError(f"task: unknown key {sorted(unknown)[0]!r}; expected path, question, answer and perhaps split, config")
    for key in ("path", "question", "answer"):
        if not isinstance(spec.get(key), str):
            raise InputError(f"task: {key}={spec.get(key)!r}: expected text; a data set is {{path, question, answer}}")
    path, question, answer, split = spec["path"], spec["question"], spec["answer"], spec.get("split")
    file = Path(path).expanduser()
    if path.endswith(FILE_SUFFIXES) or file.is_file():
        pairs = _pairs(file_rows(file), question, answer, _refuse)
        if split is None:
            return pairs
        _expect_split(path, split, ("train", "validation"))
        return hold_out(pairs, split)
    of_hub = hub_rows(path, spec.get("config"))
    if split is not None and split in ("train", "validation") and "validation" not in of_hub:
        return hold_out(_hub_pairs(of_hub, path, "train", question, answer, report), split)
    return _hub_pairs(of_hub, path, split or "train", question, answer, report)


def _refuse(row_and_fault: str) -> None:
    raise InputError(f"{row_and_fault}; mend the row or remove it")


def _hub_pairs(
    of_hub: Mapping[str, Iterable[Row]], path: str, split: str, question: str, answer: str, report: Report
) -> list[Pair]:
    """The problems of one split; `report` hears of the rows left out."""
    _expect_split(path, split, of_hub)
    left_out: list[str] = []
    pairs = _pairs(of_hub[split], question, answer, left_out.append)
    if left_out:
        shown = "; ".join(left_out[:3]) + ("; ..." if len(left_out) > 3 else "")
        report(f"task: left out {len(left_out)} of {len(pairs) + len(left_out)} rows: {shown}")
    return pairs


def _pairs(rows: Iterable[Row], question: str, answer: str, unusable: Callable[[str], None]) -> list[Pair]:
    """The problems in `rows`; `unusable` hears of each row that has the fields but cannot be a problem."""
    pairs: list[Pair] = []
    places: dict[str, str] = {}  # id -> where it stood first
    for where, row in rows:
        pair = _pair(where, row, question, answer)
        if fault := _fault(pair, question, answer) or repeated_id(where, row, places):
            unusable(f"{where}: {fault}")
        else:
            pairs.append(pair)
    return pairs


def _pair(where: str, row: Mapping[str, Any], question: str, answer: str) -> Pair:
    for field in (question, answer):
        if field not in row:
            raise InputError(f"{where}: no field {field!r}; its fields are {', '.join(row) or 'none'}")
    if not isinstance(row[question], str | None):
        raise InputError(f"{where}: field {question!r} holds a {type(row[question]).__name__}; expected text")
    if isinstance(row[answer], Mapping | bytes):
        raise InputError(f"{where}: field {answer!r} holds a {type(row[answer]).__name__}; expected text, a number or a list")
    return (row[question] or "").strip(), final_answer(row[answer])


def _fault(pair: Pair, question: str, answer: str) -> str | None:
    """Why a row is no problem."""
    for field, text in zip((question, answer), pair, strict=True):
        if not text:
            return f"field {field!r} is empty"
        if SURROGATE.search(text):
            return f"field {field!r} holds half a character (a lone UTF-16 surrogate)"
    if len(pair[1]) > LONGEST_ANSWER:
        return f"field {answer!r} holds {len(pair[1])} characters without \\boxed{{}} or ####: no final answer to compare with"
    return None

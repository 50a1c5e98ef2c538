"""Problem-level records of an evaluation: every finished sample is a line at once, and every number comes from the lines.

    runs/NAME/eval/test_000040/gsm8k_test.json     the plan: what is evaluated, and what decides the answers
    runs/NAME/eval/test_000040/gsm8k_test.jsonl    one EvaluationRecord a line, in the order in which samples finished

An interrupted evaluation is opened again with the same plan and draws what is not `done`; a torn last line counts as not drawn.
More samples, problems or settings may be added to a plan; whatever decides an answer may not change.

A soft sample of 128 CoT steps takes up to 3 KB, a hard one 0.3 KB: entropies are kept to 1e-4 nats, dropped mass to three digits.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cluster.run_dir import JsonLines
from configs.errors import InputError
from rollout.eval_statistics import IndexMeans, bootstrap_interval, majority_vote, mixture_profile, pass_at_k
from rollout.files import cannot_write, replace_file
from rollout.rows import FILE_SUFFIXES
from rollout.trajectory import Sample

FOLDER = "eval"
BOOTSTRAP_SEED = 0

Key = tuple[int, str, int]  # problem, setting, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationPlan:
    """What one evaluation of one data set is. All but how many problems and `samples` there are decides the answers: records of two
    plans that differ there never share a file."""

    dataset: str  # `dataset_name` of the task
    weights: str  # "base", "step 40" or the path of a checkpoint
    model: str  # model.path
    dtype: str  # engine.dtype
    prompt: str  # task.prompt
    seed: int  # run.seed
    sigma: float  # noise of the sampled soft settings
    max_cot_tokens: int
    max_answer_tokens: int
    fingerprints: Sequence[str]  # of problems 0, 1, ...: the name does not say what is in the data set
    samples: Mapping[str, int]  # setting: samples per problem

    @property
    def problems(self) -> int:
        """How many problems of the data set are evaluated, from the first on."""
        return len(self.fingerprints)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRecord:
    """One finished sample: a line of the file. C CoT steps; the three lists are empty for a hard sample."""

    dataset: str
    setting: str  # of EVAL_SETTINGS
    problem: int  # its index in the data set
    sample: int
    correct: bool
    reward: float  # 100, 10 or 0: nothing boxed
    answer_text: str
    timed_out: bool  # math-verify did not end; counted as wrong
    stop_reason: str  # STOP_ANSWER_*
    phrase_found: bool  # the CoT ended by itself, before L
    cot_length: int  # C
    answer_length: int  # tokens
    entropy: Sequence[float]  # [C] nats
    support_size: Sequence[int]  # [C] tokens
    dropped_mass: Sequence[float]  # [C]

    @property
    def key(self) -> Key:
        return self.problem, self.setting, self.sample


def record_of(dataset: str, setting: str, sample: Sample) -> EvaluationRecord:
    """What is kept of a scored sample."""
    trajectory = sample.trajectory
    mixture = mixture_profile(trajectory)
    return EvaluationRecord(
        dataset=dataset,
        setting=setting,
        problem=trajectory.prompt_index,
        sample=trajectory.sample_index,
        correct=sample.correct,
        reward=sample.reward,
        answer_text=sample.answer_text,
        timed_out=sample.timed_out,
        stop_reason=trajectory.stop_reason,
        phrase_found=trajectory.phrase_found,
        cot_length=trajectory.cot_length,
        answer_length=len(trajectory.answer_ids),
        entropy=[round(value, 4) for value in mixture.entropy.tolist()],
        support_size=mixture.support_size.tolist(),
        dropped_mass=[float(f"{value:.2e}") for value in mixture.dropped_mass.tolist()],
    )


def dataset_name(task: str | Mapping[str, Any]) -> str:
    """A task's name in plans, tables and file names: the spec as written; of {path, ...} the file's name, or the hub's id and
    config, and the split. Two files may be called alike: their problems' fingerprints tell them apart."""
    if isinstance(task, str):
        return task
    path, config, split = str(task["path"]), task.get("config"), task.get("split")
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.endswith(FILE_SUFFIXES)
    name = path if on_hub else Path(path).name
    return name + (f"/{config}" if config else "") + (f":{split}" if split else "")


def plan_path(folder: Path, dataset: str) -> Path:
    """The plan of a data set in a folder such as runs/NAME/eval/test_000040; its records lie beside it."""
    return folder / (re.sub(r"[^A-Za-z0-9.-]+", "_", dataset) + ".json")


# --- writing ---------------------------------------------------------------------------------------------------------


class EvaluationRecords:
    """The open records of one evaluation of one data set. One process at a time."""

    def __init__(self, folder: Path, plan: EvaluationPlan) -> None:
        """Open or go on with folder/DATASET.jsonl; `folder` is such as runs/NAME/eval/test_000040, and is made.

        Raises InputError when the records there are of another plan, or another process writes them; RunError when the folder
        cannot be written.
        """
        described = plan_path(folder, plan.dataset)
        self.path = described.with_suffix(".jsonl")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(folder, error) from error
        if described.exists():
            before = read_plan(described)
            require_same(described, before, plan)
            plan = _grown(before, plan)
        self.plan = plan
        self._file = JsonLines(self.path)
        self._file.lock()
        replace_file(described, lambda partial: partial.write_text(json.dumps(asdict(plan), indent=1) + "\n"))
        self.done: set[Key] = {record.key for record in read_records(self.path)}

    def add(self, setting: str, sample: Sample) -> EvaluationRecord:
        """Append one finished sample. Raises RunError when it cannot be written, ValueError when it is there already."""
        record = record_of(self.plan.dataset, setting, sample)
        if record.key in self.done:
            raise ValueError(f"{self.path}: sample {record.key} is recorded already; draw only what is not in `done`")
        self._file.append(asdict(record))
        self.done.add(record.key)
        return record

    def summaries(self) -> list["SettingSummary"]:
        """One of each setting of the plan that has samples, in the plan's order."""
        return summarise(self.plan, read_records(self.path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _grown(before: EvaluationPlan, plan: EvaluationPlan) -> EvaluationPlan:
    """All that was ever planned: asking for less makes nothing complete."""
    samples = {setting: max(count, before.samples.get(setting, 0)) for setting, count in plan.samples.items()}
    return replace(plan, fingerprints=max(plan.fingerprints, before.fingerprints, key=len), samples={**before.samples, **samples})


def require_same(path: Path, before: EvaluationPlan, plan: EvaluationPlan) -> None:
    """Raises InputError unless records of the plan `before`, which lies at `path`, are such as `plan` asks for."""
    for key in (f.name for f in fields(EvaluationPlan) if f.name not in ("fingerprints", "samples")):
        old, new = getattr(before, key), getattr(plan, key)
        if old != new:
            raise InputError(
                f"{path}: {key} = {old}: this evaluation has {new}, and one file holds one evaluation; "
                f"set it back, or remove {path.with_suffix('')}.*"
            )
    for problem, (was, now) in enumerate(zip(before.fingerprints, plan.fingerprints, strict=False)):  # as far as both go
        if was != now:
            raise InputError(
                f"{path}: problem {problem} of {plan.dataset} had another question or answer when it was evaluated: the data have "
                f"changed, or are of another set of that name; set them back, or remove {path.with_suffix('')}.*"
            )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> EvaluationPlan:
    """The plan of folder/DATASET.json. Raises InputError for a file that is none."""
    try:
        return EvaluationPlan(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not the plan of an evaluation ({str(error).partition(chr(10))[0]}); remove it") from error


def read_records(path: Path) -> Iterator[EvaluationRecord]:
    """The records of a file, each sample once. What a kill left of a line is passed over: its sample counts as not drawn.

    Raises InputError naming file and line for an object that is no record.
    """
    seen: set[Key] = set()
    for number, row in json_lines(path):
        try:
            record = EvaluationRecord(**row)
        except TypeError as error:
            reason = str(error).removeprefix("EvaluationRecord.__init__() ")
            raise InputError(f"{path}:{number}: not a sample's record ({reason}); remove the line") from error
        if record.key not in seen:
            seen.add(record.key)
            yield record


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of each whole line of a file that may still be growing. Raises InputError without the file."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict):
                    yield number, row
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


# --- numbers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingSummary:
    """One setting on one data set. P problems; C the longest CoT. The index profiles are empty for a hard setting."""

    dataset: str
    setting: str
    missing: int  # planned samples that are not there: it still runs, or was interrupted
    problems: NDArray[np.int64]  # [P] indices, ascending
    drawn: NDArray[np.int64]  # [P] samples of each problem
    correct: NDArray[np.int64]  # [P] right ones
    majority: NDArray[np.float64]  # [P] 1 where the most frequent answer is right
    boxed: int  # samples with a closed box, right or wrong
    timed_out: int
    phrase_found: int
    stop_reasons: Mapping[str, int]
    cot_lengths: NDArray[np.int64]  # [samples] ascending
    answer_tokens: int
    entropy: IndexMeans  # [C] nats
    support_size: IndexMeans  # [C] tokens
    dropped_mass: IndexMeans  # [C]

    @property
    def samples(self) -> int:
        return int(self.drawn.sum())

    @property
    def share(self) -> float:
        """Right samples of all samples: pass@1 where every problem has equally many."""
        return int(self.correct.sum()) / self.samples

    def pass_at_k(self) -> NDArray[np.float64]:
        """[P, K], K the fewest samples of a problem."""
        return pass_at_k(self.correct, self.drawn)

    def row(self) -> dict[str, Any]:
        """Flat JSON of everything but the profiles; intervals are 95 % bootstrap over problems."""
        curves = self.pass_at_k()
        low, high = bootstrap_interval(curves, BOOTSTRAP_SEED)
        lengths = self.cot_lengths
        return {
            "dataset": self.dataset,
            "setting": self.setting,
            "problems": len(self.problems),
            "samples": self.samples,
            "missing": self.missing,
            "correct": int(self.correct.sum()),
            "share": self.share,
            "pass_at_k": curves.mean(axis=0).tolist(),
            "pass_at_k_low": low.tolist(),
            "pass_at_k_high": high.tolist(),
            "majority": float(self.majority.mean()),
            "boxed": self.boxed,
            "timed_out": self.timed_out,
            "phrase_found": self.phrase_found,
            "stop_reasons": dict(self.stop_reasons),
            "cot_length_mean": float(lengths.mean()),
            "cot_length_p50": float(np.quantile(lengths, 0.5)),
            "cot_length_p90": float(np.quantile(lengths, 0.9)),
            "cot_length_max": int(lengths[-1]),
        }


@dataclass(slots=True)
class _Tally:
    """A setting while its records stream by: only an answer and a few numbers of each are held."""

    votes: dict[int, list[tuple[int, bool, str | None]]] = field(default_factory=dict)  # problem: (sample, correct, answer)
    boxed: int = 0
    timed_out: int = 0
    phrase_found: int = 0
    answer_tokens: int = 0
    stop_reasons: Counter[str] = field(default_factory=Counter)
    cot_lengths: list[int] = field(default_factory=list)
    entropy: IndexMeans = field(default_factory=IndexMeans)
    support_size: IndexMeans = field(default_factory=IndexMeans)
    dropped_mass: IndexMeans = field(default_factory=IndexMeans)

    def add(self, record: EvaluationRecord) -> None:
        boxed = record.reward > 0
        answer = record.answer_text if boxed else None
        self.votes.setdefault(record.problem, []).append((record.sample, record.correct, answer))
        self.boxed += boxed
        self.timed_out += record.timed_out
        self.phrase_found += record.phrase_found
        self.answer_tokens += record.answer_length
        self.stop_reasons[record.stop_reason] += 1
        self.cot_lengths.append(record.cot_length)
        for means, row in (
            (self.entropy, record.entropy),
            (self.support_size, record.support_size),
            (self.dropped_mass, record.dropped_mass),
        ):
            means.add(row)


def summarise(plan: EvaluationPlan, records: Iterable[EvaluationRecord]) -> list[SettingSummary]:
    """One summary of each setting that has records, in the plan's order; none at all where nothing is recorded yet."""
    tallies: dict[str, _Tally] = {}
    for record in records:
        tallies.setdefault(record.setting, _Tally()).add(record)
    settings = dict.fromkeys([*plan.samples, *tallies])
    return [_summary(plan, setting, tallies[setting]) for setting in settings if setting in tallies]


def _summary(plan: EvaluationPlan, setting: str, tally: _Tally) -> SettingSummary:
    problems = sorted(tally.votes)
    votes = [sorted(tally.votes[problem]) for problem in problems]  # in sample order, whatever finished first
    winners = [majority_vote([answer for *_, answer in samples]) for samples in votes]
    right = [winner is not None and samples[winner][1] for samples, winner in zip(votes, winners, strict=True)]
    drawn = np.array([len(samples) for samples in votes], dtype=np.int64)
    wanted = plan.samples.get(setting, 0)
    return SettingSummary(
        dataset=plan.dataset,
        setting=setting,
        missing=int(np.maximum(wanted - drawn, 0).sum()) + wanted * max(plan.problems - len(problems), 0),
        problems=np.array(problems, dtype=np.int64),
        drawn=drawn,
        correct=np.array([sum(correct for _, correct, _ in samples) for samples in votes], dtype=np.int64),
        majority=np.array(right, dtype=np.float64),
        boxed=tally.boxed,
        timed_out=tally.timed_out,
        phrase_found=tally.phrase_found,
        stop_reasons=dict(sorted(tally.stop_reasons.items())),
        cot_lengths=np.sort(np.array(tally.cot_lengths, dtype=np.int64)),
        answer_tokens=tally.answer_tokens,
        entropy=tally.entropy,
        support_size=tally.support_size,
        dropped_mass=tally.dropped_mass,
    )

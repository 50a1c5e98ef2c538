"""Run folders as a report sees them: read once, grouped by what was asked of them, with every exclusion named.

    runs/*/ --> Run --> RunGroup: equal in all but the seed --> Arm: what one row or line of a report stands for
       \\--> LeftOut: a run that cannot be read, or repeats another

A run's result is its evaluation of the best checkpoint; its evaluation at step 0 belongs to the untrained model.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.best import BEST
from cluster.evaluation import read_rows
from cluster.evaluation_records import FOLDER, SettingSummary, dataset_name, json_lines, read_plan, read_records, summarise
from cluster.paper_numbers import BASE
from cluster.run_dir import CONFIG, METRICS
from configs.errors import InputError
from configs.load import load_config
from configs.schema import TAU_OF_MODE, Config, Mode
from learner.checkpoint import CONTROLLER
from learner.checkpoint import FOLDER as CHECKPOINTS

Tests = Mapping[tuple[str, str], SettingSummary]  # by (dataset, setting)
OutOfDomain = Mapping[str, Mapping[str, float]]  # by dataset: what OUT_OF_DOMAIN_KEYS name

IDENTITY = ("run.name", "run.dir", "run.seed")  # what may differ between runs of one group
UNREAD_WHEN_HARD = ("policy.gamma", "policy.support", "policy.record")  # keys that do nothing in hard mode
MODE_ORDER = [BASE, Mode.hard, Mode.fuzzy, Mode.soft]  # the paper's columns
OUT_OF_DOMAIN_KEYS = (
    "items",
    "accuracy",
    "accuracy_norm",
    "nll_per_token",
)  # count, shares, nats (rollout.multiple_choice.Summary)
PAPER_GAMMA = 0.33
LABEL_LENGTH = 70  # characters; what is longer becomes a hash, and is spelled out once in the report


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    config: Config
    metrics: Sequence[Mapping[str, float]]  # rows of metrics.jsonl by step
    tested_step: int | None  # of the weights behind `tests`
    tests: Tests
    out_of_domain: OutOfDomain
    base_tests: Tests  # of the weights that training started from
    base_out_of_domain: OutOfDomain
    base_validation: float | None  # share right of the validation before the first step, by the first greedy of eval.settings
    base_plan: Mapping[str, str]  # what else decided base_tests: prompt, dtype, sigma, lengths
    notes: Sequence[str]  # what a reader must know: evaluations that are empty or not whole

    @property
    def settings(self) -> dict[str, str]:
        """Every key of the config as text, but for the run's name, place and seed."""
        sections = asdict(self.config).items()
        keys = {f"{section.rstrip('_')}.{name}": str(value) for section, values in sections for name, value in values.items()}
        return {key: value for key, value in keys.items() if key not in IDENTITY}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A run folder that the report does not use."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunGroup:
    """Runs that differ in nothing but the seed, by seed."""

    runs: tuple[Run, ...]
    settings: Mapping[str, str]
    differing: Sequence[str]  # the keys in which groups of the same model, data and mode differ

    @property
    def label(self) -> str:
        """What tells the group from others of its model, data and mode, short enough for a table."""
        return self.label_without("")

    def label_without(self, key: str) -> str:
        """The label, as if groups did not differ in `key`."""
        text = _named(self.config.policy.mode, self.settings, [name for name in self.differing if name != key])
        digest = hashlib.sha256(text.encode()).hexdigest()[:6]
        return text if len(text) <= LABEL_LENGTH else f"{self.config.policy.mode} #{digest}"

    @property
    def differences(self) -> str:
        """The values of `differing`, in full."""
        return ", ".join(f"{key}={self.settings[key]}" for key in self.differing)

    @property
    def config(self) -> Config:
        return self.runs[0].config

    @property
    def model(self) -> str:
        return self.config.model.path

    @property
    def train(self) -> str:
        return dataset_name(self.config.task.train)

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.config.run.seed) for run in self.runs)

    def hard_settings(self) -> dict[str, str]:
        """The settings as far as hard mode reads them: equal for a soft group and its hard-token counterpart."""
        ignored = {"policy.mode", "policy.tau", *UNREAD_WHEN_HARD}
        return {key: value for key, value in self.settings.items() if key not in ignored}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way of training (or none) on one data set, with the evaluations of each seed."""

    model: str
    train: str
    trained: str  # a mode, or BASE
    label: str
    like_paper: bool  # trained at the paper's gamma and temperature
    seeds: str
    tests: tuple[Tests, ...]  # by seed
    out_of_domain: tuple[OutOfDomain, ...]  # by seed

    def summaries(self, dataset: str, setting: str) -> list[SettingSummary]:
        """Of the seeds that have it."""
        return [tests[dataset, setting] for tests in self.tests if (dataset, setting) in tests]


# --- reading ---------------------------------------------------------------------------------------------------------


def read_runs(root: Path) -> tuple[list[Run], list[LeftOut]]:
    """The runs below `root` (or `root` itself), by name, and those left out with the reason. Raises InputError without any."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder; expected one that holds run folders, such as runs")
    folders = [root] if (root / CONFIG).is_file() else sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
    if not folders:
        raise InputError(f"{root}: holds no runs; expected folders with a {CONFIG}, as `softrl train` writes them")
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except InputError as error:
            left_out.append(LeftOut(folder.name, str(error)))
    return runs, left_out


def read_run(folder: Path) -> Run:
    """One run folder. Raises InputError for a config, a record or an out-of-domain row that cannot be read."""
    tested = find_tested_step(folder)
    notes: list[str] = []
    tests, _ = _tests(folder, tested, notes)
    base_tests, base_plan = _tests(folder, 0, notes)
    config = load_config(folder / CONFIG)
    return Run(
        folder=folder,
        config=config,
        metrics=_metrics(folder / METRICS),
        tested_step=tested,
        tests=tests,
        out_of_domain=_out_of_domain(folder, tested),
        base_tests=base_tests,
        base_out_of_domain=_out_of_domain(folder, 0),
        base_validation=_base_validation(folder, config.selecting_setting),
        base_plan=base_plan,
        notes=notes,
    )


def _base_validation(folder: Path, setting: str | None) -> float | None:
    return next((row["share"] for row in read_rows(folder, "validation_000000.json") if row["setting"] == setting), None)


def _metrics(path: Path) -> list[dict[str, float]]:
    """Rows by step, each step once; none where training has not begun."""
    if not path.exists():
        return []
    rows: dict[float, dict[str, float]] = {}
    for number, row in json_lines(path):
        if not isinstance(row.get("step"), int):
            raise InputError(f"{path}:{number}: expected a step, found {row.get('step')!r}; remove the line")
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]


def find_tested_step(folder: Path) -> int | None:
    """The step of the best checkpoint if that was tested, else the last tested one; None when training was never tested."""
    names = [path.name + "/" * path.is_dir() for path in (folder / FOLDER).glob("*")]
    found = [re.fullmatch(r"test_(\d{6})/|out_of_domain_(\d{6})\.json", name) for name in names]
    steps = {int(match[1] or match[2]) for match in found if match} - {0}
    best = folder / CHECKPOINTS / BEST / CONTROLLER
    try:
        step = int(json.loads(best.read_text())["step"])
    except FileNotFoundError:
        step = -1
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{best}: expected a JSON object with the checkpoint's step ({type(error).__name__})") from error
    return step if step in steps else max(steps, default=None)


def _tests(folder: Path, step: int | None, notes: list[str]) -> tuple[Tests, Mapping[str, str]]:
    """Summaries of test_STEP, and what its plan says beyond the data set. What is missing is noted."""
    if step is None:
        return {}, {}
    tests: dict[tuple[str, str], SettingSummary] = {}
    described: dict[str, str] = {}
    for path in sorted((folder / FOLDER / f"test_{step:06d}").glob("*.jsonl")):
        plan = read_plan(path.with_suffix(".json"))
        summaries = summarise(plan, read_records(path))
        unseen = [setting for setting in plan.samples if setting not in {summary.setting for summary in summaries}]
        place = path.relative_to(folder.parent)
        notes += [f"{place}: {setting}: no samples yet" for setting in unseen]
        notes += [f"{place}: {s.setting}: {s.missing} of {s.missing + s.samples} samples missing" for s in summaries if s.missing]
        tests |= {(summary.dataset, summary.setting): summary for summary in summaries}
        described |= {key: str(getattr(plan, key)) for key in ("dtype", "prompt", "sigma", "max_cot_tokens", "max_answer_tokens")}
    return tests, described


def _out_of_domain(folder: Path, step: int | None) -> OutOfDomain:
    """Rows of eval/out_of_domain_STEP.json: a list of objects, `dataset` and OUT_OF_DOMAIN_KEYS in each."""
    path = folder / FOLDER / f"out_of_domain_{step or 0:06d}.json"
    if step is None or not path.exists():
        return {}
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        return {str(row["dataset"]): {key: float(row[key]) for key in OUT_OF_DOMAIN_KEYS} for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        expected = f"a list of objects with dataset, {', '.join(OUT_OF_DOMAIN_KEYS)}"
        raise InputError(f"{path}: expected {expected}, found {type(error).__name__}: {error}") from error


# --- grouping --------------------------------------------------------------------------------------------------------


def group_runs(runs: Iterable[Run]) -> tuple[list[RunGroup], list[LeftOut]]:
    """Groups by model, training data, mode and label. Of runs equal in settings and seed, the one that got furthest is kept (the
    last by name if several did): a repeat is no further seed."""
    by_settings: dict[tuple[tuple[str, str], ...], dict[int, Run]] = {}
    left_out = []
    for run in runs:
        seeds = by_settings.setdefault(tuple(run.settings.items()), {})
        seed = run.config.run.seed
        kept, dropped = sorted((seeds.get(seed, run), run), key=lambda r: (len(r.metrics), r.folder.name))[::-1]
        if kept is not dropped:
            left_out.append(LeftOut(dropped.folder.name, f"same settings and seed as {kept.folder.name}"))
        seeds[seed] = kept
    groups = [RunGroup(tuple(seeds[seed] for seed in sorted(seeds)), dict(key), ()) for key, seeds in by_settings.items()]
    places: dict[tuple[str, str, Mode], list[RunGroup]] = {}
    for group in groups:
        places.setdefault((group.model, group.train, group.config.policy.mode), []).append(group)
    told_apart = [
        RunGroup(group.runs, group.settings, _differing([member.settings for member in members]))
        for members in places.values()
        for group in members
    ]
    return sorted(told_apart, key=lambda g: (g.model, g.train, MODE_ORDER.index(g.config.policy.mode), g.label)), left_out


def _differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys whose value is not the same everywhere."""
    return [key for key in settings[0] if len({one.get(key) for one in settings}) > 1]


def _named(name: str, settings: Mapping[str, str], keys: Iterable[str]) -> str:
    return ", ".join([name, *(f"{key}={settings[key]}" for key in keys)])


def build_arms(groups: Sequence[RunGroup]) -> list[Arm]:
    """The rows of the accuracy tables: for every model and training set the untrained model first, then each group."""
    arms: list[Arm] = []
    for model, train in dict.fromkeys((group.model, group.train) for group in groups):
        family = [group for group in groups if (group.model, group.train) == (model, train)]
        arms += _base_arms(model, train, [run for group in family for run in group.runs])
        arms += [trained_arm(group) for group in family]
    return arms


def trained_arm(group: RunGroup) -> Arm:
    """The evaluations of a group's best checkpoints."""
    policy = group.config.policy
    return Arm(
        model=group.model,
        train=group.train,
        trained=policy.mode,
        label=group.label,
        like_paper=policy.tau == TAU_OF_MODE[policy.mode] and (policy.mode is Mode.hard or policy.gamma == PAPER_GAMMA),
        seeds=group.seeds,
        tests=tuple(run.tests for run in group.runs),
        out_of_domain=tuple(run.out_of_domain for run in group.runs),
    )


def _base_arms(model: str, train: str, runs: Sequence[Run]) -> list[Arm]:
    """The untrained model, as its runs evaluated it: once a seed, and apart where the evaluations differ."""
    evaluated = [run for run in runs if run.base_tests or run.base_out_of_domain]
    plans = [dict(plan) for plan in dict.fromkeys(tuple(run.base_plan.items()) for run in evaluated)]
    arms = []
    for plan in plans:
        tests: dict[int, Tests] = {}
        out_of_domain: dict[int, OutOfDomain] = {}
        for run in sorted((run for run in evaluated if run.base_plan == plan), key=lambda run: run.config.run.seed):
            seed = run.config.run.seed  # runs of one seed repeat each other's evaluation: the first one counts
            tests[seed] = {**run.base_tests, **tests.get(seed, {})}
            out_of_domain[seed] = {**run.base_out_of_domain, **out_of_domain.get(seed, {})}
        arms.append(
            Arm(
                model=model,
                train=train,
                trained=BASE,
                label=_named(BASE, plan, _differing(plans)),
                like_paper=True,
                seeds=", ".join(map(str, tests)),
                tests=tuple(tests.values()),
                out_of_domain=tuple(out_of_domain.values()),
            )
        )
    return arms

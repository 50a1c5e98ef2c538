"""The runs of a matrix, one after another, with engines that stay for the next run.

    each run:  train, tested on what the matrix's `eval` names --> what an interruption left untested --> weights kept, or removed

An engine takes the better part of a minute to start, on two cores as long as a small run, and every run begins by pushing its own
weights to it. So where weights go through shared memory the engines of a run are kept for the next one that would start them alike;
a run that fails takes its engines with it.
"""

import json
import shutil
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from rich.console import Console
from rich.text import Text

from cluster.best import BEST
from cluster.controller import HeldOutTests, train
from cluster.eval_sets import EvalSets
from cluster.evaluate import run_evaluation
from cluster.evaluation import read_rows, require_same_evaluation
from cluster.evaluation_records import dataset_name
from cluster.out_of_domain import require_same_scores
from cluster.placement import placed, ray_session
from cluster.run_dir import STATUS, RunDir
from configs.errors import InputError, Interrupted, RunError
from configs.schema import Config, PushBackend
from learner.checkpoint import CONTROLLER
from learner.checkpoint import FOLDER as CHECKPOINTS
from rollout.evaluation import samples_per_setting
from rollout.models import resolve_model

NEW, BEGUN, FINISHED = "new", "begun", "finished"


@dataclass(frozen=True, slots=True)
class MatrixRun:
    """One run of the matrix."""

    place: Mapping[str, str]  # what tells it from the others: recipe and axes
    config: Config
    test_config: Config  # with the eval.settings under which it is tested
    sets: EvalSets  # on which it is tested

    @property
    def folder(self) -> Path:
        return (Path(self.config.run.dir).expanduser() / self.config.run.name).resolve()

    @property
    def best(self) -> Path:
        return self.folder / CHECKPOINTS / BEST

    def state(self) -> str:
        """NEW, BEGUN or FINISHED. Raises InputError for a run there that was made with other settings."""
        if not self.folder.exists() or not any(self.folder.iterdir()):
            return NEW
        RunDir.check(self.config, resume=True)
        try:
            ended = json.loads((self.folder / STATUS).read_text())["state"] == "done"
        except (OSError, ValueError, KeyError):
            return BEGUN
        return FINISHED if ended else BEGUN


def complete_all(console: Console, runs: Sequence[MatrixRun], states: Sequence[str], keep_checkpoints: bool) -> list[str]:
    """Train and test what is not yet; the names of the runs that failed. Raises Interrupted after Ctrl-C."""
    first, failed = bases(runs), []
    lacking: list[tuple[MatrixRun, str]] = []
    for run, state in zip(runs, states, strict=True):
        if state != FINISHED or not tested(run, first):
            lacking.append((run, state))
        elif not keep_checkpoints:
            remove_weights(run)
    if not lacking:
        return []
    most = max((run.config for run, _ in lacking), key=lambda config: config.engine.count + config.learner.ranks)
    with ray_session(most), SharedEngines() as engines:
        for number, (run, state) in enumerate(lacking, start=1):
            console.print(Text(f"run {number} of {len(lacking)}: {run.folder.name}", style="bold"))
            try:
                _complete(run, state, run.folder.name in first, engines)
            except Interrupted:
                raise
            except Exception as error:  # whatever it was, the other runs have nothing to do with it
                failed.append(run.folder.name)
                engines.drop()
                if not isinstance(error, InputError | RunError):
                    traceback.print_exception(error)
                console.print(Text(f"softrl: run {run.folder.name}: {error}", style="red"), soft_wrap=True)
                continue
            if not keep_checkpoints:
                remove_weights(run)
                console.print(Text(f"removed the weights of {run.folder.name} (keep_checkpoints: false)"), soft_wrap=True)
    return failed


def _complete(run: MatrixRun, state: str, with_base: bool, engines: "SharedEngines") -> None:
    if state != FINISHED:
        tests = HeldOutTests(run.test_config, run.sets, base=with_base)
        train(run.config, state == BEGUN, tests, engines.for_run(run.config))
    weights = {best_step(run): run.best} | ({0: None} if with_base else {})
    for step, checkpoint in weights.items():
        if not evaluated(run, step):
            engines.drop()  # an evaluation starts engines of its own, which load the checkpoint
            run_evaluation(run.test_config, checkpoint, run.sets, run.folder)


def bases(runs: Sequence[MatrixRun]) -> set[str]:
    """The names of the runs that test the untrained model for all that would test it alike."""
    first: dict[str, str] = {}
    for run in runs:
        c = run.config
        alike = c.task.train, c.model.path, c.engine.dtype, c.task.prompt, c.run.seed, c.policy.gamma, c.eval_cot_tokens
        first.setdefault(repr(alike), run.folder.name)
    return set(first.values())


def best_step(run: MatrixRun) -> int:
    """The step of the run's best checkpoint."""
    return int(json.loads((run.best / CONTROLLER).read_text())["step"])


def tested(run: MatrixRun, first: set[str]) -> bool:
    """Whether a finished run lacks no test."""
    return evaluated(run, best_step(run)) and (run.folder.name not in first or evaluated(run, 0))


def evaluated(run: MatrixRun, step: int) -> bool:
    """Whether nothing is missing in the run's tests of the weights after `step` steps. Raises InputError where those there are of
    other data than that of the name, or drawn otherwise: what lacks cannot be added to them."""
    for task, problems in run.sets.tasks:
        require_same_evaluation(run.test_config, run.folder, "test", step, task, problems)
    for name, items in run.sets.choices:
        require_same_scores(run.test_config, run.folder, step, name, items)
    samples = samples_per_setting(run.test_config)
    rows = {(row["dataset"], row["setting"]): row for row in read_rows(run.folder, f"test_{step:06d}.json")}
    scored = {row["dataset"]: row["items"] for row in read_rows(run.folder, f"out_of_domain_{step:06d}.json")}

    def whole(task: Any, setting: str, problems: int) -> bool:
        row = rows.get((dataset_name(task), setting))
        enough = row is not None and row["problems"] >= problems and row["samples"] >= samples[setting] * problems
        return enough and row is not None and not row["missing"]

    return all(whole(task, setting, len(problems)) for task, problems in run.sets.tasks for setting in samples) and all(
        scored.get(name, 0) >= len(items) for name, items in run.sets.choices
    )


def remove_weights(run: MatrixRun) -> None:
    """Remove the checkpoints of a run; of the best one stays which step it was."""
    for path in (run.folder / CHECKPOINTS).iterdir():
        if path != run.best:
            shutil.rmtree(path)
    for path in run.best.iterdir():
        if path.name != CONTROLLER:
            path.unlink()


class SharedEngines:
    """The engines of the last run, for a next that would start them alike. Use as a context manager inside a Ray session."""

    def __init__(self) -> None:
        self._needs: str | None = None
        self._engines: list[Any] = []
        self._placed = ExitStack()

    def for_run(self, config: Config) -> list[Any] | None:
        """Handles for `cluster.controller.train`; None where a run has to have its own: NCCL connects an engine once."""
        if config.push.backend.resolved(ray.cluster_resources().get("GPU", 0) > 0) is not PushBackend.shm:
            return None
        lengths = config.policy.max_cot_tokens, config.eval_cot_tokens, config.policy.max_answer_tokens
        needs = repr((config.model, config.engine, config.push, lengths))
        if needs != self._needs:
            self.drop()
            model_dir = str(resolve_model(config.model.path))
            self._engines = self._placed.enter_context(placed(config, model_dir, with_learner=False)).engines
            self._needs = needs
        return self._engines

    def drop(self) -> None:
        """End the engines."""
        self._placed.close()
        self._needs, self._engines = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

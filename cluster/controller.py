"""The main loop: rollouts, learning, push, in that order and as one.

    for each step
        engines   decode the step's groups                  | the controller waits for the next group   time/wait_rollout
        learners  accumulate a group while others decode    | the controller waits for the last one     time/wait_learner
        learners  finish the step, push the weights         | engines are paused                        push/pause_seconds
        every so often: verify the push, save, validate

    who waits            for whom              what unblocks it           deadline
    controller           a scored group        the engines, the scorer    engine.request_timeout_s
    controller           learner ranks         forward and backward       learner.step_timeout_s
    learner rank 0       engines               weights loaded             push.timeout_s

A batch is learned from with the weights that drew it (strictly on-policy): the optimiser steps when the last group is in, and
engines draw nothing between that and the push.

Validation has the engines to itself. Drawn in one batch with the next step's groups it would take some percent less time, but the
shape of a batch decides the last bits of what an engine computes, and so which token a close call becomes: how often a run is
validated would change what it learns, and a step's time would hold that of a validation. `softrl eval` tests any checkpoint beside
a run that goes on.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.best import BEST, Best, read_best, require_greedy_setting, validation_of
from cluster.eval_sets import EvalResults, EvalSets, evaluate_sets
from cluster.evaluation import evaluate, forget_after, read_rows
from cluster.evaluation_records import SettingSummary
from cluster.learners import Learners
from cluster.live import LiveView
from cluster.placement import Cluster, placed, ray_session
from cluster.progress import Progress
from cluster.rollouts import Rollouts, require_prompts_fit
from cluster.run_dir import RunDir
from cluster.step_metrics import StepMetrics
from cluster.waits import each, wait_all
from configs.errors import InputError, Interrupted
from configs.load import config_hash
from configs.schema import Config
from learner import checkpoint
from rollout.engine_args import require_splits
from rollout.models import load_tokenizer, resolve_model
from rollout.reward import Scorer
from rollout.tasks import Problem, batch_indices, load_task
from rollout.trajectory import Group

VERIFY_SEQUENCES = 4  # prompts whose log-probs prove a push


@dataclass(frozen=True, slots=True)
class HeldOutTests:
    """What the best weights are tested on, and, with `base`, those that training starts from."""

    config: Config  # the run's own, but for eval.settings
    sets: EvalSets
    base: bool = True


def train(config: Config, resume: bool, tests: HeldOutTests | None = None, engines: list[Any] | None = None) -> None:
    """Run `softrl train`, tested on `tests`, by default task.test. `engines` are handles of engines that are there already, started
    or not: for the config's model, and as its `engine` section says.

    Raises InputError before anything is written, RunError when the run fails; both leave it resumable.
    """
    RunDir.check(config, resume)
    model_dir, problems, validation, test = prepare(config)
    tests = tests or HeldOutTests(config, EvalSets([(config.task.test, test)], []))
    with (
        ray_session(config),
        placed(config, model_dir, with_engines=engines is None) as cluster,
        RunDir.create(config, resume) as run,
        recorded_end(run),
        Scorer() as scorer,
        LiveView(config) as view,
    ):
        cluster = Cluster(engines or cluster.engines, cluster.learners)
        asyncio.run(Training(config, model_dir, problems, validation, tests, cluster, scorer, run, view).run_all())


def prepare(config: Config) -> tuple[str, list[Problem], list[Problem], list[Problem]]:
    """The model's folder and the training, validation and test problems, checked to fit. Raises InputError; starts nothing."""
    require_greedy_setting(config)
    model_dir = str(resolve_model(config.model.path))
    require_splits(model_dir, config.engine.tensor_parallel)
    problems = load_task(config.task.train)
    validation, test = (load_task(task)[: config.eval.problems] for task in (config.task.validation, config.task.test))
    batch_indices(len(problems), 0, config.rollout.prompts_per_step, config.run.seed)  # enough problems for a step?
    tokenizer = load_tokenizer(model_dir)
    require_prompts_fit(config, tokenizer, problems, config.policy.max_cot_tokens)
    require_prompts_fit(config, tokenizer, validation + test, config.eval_cot_tokens)
    return model_dir, problems, validation, test


class Training:
    """One run between its first and its last step."""

    def __init__(
        self,
        config: Config,
        model_dir: str,
        problems: list[Problem],
        validation: list[Problem],
        tests: HeldOutTests,
        cluster: Cluster,
        scorer: Scorer,
        run: RunDir,
        view: LiveView,
    ) -> None:
        self.config, self.model_dir, self.problems = config, model_dir, problems
        self.validation, self.tests = validation, tests
        self.learners = Learners(cluster.learners, run.waiting, config.learner.step_timeout_s)
        self.engines, self.scorer, self.run, self.view = cluster.engines, scorer, run, view
        self.pushed = False
        self.preemptions = 0  # of all engines since they started
        self.best = read_best(run.folder)
        self.best_saved_at = 0  # the step after which this process saved the best weights; 0: not yet

    async def run_all(self) -> None:
        """Start or resume, take every step, test the best checkpoint by validation, as the paper does."""
        await self._start()
        steps = self.config.run.steps
        if self.run.step == 0:
            if self.tests.base:
                await self._test(0)
            await self._validate(0)
        for step in range(self.run.step, steps):
            metrics = await self._step(step)
            done = step + 1
            if done == steps or (self.config.eval.every and done % self.config.eval.every == 0):
                metrics |= await self._validate(done)
            self.view.step(self.run.metrics.write(done, metrics))
            # Saved after its row is written: a run that is killed in between resumes from the checkpoint before, with every row.
            if done == steps or done % self.config.checkpoint.every == 0:
                await self._save(checkpoint.step_folder(self.run.folder, done), done)
        await self._test_best()

    async def _step(self, step: int) -> dict[str, float]:
        """Rollouts -> learning -> push. Returns the step's metrics; weights are at version step + 1."""
        meter = StepMetrics()
        learned = await self.learners.learn(step, self._groups(step, meter), meter)
        pushed = await self._push(step + 1)
        return meter.finish(learned, pushed) | {"engine/preemptions": await self._new_preemptions()}

    async def _groups(self, step: int, meter: StepMetrics) -> AsyncIterator[Group]:
        """The step's groups, with the time spent waiting for each on the meter."""
        groups = self._each("rollout", "the next group", self.rollouts.groups(step))
        while True:
            with meter.timed("time/wait_rollout"):
                group = await anext(groups, None)
            if group is None:
                return
            yield group

    async def _push(self, version: int) -> dict[str, float]:
        """Push the weights; verify the first push and every `push.verify_every`-th."""
        reports = await self.learners.call("push", version)
        report = asdict(reports[0])
        first, self.pushed = not self.pushed, True
        if first or version % self.config.push.verify_every == 0:
            distance = (await self.learners.call("verify", version))[0]
            self.run.event("push_verified", version=version, logprob_distance=distance)
        self.run.event("push", version=version, **report)
        return {f"push/{name}": float(value) for name, value in report.items()}

    async def _validate(self, step: int) -> dict[str, float]:
        """Accuracy on the validation problems, all of `eval.settings` at once, with the weights that the engines hold; the best
        weights so far are kept as a checkpoint of their own."""
        task, waiting = self.config.task.validation, self.run.waiting
        found = await evaluate(self.rollouts, self.run.folder, "validation", step, task, self.validation, waiting, self._progress)
        self._say("validation", step, found)
        score = next(summary.share for summary in found if summary.setting == self.config.selecting_setting)
        now = Best(step, score, validation_of(self.config, self.validation))
        if step > 0 and now.beats(self.best):
            await self._save(self.run.checkpoints / BEST, step, {"score": now.score, "validation": dict(now.validation)})
            self.best, self.best_saved_at = now, step
        return {f"eval/{summary.setting}": summary.share for summary in found}

    async def _test(self, step: int) -> EvalResults:
        rollouts = self.rollouts.under(self.tests.config)
        found = await evaluate_sets(rollouts, self.run.folder, step, self.tests.sets, self.run.waiting, self._progress)
        for summaries in found.tasks:
            self._say("test", step, summaries)
        for name, summary in found.choices:
            self.view.note(f"{name} at step {step}: {summary.accuracy:.1%}, NLL per token {summary.nll_per_token:.4f}")
        return found

    def _say(self, what: str, step: int, found: list[SettingSummary]) -> None:
        timed_out = sum(summary.timed_out for summary in found)
        shares = ", ".join(f"{summary.setting} {summary.share:.1%}" for summary in found)
        self.view.note(f"{what} at step {step}: {shares}" + (f"; {timed_out} checks timed out" if timed_out else ""))

    def _progress(self, what: str, total: int) -> Progress:
        return Progress(what, total, self.view.note)

    async def _save(self, folder: Path, step: int, more: Mapping[str, Any] | None = None) -> None:
        extra = {"step": step, "sigma": self.rollouts.sigma, "config_hash": config_hash(self.config)}
        await self.learners.call("save", str(folder), {**extra, **(more or {})})
        checkpoint.prune(self.run.folder, self.config.checkpoint.keep)
        self.run.event("checkpoint", step=step, path=str(folder))

    # ------------------------------------------------------------------ start and end

    async def _start(self) -> None:
        """Start engines and learners side by side, load the checkpoint when resuming, push, and prove the push."""
        config, timeout = self.config, self.config.engine.start_timeout_s
        self.view.note(
            f"starting {len(self.engines)} engine(s) and {len(self.learners.ranks)} learner rank(s) of {config.model.path}"
        )
        (self.rollouts, engines), learners = await asyncio.gather(  # whichever fails first is heard
            Rollouts.start(config, self.problems, self.engines, load_tokenizer(self.model_dir), self.scorer, self.run.waiting),
            self.learners.start(timeout),
        )
        self.run.event("started", engines=engines, learners=learners)
        fixed = [self.rollouts.prompt_ids(problem) for problem in self.problems[:VERIFY_SEQUENCES]]
        await self.learners.call("connect", self.engines, fixed)
        if removed := forget_after(self.run.folder, self.run.step):
            self.run.event("evaluations_removed", names=removed)
        if self.run.resume_from is not None:
            stored = await self.learners.call("load", str(self.run.resume_from))
            self.rollouts.sigma = float(stored[0]["sigma"])
        await self._push(self.run.step)
        await self._new_preemptions()  # of another run, where the engines are shared
        self.run.status("training")

    async def _test_best(self) -> None:
        """The test problems under the weights of the best validation, beside the base model's row, and where to look next."""
        if self.best is None:  # resumed at its end, and somebody removed the folder
            await self._validate(self.config.run.steps)
        assert self.best is not None  # the last step is always validated
        folder, step = self.run.checkpoints / BEST, self.best.step
        if self.best_saved_at != self.config.run.steps:  # else they are what learners and engines hold
            await self.learners.call("load", str(folder))
            await self._push(step)
        tested = await self._test(step)
        columns = ["setting", "base model", f"best validation, step {step}"]
        base = {(row["dataset"], row["setting"]): row for row in read_rows(self.run.folder, "test_000000.json")}
        for of_task in tested.tasks:
            dataset = of_task[0].dataset
            rows = [[one.setting, *map(_right, (base.get((dataset, one.setting)), one.row()))] for one in of_task]
            self.view.table(f"{self.config.run.name}: held-out test problems of {dataset}", columns, rows)
        self.view.note(
            f"metrics     {self.run.folder}/metrics.jsonl\ncheckpoint  {folder}\nnext        softrl export {folder} my-model"
        )

    # ------------------------------------------------------------------ waiting

    async def _new_preemptions(self) -> float:
        """Requests that the engines preempted since the last call."""
        refs = [engine.stats.remote() for engine in self.engines]
        stats = await wait_all(self.run.waiting, "stats", "engines", self.config.engine.request_timeout_s, refs)
        before, self.preemptions = self.preemptions, sum(s["preemptions"] for s in stats)
        return float(self.preemptions - before)

    def _each(self, name: str, for_whom: str, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return each(self.run.waiting, name, for_whom, self.config.engine.request_timeout_s, items)


def _right(row: dict[str, Any] | None) -> str:
    """Share and count of a summary's row; what was not asked of the base model has none."""
    return "-" if row is None else f"{row['share']:.1%} ({row['correct']}/{row['samples']})"


@contextmanager
def recorded_end(run: RunDir) -> Iterator[None]:
    """Leave status.json and events.jsonl saying how the run ended. Ctrl-C becomes a RunError that says how to go on.

    Bad input that shows before a new run has learned anything leaves no folder.
    """
    try:
        yield
    except KeyboardInterrupt:
        run.event("interrupted")
        run.status("interrupted")
        raise Interrupted(f"{run.folder}: interrupted; go on with --resume") from None
    except BaseException as error:
        if isinstance(error, InputError) and run.created and not run.learned:
            run.discard()
            raise
        run.event("failed", reason=str(error).splitlines()[0] if str(error) else type(error).__name__)
        run.status("failed")
        raise
    run.event("done")
    run.status("done")

"""The two halves of a run on their own: rollouts written to files, and learning from files."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.controller import prepare, recorded_end
from cluster.learners import Learners
from cluster.live import LiveView
from cluster.placement import Cluster, placed, ray_session
from cluster.rollouts import Rollouts
from cluster.run_dir import RunDir
from cluster.step_metrics import StepMetrics
from cluster.waits import each, named
from configs.errors import InputError
from configs.load import config_hash
from configs.schema import Config
from learner import checkpoint
from rollout.files import RolloutFile, list_rollouts, read_groups, write_rollouts
from rollout.models import load_tokenizer, resolve_model
from rollout.reward import Scorer
from rollout.tasks import Problem
from rollout.trajectory import Group


def write(config: Config, out: Path) -> None:
    """`softrl rollout`: the groups of run.steps steps of the untrained model, one file a step."""
    model_dir, problems, _, _ = prepare(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not an empty folder; give --out another folder, or remove it")
    with (
        ray_session(config),
        placed(config, model_dir, with_learner=False) as cluster,
        Scorer() as scorer,
        LiveView(config) as view,
    ):
        asyncio.run(_write(config, model_dir, problems, cluster, scorer, view, out))


async def _write(
    config: Config, model_dir: str, problems: list[Problem], cluster: Cluster, scorer: Scorer, view: LiveView, out: Path
) -> None:
    rollouts, _ = await Rollouts.start(config, problems, cluster.engines, load_tokenizer(model_dir), scorer, named)
    for step in range(config.run.steps):
        meter = StepMetrics()
        groups = []
        async for group in each(named, "rollout", "the next group", config.engine.request_timeout_s, rollouts.groups(step)):
            meter.add_group(group)
            groups.append(group)
        path = write_rollouts(
            out,
            f"step_{step:06d}",
            groups,
            model=config.model.path,
            weight_version=0,
            config_hash=config_hash(config),
            engine_dtype=config.engine.dtype,
        )
        view.step({"step": step + 1, **meter.finish({}, {})})
        view.note(f"wrote {path}")


def replay(config: Config, folder: Path) -> None:
    """`softrl train --replay`: learner ranks alone, one step for each file of written rollouts, in order.

    Written rollouts come from the untrained model, so only the first step is on-policy: a tool for the learner, not for results.
    """
    RunDir.check(config, resume=False)
    model_dir = str(resolve_model(config.model.path))
    files = [fitting(config, file) for file in list_rollouts(folder)[: config.run.steps]]
    with (
        ray_session(config),
        placed(config, model_dir, with_engines=False) as cluster,
        RunDir.create(config, resume=False) as run,
        recorded_end(run),
        LiveView(config) as view,
    ):
        asyncio.run(_replay(config, files, Learners(cluster.learners, run.waiting, config.learner.step_timeout_s), run, view))


async def _replay(config: Config, files: list[RolloutFile], learners: Learners, run: RunDir, view: LiveView) -> None:
    await learners.start(config.engine.start_timeout_s)
    sigma = 0.0
    for step, file in enumerate(files):
        meter = StepMetrics()
        groups = read_groups(file)
        sigma = groups[0].samples[0].trajectory.sigma
        learned = await learners.learn(step, _stream(groups), meter)
        view.step(run.metrics.write(step + 1, meter.finish(learned, {})))
    last = checkpoint.step_folder(run.folder, len(files))
    extra = {"step": len(files), "sigma": sigma, "config_hash": config_hash(config)}
    await learners.call("save", str(last), extra)
    view.note(f"checkpoint {last}")


async def _stream(groups: list[Group]) -> AsyncIterator[Group]:
    for group in groups:
        yield group


def fitting(config: Config, file: RolloutFile) -> RolloutFile:
    """The file, when its soft inputs can be rebuilt from this config's model: same weights, same engine dtype. Else InputError."""
    for key, theirs, ours in (
        ("model.path", file.model, config.model.path),
        ("engine.dtype", str(file.engine_dtype), str(config.engine.dtype)),
    ):
        if theirs != ours:
            raise InputError(f"{file.path}: drawn with {key} = {theirs}, the config says {ours}; set {key}={theirs}")
    if len(file.sizes) != config.rollout.prompts_per_step:
        raise InputError(
            f"{file.path}: holds {len(file.sizes)} groups, rollout.prompts_per_step is {config.rollout.prompts_per_step}"
        )
    return file

"""The two halves of a run on their own: rollouts written to files, and learning from files."""

import asyncio
from pathlib import Path
from typing import Any

import ray

from cluster.controller import prepare, recorded_end
from cluster.live import LiveView
from cluster.placement import actor_errors, placed, ray_session
from cluster.rollouts import Rollouts
from cluster.run_dir import RunDir
from cluster.step_metrics import StepMetrics
from configs.errors import InputError, RunError
from configs.load import config_hash
from configs.schema import Config
from learner import checkpoint
from rollout.files import RolloutFile, list_rollouts, read_groups, write_rollouts
from rollout.models import load_tokenizer, resolve_model
from rollout.reward import Scorer
from rollout.tasks import batch_indices
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

        async def draw() -> None:
            reports = await asyncio.gather(*(engine.start.remote() for engine in cluster.engines))
            sigma = config.policy.gamma * float(reports[0]["rms_embedding"])
            rollouts = Rollouts(config, cluster.engines, load_tokenizer(model_dir), scorer, sigma)
            for step in range(config.run.steps):
                meter = StepMetrics()
                chosen = batch_indices(len(problems), step, config.rollout.prompts_per_step, config.run.seed)
                groups = []
                async for group in rollouts.groups(step, [problems[i] for i in chosen]):
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

        deadline_s = config.engine.start_timeout_s + config.run.steps * config.engine.request_timeout_s
        try:
            with actor_errors("rollout: engines"):
                asyncio.run(asyncio.wait_for(draw(), deadline_s))
        except TimeoutError:
            raise RunError(f"rollout: {config.run.steps} steps took over {deadline_s:g} s, all deadlines together") from None


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
        learners, deadline = cluster.learners, config.learner.step_timeout_s

        def on_all(method: str, *args: Any) -> list[Any]:
            with run.waiting(method, "learner ranks", deadline), actor_errors(f"{method}: learner ranks"):
                return list(ray.get([getattr(rank, method).remote(*args) for rank in learners], timeout=deadline))

        on_all("start", *on_all("address")[0])
        sigma = 0.0
        for step, file in enumerate(files):
            groups = read_groups(file)
            sigma = groups[0].samples[0].trajectory.sigma
            view.step(run.metrics.write(step + 1, learn(on_all, step, groups)))
        last = checkpoint.step_folder(run.folder, len(files))
        extra = {"step": len(files), "sigma": sigma, "best": None, "config_hash": config_hash(config)}
        on_all("save", str(last), extra)
        view.note(f"checkpoint {last}")


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


def learn(on_all: Any, step: int, groups: list[Group]) -> dict[str, float]:
    """One optimiser step from written groups."""
    meter = StepMetrics()
    on_all("begin_step", step)
    for group in groups:
        meter.add_group(group)
        on_all("accumulate", group)
    with meter.timed("time/wait_learner"):
        learned = on_all("finish_step")[0]
    return meter.finish(learned, {})

"""The two halves of a run on their own: rollouts written to files, and learning from files."""

import asyncio
from pathlib import Path
from typing import Any

import ray

from cluster.controller import prepare, recorded_end
from cluster.live import LiveView
from cluster.placement import placed, ray_session
from cluster.rollouts import Rollouts
from cluster.run_dir import RunDir
from cluster.step_metrics import StepMetrics
from configs.errors import InputError
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
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: not empty; give --out another folder, or remove it")
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
                view.step({"step": step + 1, **meter.finish({}, {}, [])})
                view.note(f"wrote {path}")

        asyncio.run(asyncio.wait_for(draw(), config.engine.start_timeout_s + config.run.steps * config.engine.request_timeout_s))


def replay(config: Config, folder: Path) -> None:
    """`softrl train --replay`: learner ranks alone, one step for each file of written rollouts, in order.

    Written rollouts come from the untrained model, so only the first step is on-policy: a tool for the learner, not for results.
    """
    model_dir = str(resolve_model(config.model.path))
    files = [fitting(config, file) for file in list_rollouts(folder)[: config.run.steps]]
    with (
        RunDir.create(config, resume=False) as run,
        ray_session(config),
        placed(config, model_dir, with_engines=False) as cluster,
        LiveView(config) as view,
        recorded_end(run),
    ):
        learners, deadline = cluster.learners, config.learner.step_timeout_s

        def on_all(method: str, *args: Any) -> list[Any]:
            with run.waiting(method, "learner ranks", deadline):
                return list(ray.get([getattr(rank, method).remote(*args) for rank in learners], timeout=deadline))

        host, port = ray.get(learners[0].address.remote(), timeout=config.engine.start_timeout_s)
        on_all("start", host, port)
        for step, file in enumerate(files):
            view.step(run.metrics.write(step + 1, learn(on_all, step, read_groups(file))))
        last = checkpoint.step_folder(run.folder, len(files))
        on_all("save", str(last), {"step": len(files), "config_hash": config_hash(config)})
        view.note(f"checkpoint {last}")


def fitting(config: Config, file: RolloutFile) -> RolloutFile:
    """The file, when its soft inputs can be rebuilt from this config's model: same weights, same engine dtype. Else InputError."""
    for key, theirs, ours in (
        ("model.path", file.model, config.model.path),
        ("engine.dtype", str(file.engine_dtype), str(config.engine.dtype)),
    ):
        if theirs != ours:
            raise InputError(f"{file.path}: drawn with {key} = {theirs}, the config says {ours}; set {key}={theirs}")
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
    return meter.finish(learned, {}, [])

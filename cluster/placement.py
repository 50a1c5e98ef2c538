"""Where the actors of a run live: engines and learner ranks on the nodes, GPUs and cores of a Ray cluster.

On GPUs every engine takes `tensor_parallel` GPUs of one node and every learner rank takes one, anywhere. On CPUs all actors share
a node, because weights go through its memory, and its cores: rollouts and learning alternate more than they overlap, so each side
may use all of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from configs.errors import InputError, RunError
from configs.schema import Config
from learner.worker import LearnerRank
from rollout.engine import RolloutEngine
from rollout.engine_args import engine_environment, require_splits

PLACEMENT_TIMEOUT_S = 600.0

# Actors print to the terminal of the run: errors should, progress bars and start-up warnings should not.
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

# OpenMP teams of engine and learner share the cores. A waiting thread that spins keeps the one it waits for off its core: with one
# other busy process on two cores a learner step took three to seven times as long.
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}

# A CPU's tensors are the C library's memory. It gives back to the system whatever is large or much, and each step pays again for
# the first touch of every page: a sixth of a learner's step. It keeps what it had instead. Beside a GPU only copies of the weights
# for a checkpoint are as large, and they should go.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_MAX_": "0"}


@dataclass(frozen=True, slots=True)
class Cluster:
    """Handles of the actors of one run, started and reporting."""

    engines: list[Any]  # ray handles of rollout.engine.RolloutEngine
    learners: list[Any]  # ray handles of learner.worker.LearnerRank, by rank


@contextmanager
def ray_session(config: Config) -> Iterator[None]:
    """Connect to the cluster this process belongs to, or start one on this machine for the run's duration."""
    own = not ray.is_initialized()
    if own:
        joins = "RAY_ADDRESS" in os.environ
        local = (
            {} if joins else {"address": "local", "num_cpus": max(os.cpu_count() or 1, _actors(config)), "include_dashboard": False}
        )
        ray.init(log_to_driver=True, logging_level="ERROR", configure_logging=True, **local)
    try:
        yield
    finally:
        if own:
            ray.shutdown()


@contextmanager
def placed(config: Config, model_dir: str, *, with_learner: bool = True, with_engines: bool = True) -> Iterator[Cluster]:
    """Create the actors on reserved resources, and remove both at the end, whatever happened."""
    gpus = ray.cluster_resources().get("GPU", 0) > 0
    engines = config.engine.count if with_engines else 0
    ranks = config.learner.ranks if with_learner else 0
    per_engine = config.engine.tensor_parallel
    if engines:
        require_splits(model_dir, per_engine)
    bundles = [{"CPU": 1.0} | ({"GPU": float(per_engine)} if gpus else {})] * engines
    bundles += [{"CPU": 1.0} | ({"GPU": 1.0} if gpus else {})] * ranks
    group = _reserve(bundles, "PACK" if gpus else "STRICT_PACK")
    actors: list[Any] = []
    try:
        for i in range(engines):
            bound = None if gpus else cores(config.engine.threads, i, engines)
            options = _options(group, i, per_engine if gpus else 0, engine_environment(bound, per_engine))
            actors.append(ray.remote(RolloutEngine).options(**options).remote(config, model_dir, f"engine-{i}"))
        for rank in range(ranks):
            environment = {} if gpus else {"OMP_NUM_THREADS": str(config.learner.threads or _cores_each(ranks))}
            options = _options(group, engines + rank, 1 if gpus else 0, environment)
            actors.append(ray.remote(LearnerRank).options(**options).remote(config, model_dir, rank))
        yield Cluster(actors[:engines], actors[engines:])
    finally:
        _stop(actors[:engines])
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def _reserve(bundles: list[dict[str, float]], strategy: str) -> PlacementGroup:
    """A placement group for the bundles. Raises InputError when the cluster can never hold them, RunError when it is busy."""
    require_room(bundles, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    group = placement_group(bundles, strategy=strategy)
    try:
        ray.get(group.ready(), timeout=PLACEMENT_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        raise RunError(
            f"placement: no room for {len(bundles)} actors within {PLACEMENT_TIMEOUT_S:.0f} s; is another run holding them?"
        ) from None
    return group


def require_room(bundles: list[dict[str, float]], nodes: list[dict[str, float]]) -> None:
    """Raises InputError when nodes with these resources can never hold the bundles, each of them on one node."""
    for kind in ("CPU", "GPU"):
        need, have = (sum(part.get(kind, 0.0) for part in parts) for parts in (bundles, nodes))
        if need > have:
            raise InputError(
                f"engine.count and learner.ranks need {need:g} {kind}s, the cluster has {have:g}; lower them or add nodes"
            )
    per_engine, largest = (max((part.get("GPU", 0.0) for part in parts), default=0.0) for parts in (bundles, nodes))
    if per_engine > largest:
        raise InputError(
            f"engine.tensor_parallel = {per_engine:g}: the GPUs of an engine have to be in one node, the largest here has "
            f"{largest:g}; lower it"
        )


def _options(group: PlacementGroup, bundle: int, gpus: int, environment: dict[str, str]) -> dict[str, Any]:
    return {
        "num_cpus": 1,
        "num_gpus": gpus,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        "runtime_env": {"env_vars": process_environment(gpus) | environment},
    }


def process_environment(gpus: float) -> dict[str, str]:
    """What a process that decodes or learns on so many GPUs is started with."""
    return QUIET | SHARED_CORES | ({} if gpus else KEPT_MEMORY)


def _stop(engines: list[Any]) -> None:
    """Ask vLLM to leave by itself, so that no engine process outlives its actor."""
    with suppress(ray.exceptions.RayError, TimeoutError):  # the actor is killed next in any case
        ray.get([engine.stop.remote() for engine in engines], timeout=30)


def _actors(config: Config) -> int:
    return config.engine.count + config.learner.ranks


def _cores_each(parts: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // max(1, parts))


def cores(threads: int | None, engine: int = 0, engines: int = 1) -> list[int]:
    """The cores of one CPU engine: its share of all of them, or the first `threads` of that."""
    mine = sorted(os.sched_getaffinity(0))
    share = mine[engine * len(mine) // engines : (engine + 1) * len(mine) // engines] or mine
    return share[: threads or len(share)]

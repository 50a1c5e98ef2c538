"""A real vLLM engine and a real learner rank in a Ray cluster of one machine, shared by the tests of a module."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta

from cluster.learners import Learners
from cluster.placement import Cluster, placed
from cluster.rollouts import Rollouts
from cluster.waits import named
from configs.load import load_config
from configs.schema import Config
from learner.push import EngineClient, LearnerSource, SharedMemoryTrainer, SharedMemoryTrainerInfo
from rollout.models import load_tokenizer
from rollout.reward import Scorer
from rollout.tasks import Problem
from rollout.trajectory import SampleRequest, Trajectory
from tests.tiny_model import make_tiny_llama

DEADLINE_S = 300


@dataclass
class Rig:
    """An engine and a learner that hold the same weights."""

    config: Config
    model_dir: Path
    engine: Any
    learner: Any
    report: dict[str, Any]
    rollouts: Rollouts

    def call(self, ref: Any) -> Any:
        return ray.get(ref, timeout=DEADLINE_S)

    def push_tensors(self, names: list[str], tensors: dict[str, Tensor], engine: Any = None, version: int = 0) -> None:
        """Push a checkpoint of our own making, through the learner's sender: `names` are promised, `tensors` are sent."""
        first = next(iter(tensors.values()))
        metas = [ParamMeta(name, first.dtype, tuple(tensors[name].shape if name in tensors else first.shape)) for name in names]
        client = EngineClient([engine or self.engine], 1, DEADLINE_S)
        client.version = str(version)
        info = SharedMemoryTrainerInfo(rank=0)
        SharedMemoryTrainer.trainer_init(
            info, client=client, source=LearnerSource(metas, lambda: iter(tensors.items()))
        ).send_weights()

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        return load_file(self.model_dir / "model.safetensors")

    def draw(self, requests: list[SampleRequest]) -> list[Trajectory]:
        """Trajectories in the order of (prompt, sample)."""

        async def collect() -> list[Trajectory]:
            return [t async for t in self.rollouts.trajectories(requests)]

        found = asyncio.run(asyncio.wait_for(collect(), DEADLINE_S))
        return sorted(found, key=lambda t: (t.prompt_index, t.sample_index))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), hidden=128)


def tiny_config(model_dir: Path, *overrides: str) -> Config:
    """The demo recipe on the tiny model in float32, small enough for seconds."""
    small = [
        f"model.path={model_dir}",
        "model.dtype=float32",
        "engine.max_num_seqs=64",
        "engine.max_model_len=192",
        "engine.kv_cache_gib=0.25",
        "policy.max_cot_tokens=48",
        "learner.micro_batch_tokens=1024",
        "rollout.samples_per_prompt=12",
    ]
    return load_config(Path(__file__).parents[2] / "configs" / "demo.yaml", [*small, *overrides])


@pytest.fixture(scope="module")
def rig(request: pytest.FixtureRequest, ray_cluster: None, tiny_llama: Path) -> Iterator[Rig]:
    """With the config overrides that the test module lists under the name RIG."""
    with started(tiny_llama, *getattr(request.module, "RIG", ())) as rig:
        yield rig


@contextmanager
def started(model_dir: Path, *overrides: str) -> Iterator[Rig]:
    """An engine and a learner of this model, connected. Needs Ray."""
    config = tiny_config(model_dir, *overrides)
    with placed(config, str(model_dir)) as cluster, Scorer(workers=1) as scorer:
        engine, learner = cluster.engines[0], cluster.learners[0]
        rollouts, report = start(config, model_dir, cluster, scorer)
        rig = Rig(config, model_dir, engine, learner, report, rollouts)
        fixed = [rollouts.prompt_ids(problem) for problem in problems(4)]
        rig.call(learner.connect.remote([engine], fixed))
        yield rig


def start(config: Config, model_dir: Path, cluster: Cluster, scorer: Scorer) -> tuple[Rollouts, dict[str, Any]]:
    """Start the engine and the learner side by side, as a run does."""

    async def both() -> tuple[Rollouts, dict[str, Any]]:
        learners = Learners(cluster.learners, named, DEADLINE_S)
        tokenizer = load_tokenizer(str(model_dir))
        (rollouts, reports), _ = await asyncio.gather(
            Rollouts.start(config, problems(8), cluster.engines, tokenizer, scorer, named), learners.start(DEADLINE_S)
        )
        return rollouts, reports[0]

    return asyncio.run(both())


def problems(count: int) -> list[Problem]:
    return [Problem(index=i, question=f"What is {11 + 3 * i} + {7 + i}?", answer=str(18 + 4 * i)) for i in range(count)]

"""LearnerRank: the Ray actor that holds one rank of the learner and, on rank 0, the line to the engines.

Every method is called on all ranks in the same order by the controller; Ray runs an actor's calls in the order they came, so the
collectives inside them meet.
"""

import importlib
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.schema import Config
from learner.network import free_port
from rollout.trajectory import Group

if TYPE_CHECKING:
    from learner.push import PushReport


class LearnerRank:
    """One FSDP2 rank. `rank` of `config.learner.ranks`."""

    def __init__(self, config: Config, model_dir: str, rank: int) -> None:
        self.config, self.model_dir, self.rank = config, model_dir, rank
        if config.learner.threads is not None:
            torch.set_num_threads(config.learner.threads)

    def address(self) -> tuple[str, int]:
        """Where rank 0 will listen for the others."""
        return ray.util.get_node_ip_address(), free_port()

    def start(self, host: str, port: int) -> dict[str, Any]:
        """Join the process group and build the policy; returns what the controller logs of it."""
        from learner.learner import Learner

        importlib.import_module("learner.push")  # vLLM's modules, loaded while the engines start as well

        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{host}:{port}",
            rank=self.rank,
            world_size=self.config.learner.ranks,
            timeout=timedelta(seconds=self.config.learner.step_timeout_s),
        )
        self.learner = Learner(self.config, Path(self.model_dir), self.rank, self.config.learner.ranks, device)
        return {
            "rank": self.rank,
            "device": torch.cuda.get_device_name(0) if on_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
            "micro_batch_tokens": self.learner.micro_batch_tokens,
            "rms_embedding": self.learner.rms_embedding(),
        }

    def connect(self, engines: list[Any], fixed_sequences: list[NDArray[np.int32]]) -> None:
        """Open the push to the engines; `fixed_sequences` are the token ids that a push is verified with."""
        from learner.push import Pusher  # brings vLLM, which the controller's process does without

        self.fixed_sequences = fixed_sequences
        self.pusher = Pusher(
            backend=self.config.push.backend.resolved(torch.cuda.is_available()),
            rank=self.rank,
            engines=engines,
            workers_per_engine=self.config.engine.tensor_parallel,
            engine_dtype=self.config.engine.dtype,
            timeout_s=self.config.push.timeout_s,
            tensors=self.learner.full_tensors,
            metas=self.learner.tensor_shapes(),
        )

    def begin_step(self, step: int) -> None:
        """Forget what an earlier step, finished or abandoned, left behind."""
        self.learner.begin_step(step)

    def accumulate(self, group: Group) -> None:
        """Forward and backward over this rank's share of a group."""
        self.learner.accumulate(group)

    def finish_step(self) -> dict[str, float]:
        """The optimiser step over everything accumulated; returns the step's metrics."""
        return self.learner.finish_step()

    def push(self, version: int) -> "PushReport":
        """Bring the engines to this rank's weights as `version`; every rank takes part, rank 0 sends."""
        return self.pusher.push(version)

    def verify(self, version: int) -> float:
        """Compare the engines' weights with ours: bytes, and log-probs of the fixed sequences, whose distance it returns."""
        mine = self.learner.token_logprobs(self.fixed_sequences)
        return self.pusher.verify(self.fixed_sequences, mine, version)

    def save(self, folder: str, extra: dict[str, Any]) -> None:
        """Write a checkpoint, with `extra` for the controller."""
        self.learner.save(Path(folder), extra)

    def load(self, folder: str) -> dict[str, Any]:
        """Go on from a checkpoint; returns what the controller stored in it."""
        return self.learner.load(Path(folder))

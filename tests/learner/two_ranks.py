"""What each of two gloo processes does in test_gradient.py; a module of its own so that a spawned process can import it."""

from pathlib import Path

import torch
import torch.distributed as dist

from configs.schema import Config
from learner.learner import Learner
from rollout.trajectory import Group


def learn(rank: int, config: Config, model_dir: Path, groups: list[Group], out: Path) -> None:
    """Gradients of the groups, then one optimiser step and a checkpoint; rank 0 writes what it saw to out/seen.pt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    learner = Learner(config, model_dir, rank, 2, torch.device("cpu"))
    learner.begin_step(0)
    for group in groups:
        learner.accumulate(group)
    learner.flush()
    gradients = {name: p.grad.full_tensor() for name, p in learner.policy.model.named_parameters()}
    metrics = learner.finish_step()
    weights = dict(learner.full_tensors(torch.float32))
    learner.save(out / "checkpoints" / "step_000001", {"from": "two ranks"})
    if rank == 0:
        torch.save({"gradients": gradients, "metrics": metrics, "weights": weights}, out / "seen.pt")
    dist.destroy_process_group()

"""The sender's side of a push that an engine does not take."""

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from configs.errors import RunError
from learner.push import LearnerSource, SharedMemoryTrainer, SharedMemoryTrainerInfo


class Client:
    """Engines of which one fails in the call named `failing`, and then in every one."""

    def __init__(self, failing: str) -> None:
        self.failing, self.failed, self.calls = failing, False, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*_: Any) -> None:
            self.calls.append(name)
            self.failed |= name == self.failing
            if self.failed:
                raise RunError(f"{name} failed")

        return call


@pytest.mark.parametrize("failing", ["start_weight_update", "update_weights", "finish_weight_update"])
def test_a_push_that_fails_anywhere_is_abandoned_on_all_engines(tmp_path: Path, failing: str) -> None:
    weights, client = {"w": torch.zeros(2)}, Client(failing)
    source = LearnerSource([ParamMeta("w", torch.float32, (2,))], lambda: iter(weights.items()))
    info = SharedMemoryTrainerInfo(rank=0, path=str(tmp_path / "weights"))
    trainer = SharedMemoryTrainer.trainer_init(info, client=client, source=source)
    with pytest.raises(RunError, match=f"^{failing} failed$"):
        trainer.send_weights()
    assert client.calls[-2:] == [failing, "abandon_weight_update"] and not (tmp_path / "weights").exists()

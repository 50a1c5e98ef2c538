"""Checkpoints of a run: one folder a step, written whole or not at all.

    runs/NAME/checkpoints/step_000040/   *.distcp, .metadata    model, AdamW moments, step, by torch.distributed.checkpoint
                                         controller.json        what the controller needs to go on: data order, versions

A checkpoint is written into a hidden folder beside it and renamed when every rank is done, so a name without a dot in front is
always a whole checkpoint. It holds full tensors by name: any number of ranks can read it.

    .NAME.partial    a checkpoint being written              a kill leaves it: removed by the next save of NAME, or `recover`
    .NAME.replaced   the one before, until NAME is there     a kill leaves it: NAME again if there is none, else removed
    .NAME.deleted    one being deleted by `prune`            a kill leaves it: removed
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from configs.errors import InputError, RunError

FOLDER = "checkpoints"
CONTROLLER = "controller.json"
MODEL = "model"  # prefix of the model's tensors inside a checkpoint


def step_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimiser steps belongs."""
    return run_dir / FOLDER / f"step_{step:06d}"


def save(folder: Path, step: int, model: nn.Module, optimiser: torch.optim.Optimizer, controller: Mapping[str, Any]) -> None:
    """Writes `folder`, replacing it if it exists. Collective: every rank calls it with the same arguments.

    `model` is the sharded Hugging Face model, so that tensors bear its names; `controller` must be JSON. Raises RunError on
    every rank if any could not write (a full disk, say): nothing half-written is left, what was in `folder` before still is.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    controller_json = json.dumps(dict(controller))
    try:
        _on_first_rank(lambda: _fresh(partial, folder))
        dcp.save(_state(model, optimiser, step), checkpoint_id=partial)
        _on_first_rank(lambda: _publish(partial, folder, controller_json))
    except (CheckpointException, OSError, RuntimeError) as error:
        if dist.get_rank() == 0:
            with suppress(OSError):
                _recover(folder)
        raise RunError(f"{folder}: could not write the checkpoint ({cause(error)}); free some space and --resume") from error


def load(checkpoint: Path, model: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, dict[str, Any]]:
    """Reads a checkpoint into a model and its optimiser, in place; returns (step, controller). Collective.

    Raises InputError for a folder that is not a whole checkpoint of this model.
    """
    _require_whole(checkpoint)
    state = _state(model, optimiser, 0)
    try:
        dcp.load(state, checkpoint_id=checkpoint)  # into the very tensors of model and optimiser
    except (CheckpointException, OSError, RuntimeError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint of this model ({cause(error)})") from error
    return int(state["step"]), json.loads((checkpoint / CONTROLLER).read_text())


def latest(run_dir: Path) -> Path | None:
    """The run's newest whole checkpoint, or None."""
    found = _whole(run_dir)
    return found[-1] if found else None


def recover(run_dir: Path) -> None:
    """Clears up after broken-off writes, of every checkpoint of the run: what was whole before is whole again. One process, while
    no other saves or prunes."""
    for name in {path.name[1:].rpartition(".")[0] for path in _hidden(run_dir / FOLDER, "*")}:
        _recover(run_dir / FOLDER / name)


def prune(run_dir: Path, keep: int) -> list[Path]:
    """Deletes all but the newest `keep` checkpoints, and what broken-off writes left; returns the deleted ones. One process."""
    recover(run_dir)
    doomed = _whole(run_dir)[: -keep or None]
    for checkpoint in doomed:
        deleted = checkpoint.with_name(f".{checkpoint.name}.deleted")
        checkpoint.rename(deleted)  # never a half-deleted `step_*`
        shutil.rmtree(deleted)
    return doomed


def _state(model: nn.Module, optimiser: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """What a checkpoint holds, by parameter name, tied parameters once. Hyper-parameters are not in it: the config has them."""
    parameters = dict(model.named_parameters())
    return {
        MODEL: {name: parameter.detach() for name, parameter in parameters.items()},
        "optimiser": {name: optimiser.state[parameter] for name, parameter in parameters.items()},
        "step": step,
    }


def _whole(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / FOLDER).glob("step_*") if (path / CONTROLLER).exists())


def _require_whole(checkpoint: Path) -> None:
    for name in (".metadata", CONTROLLER):
        if not (checkpoint / name).exists():
            raise InputError(f"{checkpoint}: no {name}, so not a checkpoint; expected e.g. RUN/{FOLDER}/step_000040")


def _hidden(folder: Path, name: str) -> list[Path]:
    """What writes of checkpoint `name` have under way in a checkpoints folder."""
    return [path for suffix in ("partial", "replaced", "deleted") for path in folder.glob(f".{name}.{suffix}")]


def _recover(final: Path) -> None:
    """Leaves of a checkpoint's name nothing but the whole checkpoint, if there was one."""
    replaced = _replaced(final)
    if replaced.exists() and not final.exists():  # killed between the two renames of `_publish`
        replaced.rename(final)
    for leftover in _hidden(final.parent, final.name):
        shutil.rmtree(leftover)


def _replaced(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _fresh(partial: Path, final: Path) -> None:
    _recover(final)
    partial.mkdir(parents=True)


def _publish(partial: Path, final: Path, controller_json: str) -> None:
    with open(partial / CONTROLLER, "w") as file:
        file.write(controller_json)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():  # the best one, or the same step again after a resume from an older one
        final.rename(_replaced(final))
    partial.rename(final)
    _recover(final)


def _on_first_rank(act: Callable[[], None]) -> None:
    """Runs `act` on rank 0 while the others wait; if it fails there, every rank raises the same OSError."""
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except OSError as error:
            failure[0] = str(error)
    dist.broadcast_object_list(failure, src=0)
    if failure[0] is not None:
        raise OSError(failure[0])


def cause(error: BaseException) -> str:
    """One line of an error: of a CheckpointException, the first failing rank's own."""
    if isinstance(error, CheckpointException):
        rank, (inner, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {cause(inner)}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""A training checkpoint -> an ordinary Hugging Face checkpoint that stock transformers and vLLM load. One process, no GPU."""

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from configs.errors import InputError, RunError
from configs.schema import Config, Dtype
from learner.checkpoint import MODEL, cause
from learner.policy import TORCH_DTYPE
from rollout.models import resolve_model

SHARD_BYTES = 5 * 1000**3  # Hugging Face's own size of a safetensors file
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".index.json")


def export(checkpoint_dir: Path, out_dir: Path, config: Config) -> None:
    """Writes out_dir: weights of `checkpoint_dir` in `model.dtype`, all other files (config, tokenizer) of the base model.

    At most one shard is in memory at a time. Raises InputError for a checkpoint or an out_dir that cannot be used, RunError if
    writing fails; out_dir appears whole or not at all.
    """
    dtype = config.model.dtype
    if not (checkpoint_dir / ".metadata").exists():
        raise InputError(f"{checkpoint_dir}: no .metadata, so not a checkpoint; expected e.g. RUN/checkpoints/step_000040")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir}: exists and is not empty; name a new folder")
    model_dir = resolve_model(config.model.path)
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _copy_model_files(model_dir, partial, dtype)
        _write_weights(checkpoint_dir, partial, dtype)
        if out_dir.exists():
            out_dir.rmdir()
        partial.rename(out_dir)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{out_dir}: could not write the export ({error})") from error
    except CheckpointException as error:
        raise InputError(f"{checkpoint_dir}: cannot be read ({cause(error)})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_model_files(model_dir: Path, out_dir: Path, dtype: Dtype) -> None:
    for file in sorted(model_dir.iterdir()):
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, out_dir / file.name)
    config = json.loads((out_dir / "config.json").read_text())
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # transformers 5 renamed it and reads both
    config[key] = dtype.value
    (out_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_weights(checkpoint_dir: Path, out_dir: Path, dtype: Dtype) -> None:
    shapes = _shapes(checkpoint_dir)
    shards = _plan_shards(shapes, TORCH_DTYPE[dtype].itemsize)
    weight_map: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        single = "model.safetensors"
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        state: dict[str, Any] = {MODEL: {name: torch.empty(shapes[name], dtype=torch.float32) for name in names}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as intended
            dcp.load(state, checkpoint_id=checkpoint_dir, no_dist=True)
        tensors = {name: tensor.to(TORCH_DTYPE[dtype]) for name, tensor in state[MODEL].items()}
        save_file(tensors, out_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _shapes(checkpoint_dir: Path) -> dict[str, torch.Size]:
    """Name -> shape of the model's tensors in a checkpoint, from its metadata alone."""
    prefix = f"{MODEL}."
    entries = FileSystemReader(checkpoint_dir).read_metadata().state_dict_metadata
    return {
        key.removeprefix(prefix): entry.size
        for key, entry in entries.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }


def _plan_shards(shapes: Mapping[str, torch.Size], itemsize: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = SHARD_BYTES + 1
    for name, shape in shapes.items():
        if size + shape.numel() * itemsize > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += shape.numel() * itemsize
    return shards

"""Rollouts on disk: one pair of files per batch of groups, from which every Trajectory comes back bit for bit.

    NAME.safetensors   flat arrays; a ragged quantity is its values end to end plus int64 offsets, T trajectories in group order;
                       in its metadata, under DESCRIPTION, what stands in NAME.json
    NAME.json          model, weight version, config hash, engine dtype, the groups, and what is text

                per trajectory [T]                                     ragged
    samples     prompt_index sample_index reward correct timed_out     prompt_ids                / prompt_offsets [T+1]
    policy      mode (0 hard, 1 soft, 2 fuzzy) tau sigma noise_seed    shadow_ids dropped_mass   / cot_offsets [T+1]
    engine      phrase_found                                           prefill_ids               / prefill_offsets [T+1]
                                                                       answer_ids answer_logprobs/ answer_offsets [T+1]
                                           weight_versions weight_version_starts / weight_version_offsets [T+1]
    full record has_soft_embeddings, soft_embeddings [their CoT steps, n0] in the engine's dtype
    supports    support_ids support_probs / support_offsets [all CoT steps + 1]

Two files cannot be replaced at once, but one can: readers here go by NAME.safetensors alone, which is whole at every moment, so
that neither a kill nor a reader beside a running evaluation meets half a pair. NAME.json, written last, is for other readers.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import InputError, RunError
from configs.schema import Dtype, Mode
from rollout.trajectory import Group, Sample, Trajectory

FORMAT = 3
DESCRIPTION = "softrl"  # the key of the description in the metadata of the arrays
MODES = (Mode.hard, Mode.soft, Mode.fuzzy)  # a mode's place is its number in the array `mode`

PER_TRAJECTORY = {
    "prompt_index": np.int64,
    "sample_index": np.int64,
    "mode": np.uint8,
    "tau": np.float64,
    "sigma": np.float64,
    "noise_seed": np.int64,
    "reward": np.float64,
    "correct": np.bool_,
    "timed_out": np.bool_,
    "phrase_found": np.bool_,
    "has_soft_embeddings": np.bool_,
}
OF_SAMPLE = ("reward", "correct", "timed_out")  # the others are their trajectory's
RAGGED: dict[str, dict[str, Any]] = {  # offsets: the values that they cut
    "prompt_offsets": {"prompt_ids": np.int32},
    "cot_offsets": {"shadow_ids": np.int32, "dropped_mass": np.float32},
    "prefill_offsets": {"prefill_ids": np.int32},
    "answer_offsets": {"answer_ids": np.int32, "answer_logprobs": np.float32},
    "weight_version_offsets": {"weight_versions": np.int64, "weight_version_starts": np.int64},
}
SUPPORT = {"support_ids": np.int32, "support_probs": np.float32}
JSON_KEYS = {
    "format": int,
    "model": str,
    "weight_version": int,
    "config_hash": str,
    "engine_dtype": str,
    "groups": list,
    "stop_reason": list,
    "answer_text": list,
}


@dataclass(frozen=True, slots=True)
class RolloutFile:
    """The description; whoever replays compares model and dtype with the config."""

    path: Path  # NAME.safetensors
    model: str  # model.path of the config that made it
    weight_version: int  # the engine's when the batch began
    config_hash: str
    engine_dtype: Dtype
    steps: tuple[int, ...]  # of each group
    prompt_indices: tuple[int, ...]  # of each group
    sizes: tuple[int, ...]  # samples of each group
    stop_reasons: tuple[str, ...]  # of each trajectory
    answer_texts: tuple[str, ...]


def write_rollouts(
    folder: Path, name: str, groups: list[Group], *, model: str, weight_version: int, config_hash: str, engine_dtype: Dtype
) -> Path:
    """Write folder/name.safetensors and folder/name.json, replacing a pair of that name; returns the path of the arrays.

    Raises RunError when the folder cannot be written (a full disk); no half-written file remains, and what was there before does.
    """
    samples = [sample for group in groups for sample in group.samples]
    description = {
        "format": FORMAT,
        "model": model,
        "weight_version": weight_version,
        "config_hash": config_hash,
        "engine_dtype": str(engine_dtype),
        "groups": [{"step": g.step, "prompt_index": g.prompt_index, "samples": len(g.samples)} for g in groups],
        "stop_reason": [s.trajectory.stop_reason for s in samples],
        "answer_text": [s.answer_text for s in samples],
    }
    text = json.dumps(description, indent=1)
    arrays = _arrays(samples, Dtype(engine_dtype))
    path = folder / f"{name}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    replace_file(path, lambda partial: save_file(arrays, partial, metadata={DESCRIPTION: text}))
    replace_file(path.with_suffix(".json"), lambda partial: partial.write_text(text))
    return path


def list_rollouts(folder: Path) -> list[RolloutFile]:
    """The descriptions of all rollout files of a folder, by name. Raises InputError without any, or for one that is none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected one written by `softrl rollout` or by a run")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise InputError(f"{folder}: no rollouts; expected *.safetensors")
    return [read_description(path) for path in paths]


def read_groups(file: RolloutFile) -> list[Group]:
    """The groups of one file, as it is now. Raises InputError naming file and key for a missing array, or one that does not fit the
    others."""
    reader = _Reader(file.path)
    file = reader.description
    samples = iter(_read_samples(reader))
    return [
        Group(step=step, prompt_index=prompt, samples=tuple(next(samples) for _ in range(size)))
        for step, prompt, size in zip(file.steps, file.prompt_indices, file.sizes, strict=True)
    ]


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a file beside `path`, then rename it over `path`. If that fails: RunError, and `path` is as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: Exception) -> RunError:
    """The error to raise when `path` could not be written because of `error`: one line with its reason."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).strip().partition("\n")[0]
    return RunError(f"{path}: cannot be written ({reason}); free some space or choose a folder that can be written")


# Writing


def _arrays(samples: Sequence[Sample], dtype: Dtype) -> dict[str, Tensor]:
    """Every array of the file. Raises TypeError for a trajectory array of another dtype than Trajectory declares."""
    trajectories = [sample.trajectory for sample in samples]
    arrays: dict[str, NDArray[Any]] = {}
    for name, kind in PER_TRAJECTORY.items():
        arrays[name] = np.array([_scalar(sample, name) for sample in samples], dtype=kind)
    for offsets, values in RAGGED.items():
        for name, kind in values.items():
            parts = [getattr(t, name) for t in trajectories]
            arrays[name] = _joined(parts, kind)
            arrays[offsets] = _offsets([len(part) for part in parts])
    for name, kind in SUPPORT.items():
        arrays[name] = _joined([getattr(t, name) for t in trajectories], kind)
    arrays["support_offsets"] = _offsets(np.concatenate([[], *(np.diff(t.support_offsets) for t in trajectories)]))
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    if full := [t.soft_embeddings for t in trajectories if t.soft_embeddings is not None]:
        tensors["soft_embeddings"] = _typed(np.concatenate(full, dtype=np.uint8, casting="no"), getattr(torch, dtype))
    return tensors


def _scalar(sample: Sample, name: str) -> Any:
    trajectory = sample.trajectory
    if name == "mode":
        return MODES.index(trajectory.mode)
    if name == "has_soft_embeddings":
        return trajectory.soft_embeddings is not None
    return getattr(sample if name in OF_SAMPLE else trajectory, name)


def _typed(rows: NDArray[np.uint8], dtype: torch.dtype) -> Tensor:
    """Raw bytes [R, n0 * itemsize] as a tensor [R, n0]; copied, because numpy's strides of an empty array are not torch's."""
    tensor = torch.empty(len(rows), rows.shape[1] // dtype.itemsize, dtype=dtype)
    tensor.view(torch.uint8).copy_(torch.from_numpy(rows))
    return tensor


def _joined(parts: list[NDArray[Any]], kind: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype=kind), *parts], dtype=kind, casting="no")


def _offsets(lengths: Any) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


# Reading


def read_description(path: Path) -> RolloutFile:
    """The description of NAME.safetensors; arrays are not read. Raises InputError naming a key that is missing or does not fit."""
    with _opened(path) as arrays:
        return _described(path, arrays)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The open file: one version of it, even if it is replaced meanwhile."""
    try:
        with safe_open(path, framework="pt") as arrays:
            yield arrays
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({str(error).partition(chr(10))[0]})") from error


def _described(path: Path, arrays: Any) -> RolloutFile:
    text = (arrays.metadata() or {}).get(DESCRIPTION)
    if text is None:
        raise InputError(f"{path}: no rollouts of this version of softrl (no {DESCRIPTION} in its metadata); draw them again")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path}: its description is no JSON ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(content).__name__}")
    for key, kind in JSON_KEYS.items():
        if not isinstance(content.get(key), kind):
            found = f"found {content[key]!r}"[:60] if key in content else "which is missing"
            raise InputError(f"{path}: {key}: expected a JSON {kind.__name__}, {found}")
    if content["format"] != FORMAT:
        raise InputError(f"{path}: format = {content['format']}: expected {FORMAT}; another version of softrl wrote it")
    if content["engine_dtype"] not in list(Dtype):
        raise InputError(f"{path}: engine_dtype = {content['engine_dtype']}: expected one of {', '.join(Dtype)}")
    steps, prompts, sizes = (_group_column(path, content["groups"], key) for key in ("step", "prompt_index", "samples"))
    count = sum(sizes)
    for key in ("stop_reason", "answer_text"):
        if len(content[key]) != count or not all(isinstance(item, str) for item in content[key]):
            raise InputError(f"{path}: {key}: expected {count} texts, one per sample, found {len(content[key])}")
    return RolloutFile(
        path=path,
        model=content["model"],
        weight_version=content["weight_version"],
        config_hash=content["config_hash"],
        engine_dtype=Dtype(content["engine_dtype"]),
        steps=steps,
        prompt_indices=prompts,
        sizes=sizes,
        stop_reasons=tuple(content["stop_reason"]),
        answer_texts=tuple(content["answer_text"]),
    )


def _group_column(path: Path, groups: list[Any], key: str) -> tuple[int, ...]:
    values = [group.get(key) if isinstance(group, dict) else None for group in groups]
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise InputError(f"{path}: groups: expected each to hold {key}, an integer of at least 0")
    return tuple(value for value in values if value is not None)


class _Reader:
    """The description and the checked arrays of one safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as arrays:
            self.description = _described(path, arrays)
            self.tensors: dict[str, Tensor] = {name: arrays.get_tensor(name) for name in arrays.keys()}  # noqa: SIM118  no mapping

    def tensor(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise InputError(f"{self.path}: {key}: missing; expected an array of that name")
        return self.tensors[key]

    def array(self, key: str, kind: Any, length: int) -> NDArray[Any]:
        array = self.tensor(key).numpy() if self.tensor(key).dtype is not torch.bfloat16 else None
        if array is None or array.dtype != kind or array.shape != (length,):
            found = f"{str(self.tensor(key).dtype).removeprefix('torch.')} {list(self.tensor(key).shape)}"
            raise InputError(f"{self.path}: {key}: expected {np.dtype(kind).name} [{length}], found {found}")
        return array

    def offsets(self, key: str, count: int) -> NDArray[np.int64]:
        """[count + 1], from 0, never falling."""
        offsets = self.array(key, np.int64, count + 1)
        if offsets[0] != 0 or (np.diff(offsets) < 0).any():
            raise InputError(f"{self.path}: {key}: expected offsets that start at 0 and never fall")
        return offsets


def _read_samples(reader: _Reader) -> list[Sample]:
    file = reader.description
    count = sum(file.sizes)
    scalars = {name: reader.array(name, kind, count).tolist() for name, kind in PER_TRAJECTORY.items()}
    if bad := [number for number in scalars["mode"] if number >= len(MODES)]:
        raise InputError(f"{reader.path}: mode: expected 0 hard, 1 soft or 2 fuzzy, found {bad[0]}")
    pieces: dict[str, list[NDArray[Any]]] = {}
    for key, values in RAGGED.items():
        offsets = reader.offsets(key, count)
        for name, kind in values.items():
            pieces[name] = np.split(reader.array(name, kind, int(offsets[-1])), offsets[1:-1])
    cot = reader.offsets("cot_offsets", count)
    support = reader.offsets("support_offsets", int(cot[-1]))
    for name, kind in SUPPORT.items():
        pieces[name] = np.split(reader.array(name, kind, int(support[-1])), support[cot[1:-1]])
    embeddings = _read_embeddings(reader, file.engine_dtype, np.diff(cot), scalars["has_soft_embeddings"])
    samples = []
    for i in range(count):
        scalar = {name: values[i] for name, values in scalars.items()}
        scalar.pop("has_soft_embeddings")
        verdict = {name: scalar.pop(name) for name in OF_SAMPLE}
        fields: dict[str, Any] = scalar | {name: parts[i] for name, parts in pieces.items()}
        fields["mode"] = MODES[scalar["mode"]]
        fields["support_offsets"] = support[cot[i] : cot[i + 1] + 1] - support[cot[i]]
        fields["soft_embeddings"] = embeddings[i]
        trajectory = Trajectory(**fields, stop_reason=file.stop_reasons[i])
        samples.append(Sample(trajectory=trajectory, answer_text=file.answer_texts[i], **verdict))
    return samples


def _read_embeddings(
    reader: _Reader, dtype: Dtype, cot_lengths: NDArray[np.int64], present: list[bool]
) -> list[NDArray[np.uint8] | None]:
    """Per trajectory its soft embeddings as raw bytes [C, n0 * itemsize], or None where only the support was recorded."""
    if not any(present):
        return [None] * len(present)
    rows = np.where(present, cot_lengths, 0)
    tensor = reader.tensor("soft_embeddings")
    if tensor.ndim != 2 or len(tensor) != rows.sum() or tensor.dtype is not getattr(torch, dtype):
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise InputError(f"{reader.path}: soft_embeddings: expected {dtype} [{rows.sum()}, n0], found {found}")
    parts = np.split(tensor.view(torch.uint8).numpy(), np.cumsum(rows)[:-1])
    return [part if there else None for part, there in zip(parts, present, strict=True)]

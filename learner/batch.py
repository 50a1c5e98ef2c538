"""Trajectories -> packed micro-batches in which a prompt stands once, followed by the samples that share it.

One row per input token. Of a prompt with P tokens and two samples:

    row        0 .. P-1     P .. P+n0-1     P+n0 .. P+n0+n1-1
    tokens     prompt       sample 0        sample 1
    position   0 .. P-1     P .. P+n0-1     P .. P+n1-1             (restarts after the prompt)
    sees       itself       prompt, itself  prompt, itself          (causally; other prompts' blocks follow and are not seen)

Row r predicts what stands at the next position. The first CoT step of *every* sample is predicted by row P-1, the prompt's
last, so steps carry the index of the row that predicts them instead of assuming "the row before". The last answer token is a
target only: nothing is predicted from it, so it has no row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import InputError
from configs.schema import Mode
from learner.attention import Segments, segments
from rollout.trajectory import Trajectory

Weighted = tuple[Trajectory, float]  # a trajectory and its weight in the loss, advantage / (B G)


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftSteps:
    """S soft or fuzzy CoT steps with N support entries. The noisy input h~ of a step is data: what it was, where it stands."""

    hidden_row: Tensor  # int64 [S] the row whose hidden state gives the step's distribution
    input_row: Tensor  # int64 [S] the row whose input embedding is h~
    position: Tensor  # int64 [S] absolute position of that row, P + t: the counter of the noise
    seed: Tensor  # int64 [S] the trajectory's noise seed
    tau: Tensor  # float32 [S]
    sigma: Tensor  # float32 [S] > 0
    weight: Tensor  # float32 [S] advantage / (B G)
    sample: Tensor  # int64 [S] index into PackedBatch.prompt_index and sample_index
    support_ids: Tensor  # int32 [N] ascending within a step
    support_probs: Tensor  # float32 [N] the engine's, each step sums to 1
    support_offsets: Tensor  # int64 [S+1]
    recorded: Tensor | None  # uint8 [S, n0 * itemsize] h~ in the engine's dtype, when every trajectory was recorded in full


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSteps:
    """T sampled tokens: the CoT of hard trajectories, or answers."""

    hidden_row: Tensor  # int64 [T] the row whose hidden state predicts the token
    target: Tensor  # int64 [T]
    tau: Tensor  # float32 [T] > 0; 1 for answers
    weight: Tensor  # float32 [T]
    sample: Tensor  # int64 [T]
    engine_logprob: Tensor  # float32 [T] what the engine recorded; NaN where it records none (hard CoT)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One micro-batch of R rows, M samples. Forced prefill tokens are rows, never targets: they carry no loss."""

    input_ids: Tensor  # int64 [R]; the shadow id stands in at soft rows, which the policy overlays
    position: Tensor  # int64 [R]
    segments: Segments  # who sees whom
    soft: SoftSteps
    hard: TokenSteps
    answer: TokenSteps
    prompt_index: tuple[int, ...]  # [M] the problem's index in its data set, to name a sample in a message
    sample_index: tuple[int, ...]  # [M] the sample's index in its group
    generated: int  # CoT + prefill + answer tokens of the M samples
    filler: bool = False  # a zero-weight copy that keeps ranks in step: its numbers are not counted

    @property
    def rows(self) -> int:
        """R, the input tokens: each prompt once, and every sample's tokens but its last answer token."""
        return len(self.input_ids)

    def to(self, device: torch.device) -> "PackedBatch":
        """The same batch with all tensors, those of its steps too, on `device`; copies to a GPU may still be under way."""
        return _to(self, device)


def pack(weighted: Sequence[Weighted], micro_batch_tokens: int, ranks: int = 1) -> list[PackedBatch]:
    """Packs trajectories into the fewest micro-batches of at most `micro_batch_tokens` rows, balanced, in multiples of `ranks`.

    A single sample that is longer than `micro_batch_tokens` gets a micro-batch of its own. Raises InputError for a trajectory that
    cannot be trained on.
    """
    for trajectory, _ in weighted:
        _require_trainable(trajectory)
    trajectories = [trajectory for trajectory, _ in weighted]
    return [_build([weighted[i] for i in members]) for members in _deal(trajectories, micro_batch_tokens, ranks)]


def split_for_ranks(batches: Sequence[PackedBatch], ranks: int) -> list[list[PackedBatch]]:
    """Deals micro-batches to ranks, largest first, the same number to each; zero-weight copies of the smallest fill the gaps.

    FSDP's collectives need every rank to run as many forwards and backwards as the others.
    """
    ordered = sorted(batches, key=lambda batch: batch.rows, reverse=True)
    missing = -len(ordered) % ranks
    ordered += [_zero_weight(ordered[-1])] * missing
    return [ordered[rank::ranks] for rank in range(ranks)]


def packed_rows(weighted: Sequence[Weighted]) -> int:
    """Rows of one micro-batch that held them all: each distinct prompt once, and every sample."""
    prompts = {trajectory.prompt_ids.tobytes(): len(trajectory.prompt_ids) for trajectory, _ in weighted}
    return sum(prompts.values()) + sum(_rows(trajectory) for trajectory, _ in weighted)


def _require_trainable(trajectory: Trajectory) -> None:
    name = f"prompt {trajectory.prompt_index}, sample {trajectory.sample_index}"
    if len(trajectory.prompt_ids) == 0:
        raise InputError(f"{name}: the prompt is empty; nothing predicts the first step")
    if trajectory.cot_length == 0 and len(trajectory.answer_ids) == 0:
        raise InputError(f"{name}: neither a CoT nor an answer was generated; nothing to learn from")
    if trajectory.mode is Mode.hard and trajectory.tau <= 0:
        raise InputError(f"{name}: greedy hard tokens (tau {trajectory.tau}) have no log-probability to learn; train with tau > 0")
    if trajectory.mode is not Mode.hard and not (trajectory.sigma > 0 and trajectory.tau > 0):
        raise InputError(
            f"{name}: {trajectory.mode} steps with tau {trajectory.tau}, sigma {trajectory.sigma} have no density to learn; "
            "train with tau > 0 and gamma > 0"
        )


def _rows(trajectory: Trajectory) -> int:
    """Rows of a sample after its prompt: all generated tokens but the last answer token."""
    return trajectory.generated - min(1, len(trajectory.answer_ids))


def _deal(trajectories: Sequence[Trajectory], limit: int, ranks: int) -> list[list[int]]:
    """Indices of the trajectories of each micro-batch: of a few plans, the one that is done first.

    The samples of a prompt stay together, or are cut into 2, 4, 8, ... pieces: a cut costs the prompt's rows once more, but fits
    micro-batches better and lets every rank have a share. Ranks run in step: a round of micro-batches takes as long as its largest.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for i in sorted(range(len(trajectories)), key=lambda i: -_rows(trajectories[i])):
        by_prompt.setdefault(trajectories[i].prompt_ids.tobytes(), []).append(i)
    most = max(len(members) for members in by_prompt.values())
    plans = []
    for parts in [2**k for k in range((most - 1).bit_length() + 1)]:
        pieces = [members[part::parts] for members in by_prompt.values() for part in range(min(parts, len(members)))]
        if plan := _spread(pieces, trajectories, limit, ranks):
            plans.append(plan)
    best = min(plans, key=lambda plan: sum(sorted((rows for rows, _ in plan), reverse=True)[::ranks]))
    return [sorted(members) for _, members in best]


def _spread(
    pieces: list[list[int]], trajectories: Sequence[Trajectory], limit: int, ranks: int
) -> list[tuple[int, list[int]]] | None:
    """(rows, indices) of each micro-batch: the longest piece first, each to where the load is then smallest.

    As few as hold them, in multiples of `ranks`. None when a piece of several samples does not fit any.
    """
    own = [sum(_rows(trajectories[i]) for i in piece) for piece in pieces]
    prompts = [trajectories[piece[0]].prompt_ids for piece in pieces]
    if any(len(piece) > 1 and len(prompt) + rows > limit for piece, prompt, rows in zip(pieces, prompts, own, strict=True)):
        return None
    least = sum({prompt.tobytes(): len(prompt) for prompt in prompts}.values()) + sum(own)
    count = -(-max(1, -(-least // limit)) // ranks) * ranks
    while True:
        members: list[list[int]] = [[] for _ in range(count)]
        load = [0] * count
        present: list[set[bytes]] = [set() for _ in range(count)]
        for p in sorted(range(len(pieces)), key=lambda p: -own[p]):
            key = prompts[p].tobytes()
            cost = [load[b] + own[p] + (0 if key in present[b] else len(prompts[p])) for b in range(count)]
            best = int(np.argmin(cost))
            members[best] += pieces[p]
            present[best].add(key)
            load[best] = cost[best]
        if count >= len(pieces) or all(rows <= limit or len(inside) == 1 for rows, inside in zip(load, members, strict=True)):
            return [(rows, inside) for rows, inside in zip(load, members, strict=True) if inside]
        count += ranks


def _build(members: Sequence[Weighted]) -> PackedBatch:
    by_prompt: dict[bytes, list[int]] = {}
    for i, (trajectory, _) in enumerate(members):
        by_prompt.setdefault(trajectory.prompt_ids.tobytes(), []).append(i)
    rows: list[dict[str, NDArray[Any]]] = []
    prompts: list[range] = []  # their rows
    samples: list[tuple[range, int]] = []  # their rows and the prompt they follow
    soft: list[dict[str, NDArray[Any]]] = []
    hard: list[dict[str, NDArray[Any]]] = []
    answer: list[dict[str, NDArray[Any]]] = []
    end = 0  # rows so far
    for index, inside in enumerate(by_prompt.values()):
        prompt = members[inside[0]][0].prompt_ids
        prompt_last = end + len(prompt) - 1
        rows.append(_row_columns(prompt, first_position=0))
        prompts.append(range(end, end + len(prompt)))
        end += len(prompt)
        for i in inside:
            trajectory, weight = members[i]
            generated = np.concatenate([trajectory.shadow_ids, trajectory.prefill_ids, trajectory.answer_ids])
            rows.append(_row_columns(generated[: _rows(trajectory)], first_position=len(prompt)))
            samples.append((range(end, end + _rows(trajectory)), index))
            (hard if trajectory.mode is Mode.hard else soft).append(_cot_columns(trajectory, weight, i, prompt_last, end))
            answer.append(_answer_columns(trajectory, weight, i, prompt_last, end))
            end += _rows(trajectory)
    return PackedBatch(
        **_joined(rows, _ROW_DTYPES),
        segments=segments(prompts, samples),
        soft=_soft_steps(soft, [members[i][0] for inside in by_prompt.values() for i in inside]),
        hard=TokenSteps(**_joined(hard, _TOKEN_DTYPES)),
        answer=TokenSteps(**_joined(answer, _TOKEN_DTYPES)),
        prompt_index=tuple(trajectory.prompt_index for trajectory, _ in members),
        sample_index=tuple(trajectory.sample_index for trajectory, _ in members),
        generated=sum(trajectory.generated for trajectory, _ in members),
    )


_ROW_DTYPES: dict[str, type] = dict.fromkeys(("input_ids", "position"), np.int64)
_STEP_DTYPES: dict[str, type] = {"hidden_row": np.int64, "tau": np.float32, "weight": np.float32, "sample": np.int64}
_TOKEN_DTYPES: dict[str, type] = _STEP_DTYPES | {"target": np.int64, "engine_logprob": np.float32}
_SOFT_DTYPES: dict[str, type] = _STEP_DTYPES | {
    "input_row": np.int64,
    "position": np.int64,
    "seed": np.int64,
    "sigma": np.float32,
}


def _row_columns(ids: NDArray[np.int32], first_position: int) -> dict[str, NDArray[Any]]:
    return {"input_ids": ids, "position": np.arange(first_position, first_position + len(ids))}


def _step_columns(n: int, tau: float, weight: float, sample: int, hidden_row: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    return {"hidden_row": hidden_row, "tau": np.full(n, tau), "weight": np.full(n, weight), "sample": np.full(n, sample)}


def _predicting_rows(generated_index: NDArray[np.int64], prompt_last: int, first: int) -> NDArray[np.int64]:
    """The row that predicts generated token j of a sample whose rows begin at `first`: the one before, or the prompt's last."""
    return np.where(generated_index == 0, prompt_last, first + generated_index - 1)


def _cot_columns(trajectory: Trajectory, weight: float, sample: int, prompt_last: int, first: int) -> dict[str, NDArray[Any]]:
    steps = np.arange(trajectory.cot_length)
    n = len(steps)
    common = _step_columns(n, trajectory.tau, weight, sample, _predicting_rows(steps, prompt_last, first))
    if trajectory.mode is Mode.hard:
        return common | {"target": trajectory.shadow_ids, "engine_logprob": np.full(n, np.nan)}
    return common | {
        "input_row": first + steps,
        "position": len(trajectory.prompt_ids) + steps,
        "seed": np.full(n, trajectory.noise_seed),
        "sigma": np.full(n, trajectory.sigma),
    }


def _answer_columns(trajectory: Trajectory, weight: float, sample: int, prompt_last: int, first: int) -> dict[str, NDArray[Any]]:
    n = len(trajectory.answer_ids)
    index = trajectory.cot_length + len(trajectory.prefill_ids) + np.arange(n)
    return _step_columns(n, 1.0, weight, sample, _predicting_rows(index, prompt_last, first)) | {
        "target": trajectory.answer_ids,
        "engine_logprob": trajectory.answer_logprobs,
    }


def _soft_steps(columns: Sequence[dict[str, NDArray[Any]]], in_row_order: Sequence[Trajectory]) -> SoftSteps:
    soft = [trajectory for trajectory in in_row_order if trajectory.mode is not Mode.hard]
    counts = [np.diff(trajectory.support_offsets) for trajectory in soft]
    offsets = np.concatenate([[0], *counts]).cumsum()
    full = [trajectory.soft_embeddings for trajectory in soft if trajectory.soft_embeddings is not None]
    recorded = torch.from_numpy(np.concatenate(full)) if soft and len(full) == len(soft) else None
    return SoftSteps(
        **_joined(columns, _SOFT_DTYPES),
        support_ids=_tensor([trajectory.support_ids for trajectory in soft], np.int32),
        support_probs=_tensor([trajectory.support_probs for trajectory in soft], np.float32),
        support_offsets=_tensor([offsets], np.int64),
        recorded=recorded,
    )


def _joined(columns: Sequence[dict[str, NDArray[Any]]], dtypes: dict[str, type]) -> dict[str, Any]:
    return {name: _tensor([column[name] for column in columns], dtype) for name, dtype in dtypes.items()}


def _tensor(parts: Sequence[NDArray[Any]], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.empty(0, dtype), *parts]).astype(dtype))


def _zero_weight(batch: PackedBatch) -> PackedBatch:
    steps = {}
    for name in ("soft", "hard", "answer"):
        part = getattr(batch, name)
        steps[name] = replace(part, weight=torch.zeros_like(part.weight))
    return replace(batch, **steps, filler=True)


T = TypeVar("T")


def _to(part: T, device: torch.device) -> T:
    """A tensor, or a dataclass with every tensor in it, on `device`."""
    if isinstance(part, Tensor):
        return cast(T, part.to(device, non_blocking=True))
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: _to(getattr(part, f.name), device) for f in fields(part)})
    return part

"""How large a micro-batch fits: `learner.micro_batch_tokens: null` has it measured once, before the first step.

    forward and backward of 1024 rows, then of 2048   --> bytes at most alive --> a line: fixed + rows x bytes a row
    the same of short samples after one long prompt   --> bytes of a prompt's row for every sample that sees it, added to the line
    memory that is left now, nine tenths of it        --> rows at which the line meets it, the fewest of all ranks, at most 16384

Two things in a step grow (learner/attention.py): the rows, and the prompts' keys and values, which are gathered for each sample
anew. A plan is for the most of them that the config allows a row: whole groups of full length after the longest prompt that
`engine.max_model_len` leaves room for. Where prompts are known to be shorter, a smaller one lets more rows in. Samples that stop
early see more keys a row; the tenth that is left is theirs.

What is measured goes into every checkpoint: a run that resumes cuts its batches as it did, whatever is free by then.

Only on GPUs: a CPU's memory is the engine's as well, and measuring itself would keep it. SmolLM2's 2048 rows take 6 GB, which the
process does not give back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from configs.errors import RunError
from configs.schema import Config, Mode
from learner.batch import Weighted, packed_rows
from rollout.trajectory import STOP_ANSWER_LENGTH, Trajectory

FEW, MANY = 1024, 2048  # rows measured; the chunk of logits is as large as it gets from 1024 on (kernels.token_logprob)
MOST = 16384  # larger ones are no faster, and a group waits until it fills one
SHARE = 0.9  # of what is left; the allocator loses some between tensors
PROMPT, SUPPORT = 64, 64  # tokens of a measured sample's prompt, and of a step's support: 43 on average
SHARED_PROMPT, SHORT_COT, SHORT_ANSWER = 256, 12, 5  # tokens of a prompt that many see, and of those samples


def measured_micro_batch(config: Config, device: torch.device, run: Callable[[list[Weighted]], object]) -> int:
    """`learner.micro_batch_tokens` for this model, these lengths and these devices; collective, the same number on every rank.

    `run` does forward and backward of samples in one micro-batch. Raises RunError when not even one sample fits.
    """
    free = free_bytes(device) * SHARE
    before = allocated_bytes(device)

    def measure(samples: list[Weighted]) -> Measured:
        return Measured(packed_rows(samples), seen_again(samples), peak_bytes(device, partial(run, samples)) - before)

    few, many, shared = measure(probe(config, FEW)), measure(probe(config, MANY)), measure(shared_probe(config, FEW))
    mine = rows_that_fit(*at_worst(few, many, shared, worst_seen_again(config)), free)
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sample = config.policy.max_cot_tokens + config.policy.max_answer_tokens + PROMPT
    if min(everyone) < sample:
        raise RunError(
            f"learner: {free / 2**30:.1f} GiB are left for activations, room for {min(everyone)} tokens, and a sample has "
            f"{sample}; set learner.activation_checkpointing=true, or more learner.ranks"
        )
    return min(everyone)


class Measured(NamedTuple):
    """A micro-batch that was run."""

    rows: int
    seen_again: int  # rows of prompts, once for every sample that sees them
    peak: int  # bytes


def seen_again(samples: Sequence[Weighted]) -> int:
    """Rows of prompts, once for every sample that sees them."""
    return sum(len(trajectory.prompt_ids) for trajectory, _ in samples)


def worst_seen_again(config: Config) -> float:
    """The most that `seen_again` can be for a row of whole groups of full length."""
    own = config.policy.max_cot_tokens + config.policy.max_answer_tokens - 1
    prompt = max(1, config.engine.max_model_len - own - 1)
    return config.rollout.samples_per_prompt * prompt / (prompt + config.rollout.samples_per_prompt * own)


def at_worst(few: Measured, many: Measured, shared: Measured, worst: float) -> tuple[tuple[int, float], tuple[int, float]]:
    """(rows, peak bytes) of the first two, were `worst` rows of prompts seen again for each of their rows.

    What one costs is by how much the third lies above the line through them, at its rows.
    """
    along = (shared.rows - few.rows) / (many.rows - few.rows)
    above = shared.peak - (few.peak + along * (many.peak - few.peak))
    further = shared.seen_again - (few.seen_again + along * (many.seen_again - few.seen_again))
    each = max(0.0, above / further)
    first, second = ((m.rows, m.peak + each * max(0.0, worst * m.rows - m.seen_again)) for m in (few, many))
    return first, second


def rows_that_fit(few: tuple[int, float], many: tuple[int, float], free: float) -> int:
    """Rows whose peak is `free` bytes on the line through two (rows, peak bytes), at most MOST."""
    per_row = max(1.0, (many[1] - few[1]) / (many[0] - few[0]))
    return max(0, min(MOST, int(few[0] + (free - few[1]) / per_row)))


def probe(config: Config, rows: int) -> list[Weighted]:
    """At least `rows` rows of the longest samples that the config allows, no two of one prompt."""
    cot, answer = config.policy.max_cot_tokens, config.policy.max_answer_tokens
    count = -(-rows // (PROMPT + cot + answer - 1))
    return [_sample(config, np.full(PROMPT, index, np.int32), index, cot, answer) for index in range(count)]


def shared_probe(config: Config, rows: int) -> list[Weighted]:
    """At least `rows` rows of short samples after one long prompt, all of one length: nothing is padded."""
    cot, answer = min(SHORT_COT, config.policy.max_cot_tokens), min(SHORT_ANSWER, config.policy.max_answer_tokens)
    count = -(-(rows - SHARED_PROMPT) // max(1, cot + answer - 1))
    return [_sample(config, np.zeros(SHARED_PROMPT, np.int32), index, cot, answer) for index in range(count)]


def _sample(config: Config, prompt: NDArray[np.int32], index: int, cot: int, answer: int) -> Weighted:
    soft = config.policy.mode is not Mode.hard
    support = min(SUPPORT, config.policy.max_cot_tokens)
    return (
        Trajectory(
            prompt_ids=prompt,
            prompt_index=index,
            sample_index=0,
            mode=config.policy.mode,
            tau=config.policy.tau or 1.0,
            sigma=1.0 if soft else 0.0,
            noise_seed=index,
            shadow_ids=np.zeros(cot, np.int32),
            support_ids=np.tile(np.arange(support, dtype=np.int32), cot if soft else 0),
            support_probs=np.full(support * cot if soft else 0, 1.0 / support, np.float32),
            support_offsets=support * np.arange(cot + 1) * soft,
            dropped_mass=np.zeros(cot, np.float32),
            soft_embeddings=None,
            prefill_ids=np.empty(0, np.int32),
            answer_ids=np.zeros(answer, np.int32),
            answer_logprobs=np.zeros(answer, np.float32),
            stop_reason=STOP_ANSWER_LENGTH,
            phrase_found=False,
            weight_versions=np.array([0]),
            weight_version_starts=np.array([0]),
        ),
        1.0,
    )


def free_bytes(device: torch.device) -> int:
    """What this process could still take of its GPU."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def allocated_bytes(device: torch.device) -> int:
    """Bytes of the GPU's tensors, or of this process's resident memory, its libraries included."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device, work: Callable[[], object]) -> int:
    """The most that `allocated_bytes` is while `work` runs. Raises RunError on a CPU that has no Linux /proc."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from the present
        work()
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError as error:
        raise RunError(f"cannot read peak memory ({error}); this needs Linux") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))

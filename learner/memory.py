"""How large a micro-batch fits: `learner.micro_batch_tokens: null` has it measured once, before the first step.

    forward and backward of 1024 rows, then of 2048 --> bytes at most alive --> a line: fixed + rows x bytes a row
    memory that is left now, nine tenths of it      --> the rows at which the line meets it, the fewest of all ranks, at most 16384

Rows cost alike because nothing in a step grows faster than their number (learner/attention.py). What is measured goes into every
checkpoint: a run that resumes cuts its batches as it did, whatever is free by then.

Only on GPUs: a CPU's memory is the engine's as well, and measuring itself would keep it. SmolLM2's 2048 rows take 6 GB, which the
process does not give back.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist

from configs.errors import RunError
from configs.schema import Config, Mode
from learner.batch import Weighted
from rollout.trajectory import STOP_ANSWER_LENGTH, Trajectory

FEW, MANY = 1024, 2048  # rows measured; the chunk of logits is as large as it gets from 1024 on (kernels.token_logprob)
MOST = 16384  # larger ones are no faster, and a group waits until it fills one
SHARE = 0.9  # of what is left; the allocator loses some between tensors
PROMPT, SUPPORT = 64, 64  # tokens of a measured sample's prompt, and of a step's support: 43 on average


def measured_micro_batch(config: Config, device: torch.device, run: Callable[[list[Weighted]], object]) -> int:
    """`learner.micro_batch_tokens` for this model, these lengths and these devices; collective, the same number on every rank.

    `run` does forward and backward of samples in one micro-batch. Raises RunError when not even one sample fits.
    """
    free = free_bytes(device) * SHARE
    before = allocated_bytes(device)
    found = []
    for rows in (FEW, MANY):
        samples = probe(config, rows)
        count = sum(len(t.prompt_ids) + t.generated - 1 for t, _ in samples)
        found.append((count, peak_bytes(device, partial(run, samples)) - before))
    mine = rows_that_fit(found[0], found[1], free)
    everyone: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    sample = config.policy.max_cot_tokens + config.policy.max_answer_tokens + PROMPT
    if min(everyone) < sample:
        raise RunError(
            f"learner: {free / 2**30:.1f} GiB are left for activations, room for {min(everyone)} tokens, and a sample has "
            f"{sample}; set learner.activation_checkpointing=true, or more learner.ranks"
        )
    return min(everyone)


def rows_that_fit(few: tuple[int, int], many: tuple[int, int], free: float) -> int:
    """Rows whose peak is `free` bytes on the line through two (rows, peak bytes), at most MOST."""
    per_row = max(1.0, (many[1] - few[1]) / (many[0] - few[0]))
    return max(0, min(MOST, int(few[0] + (free - few[1]) / per_row)))


def probe(config: Config, rows: int) -> list[Weighted]:
    """At least `rows` rows of the longest samples that the config allows, no two of one prompt."""
    cot, answer = config.policy.max_cot_tokens, config.policy.max_answer_tokens
    soft = config.policy.mode is not Mode.hard
    support = min(SUPPORT, cot)
    count = -(-rows // (PROMPT + cot + answer - 1))
    return [
        (
            Trajectory(
                prompt_ids=np.full(PROMPT, index, np.int32),
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
        for index in range(count)
    ]


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

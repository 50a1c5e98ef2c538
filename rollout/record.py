"""What the engine remembers of the requests it is decoding: enough to replay every soft input bit for bit.

One arena per quantity, indexed by slot. Support entries are appended to a slot's row of a ragged arena; a whole batch is appended
in one vectorised write. Nothing is dropped until the request is finished, so a preempted request can be prefilled from it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.soft_embedding import SupportBatch

FIRST_CAPACITY = 4096  # support entries per slot; about 90 soft steps at the mean of 43 entries, doubled when a slot needs more


@dataclass(frozen=True, slots=True)
class SlotSupport:
    """The recorded mixtures of consecutive steps of one slot: CSR over c steps, N entries."""

    ids: NDArray[np.int32]  # [N]
    probs: NDArray[np.float32]  # [N]
    offsets: NDArray[np.int64]  # [c+1], starting at 0


class SupportArena:
    """Host memory for the supports of `slots` requests of at most `max_steps` soft steps each."""

    def __init__(self, slots: int, max_steps: int) -> None:
        self.ids = np.zeros((slots, FIRST_CAPACITY), dtype=np.int32)
        self.probs = np.zeros((slots, FIRST_CAPACITY), dtype=np.float32)
        self.ends = np.zeros((slots, max_steps + 1), dtype=np.int64)  # ends[s, t]: entries of slot s before step t
        self.dropped = np.zeros((slots, max_steps), dtype=np.float32)

    def append(self, slots: NDArray[np.int64], steps: NDArray[np.int64], support: SupportBatch) -> None:
        """Write step `steps[i]` of slot `slots[i]` for every row i of the batch."""
        offsets = support.offsets.cpu().numpy()
        counts = np.diff(offsets)
        begin = self.ends[slots, steps]
        end = begin + counts
        self._grow(int(end.max(initial=0)))
        row = np.repeat(slots, counts)
        column = np.arange(len(row)) + np.repeat(begin - offsets[:-1], counts)
        self.ids[row, column] = support.ids.cpu().numpy()
        self.probs[row, column] = support.probs.cpu().numpy()
        self.ends[slots, steps + 1] = end
        self.dropped[slots, steps] = support.dropped_mass.cpu().numpy()

    def steps(self, slot: int, first: int, last: int) -> SlotSupport:
        """The mixtures of steps first .. last-1 of a slot, as copies."""
        ends = self.ends[slot, first : last + 1]
        span = slice(int(ends[0]), int(ends[-1]))
        return SlotSupport(self.ids[slot, span].copy(), self.probs[slot, span].copy(), ends - ends[0])

    def _grow(self, needed: int) -> None:
        capacity = self.ids.shape[1]
        if needed > capacity:
            wider = (len(self.ids), max(needed, 2 * capacity))
            old_ids, old_probs = self.ids, self.probs
            # Pages of zeros take no memory before they are written: one long record does not cost every slot as much.
            self.ids, self.probs = np.zeros(wider, dtype=np.int32), np.zeros(wider, dtype=np.float32)
            for slot, held in enumerate(self.ends.max(axis=1)):
                self.ids[slot, :held], self.probs[slot, :held] = old_ids[slot, :held], old_probs[slot, :held]


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """A finished request as the worker hands it out; the engine actor adds the prompt and makes it a Trajectory."""

    shadow_ids: NDArray[np.int32]  # [C]
    support: SlotSupport
    dropped_mass: NDArray[np.float32]  # [C]
    soft_embeddings: NDArray[np.uint8] | None  # [C, n0 * itemsize]
    answer_ids: NDArray[np.int32]  # [A]
    answer_logprobs: NDArray[np.float32]  # [A]
    stop_code: int
    prefill_kind: int


def tensor_bytes(rows: Tensor) -> NDArray[np.uint8]:
    """A [C, n0] tensor of any dtype as its raw bytes [C, n0 * itemsize]."""
    return rows.contiguous().view(torch.uint8).cpu().numpy().copy()

"""What both adapters keep of vLLM's requests, and what they do with the rows of a step.

    admit --> overlay, advance, overlay, advance, ... --> remove
                                                 take, before or after remove

A request has its slot and its record from its first step until vLLM says that it is finished, however often it is preempted. What
is asked in every step is kept on the host, in arrays indexed by slot, so that a step waits for no answer from the device.

A request without a record id is read as text (rollout/serving.py): its record is dropped when it ends, and it ends one position
later, because the decoder has the stop id stand in for the last answer token.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.plugin import EXTRA_ARG
from rollout.record import SlotRecord
from rollout.soft_decoding import BAD_LOGITS, DONE, SoftDecoder
from rollout.vocab_rows import rms_over_ranks
from rollout.wire import slot_request

logger = logging.getLogger("vllm.softrl")

NO_SLOT = -1


@dataclass(frozen=True, slots=True)
class StepRows:
    """The requests of one step in the runner's order; arrays of length R on the host."""

    slot: NDArray[np.int64]  # NO_SLOT for a request that is not softrl's
    computed: NDArray[np.int64]  # tokens of the request before those of this step
    scheduled: NDArray[np.int64]  # its tokens of this step
    begin: NDArray[np.int64]  # where these begin in inputs_embeds
    sampled: NDArray[np.bool_]  # false for a part of a prefill, whose logits nobody uses


class SoftRequests:
    """The softrl requests of one worker and their decoder."""

    def __init__(self, decoder: SoftDecoder) -> None:
        self.decoder = decoder
        self.rms_embedding = rms_over_ranks(decoder.embedding, decoder.vocab_size)  # of the first weights, as in training
        self.slots: dict[str, int] = {}  # vLLM request id -> slot
        self.record_ids: dict[str, str] = {}  # vLLM request id -> our record id, until the record is taken
        self.finished: dict[str, SlotRecord] = {}  # record id -> record, of requests that left before they were taken
        self.prompt_length = np.zeros(len(decoder.phase), dtype=np.int64)  # by slot
        self.decoded = np.zeros(len(decoder.phase), dtype=np.int64)  # by slot: positions decoded, as decoder.emitted_length
        self.as_text = np.zeros(len(decoder.phase), dtype=np.bool_)  # by slot

    # ------------------------------------------------------------------ life of a request

    def admit(self, req_id: str, sampling_params: Any, prompt_length: int) -> int:
        """The slot of a request: its own when it comes back, else a new one; NO_SLOT without softrl's options."""
        if req_id in self.slots:
            return self.slots[req_id]
        options = (sampling_params.extra_args or {}).get(EXTRA_ARG) if sampling_params else None
        if options is None:
            return NO_SLOT
        slot = self.decoder.admit(slot_request(options, prompt_length, self.rms_embedding))
        self.slots[req_id] = slot
        self.as_text[slot] = "record_id" not in options
        if not self.as_text[slot]:
            self.record_ids[req_id] = options["record_id"]
        self.prompt_length[slot], self.decoded[slot] = prompt_length, 0
        return slot

    def remove(self, req_id: str) -> None:
        """A request left the engine: keep its record if it is finished, forget it if it was aborted."""
        slot = self.slots.pop(req_id, None)
        if slot is None:
            return
        record_id = self.record_ids.pop(req_id, None)
        if record_id is not None and int(self.decoder.phase[slot]) == DONE:
            self.finished[record_id] = self.decoder.record(slot)
        if self.as_text[slot] and int(self.decoder.stop_code[slot]) == BAD_LOGITS:  # its client sees a text that breaks off
            thought, answered = int(self.decoder.cot_length[slot]), int(self.decoder.answer_length[slot])
            logger.error("softrl: %s ended at CoT step %d, answer token %d: logits are not finite", req_id, thought, answered)
        self.decoder.release(slot)

    def take(self, record_ids: list[str]) -> dict[str, SlotRecord]:
        """The records of finished requests, each handed out once; ids that are not finished are left out."""
        taken = {r: self.finished.pop(r) for r in record_ids if r in self.finished}
        wanted = set(record_ids) - taken.keys()
        for req_id, record_id in list(self.record_ids.items()):
            slot = self.slots[req_id]
            if record_id in wanted and int(self.decoder.phase[slot]) == DONE:
                taken[record_id] = self.decoder.record(slot)
                del self.record_ids[req_id]
        return taken

    # ------------------------------------------------------------------ one step

    def overlay(self, rows: StepRows, inputs_embeds: Tensor) -> None:
        """Write the soft inputs over the embeddings [T, n0] of the ids that stand in for them.

        A row that decodes its newest position takes the embedding of the last step. Any other (a part of a prefill after
        preemption) is replayed from the record, whatever part of the CoT it covers.
        """
        soft = np.flatnonzero(rows.slot != NO_SLOT)
        slot, scheduled, begin = rows.slot[soft], rows.scheduled[soft], rows.begin[soft]
        first = rows.computed[soft] - self.prompt_length[slot]  # in CoT steps; negative inside the prompt
        newest = (scheduled == 1) & (first >= np.maximum(self.decoded[slot] - 1, 0))
        if newest.any():
            slots, at = self._to_device(slot[newest], begin[newest])
            overlaid = self.decoder.overlaid[slots][:, None]
            inputs_embeds[at] = torch.where(overlaid, self.decoder.next_input[slots], inputs_embeds[at])
        for row in np.flatnonzero(~newest & (first + scheduled > 0)):
            one, cot_length = int(slot[row]), int(self.decoder.cot_length[slot[row]])
            start, end = max(0, int(first[row])), min(int(first[row] + scheduled[row]), cot_length)
            if start < end:
                steps, embeddings = self.decoder.replay(one, start, end)
                (at,) = self._to_device(begin[row] - first[row] + steps)
                inputs_embeds[at] = embeddings

    def advance(self, rows: StepRows, logits: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Decode one position of each softrl row that is sampled: their indices and the ids for the scheduler, int64 [S] each.

        logits [R, V' or V] and hidden [R, d] of all rows. See SoftDecoder.advance.
        """
        chosen = np.flatnonzero((rows.slot != NO_SLOT) & rows.sampled)
        slot = rows.slot[chosen]
        output_index = rows.computed[chosen] + rows.scheduled[chosen] - self.prompt_length[slot]
        self.decoded[slot] = np.maximum(self.decoded[slot], output_index + 1)
        index, slots, known, as_text = self._to_device(chosen, slot, output_index, self.as_text[slot])
        if not len(chosen):
            return index, index
        if len(chosen) < len(logits):  # vLLM's own sampler may then alter the others where they are
            logits, hidden = logits[index], hidden[index]
        emitted = self.decoder.advance(slots, known, logits, hidden)
        if self.as_text[slot].any():
            emitted = torch.where(as_text.bool(), self._with_last_token(slots, known, emitted), emitted)
        return index, emitted

    def _with_last_token(self, slots: Tensor, output_index: Tensor, emitted: Tensor) -> Tensor:
        """The emitted ids [S] with the last answer token where the stop id stands in for it; the next position is the stop id."""
        decoder = self.decoder
        answer_length = decoder.answer_length[slots]
        last = decoder.cot_length[slots] + decoder.prefill_length[decoder.prefill_kind[slots]] + answer_length - 1
        answered = (decoder.phase[slots] == DONE) & (decoder.stop_code[slots] != BAD_LOGITS)
        token = decoder.answer_ids[slots, (answer_length - 1).clamp_min(0)].long()
        return torch.where(answered & (output_index == last), token, emitted)

    def _to_device(self, *numbers: NDArray[Any]) -> Tensor:
        """Arrays [N] as one tensor int64 [len(numbers), N], without a wait: from pinned memory, where there is such a thing."""
        device, host = self.decoder.device, torch.from_numpy(np.stack(numbers))
        return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def mix_in(target: Any, mixin: type) -> None:
    """Give a live object the methods of `mixin`, whose `super()` calls are then those of the object's own class."""
    target.__class__ = type(f"Soft{type(target).__name__}", (mixin, type(target)), {})

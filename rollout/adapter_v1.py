"""Soft decoding inside vLLM's V1 model runner (vllm/v1/worker/gpu_model_runner.py, and the CPU runner derived from it).

Three seams, no copied code. `_preprocess` has just filled `inputs_embeds` with one embedding per scheduled token: the soft rows
are written over it. `sample_tokens` knows the hidden states that made the logits. `_sample` is handed the logits [requests, V]:
rows of softrl requests go through the state machine, all others through vLLM's own sampler.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import SamplerOutput

from rollout.plugin import EXTRA_ARG
from rollout.record import SlotRecord
from rollout.soft_decoding import DONE, SoftDecoder
from rollout.wire import slot_request

NO_SLOT = -1


class SoftModelRunner:
    """Mixed in before a V1 runner class by `attach`; every `super()` call below is vLLM's own method."""

    softrl_decoder: SoftDecoder
    softrl_slots: dict[str, int]  # vLLM request id -> slot, from admission until the request leaves the engine
    softrl_record_ids: dict[str, str]  # vLLM request id -> our record id, until the record is taken
    softrl_finished: dict[str, SlotRecord]  # record id -> record, of requests that left before they were taken
    softrl_rows: list[str]  # the request ids that softrl_slot_of_row was made for
    softrl_slot_of_row: NDArray[np.int64]
    softrl_hidden: Tensor | None

    # vLLM's own attributes, declared for the type checker.
    input_batch: Any
    requests: dict[str, Any]
    query_start_loc: Any
    discard_request_mask: Any
    execute_model_state: Any

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        inputs = super()._preprocess(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self._softrl_admit()
        if self.softrl_slots:
            self._softrl_overlay(inputs[1])
        return inputs

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Keep the hidden states of the rows that are sampled, [requests, d]; vLLM forgets them before it calls `_sample`."""
        state = self.execute_model_state
        self.softrl_hidden = None if state is None else state.sample_hidden_states
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def _sample(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        slot_of_row = self.softrl_slot_of_row
        ready = ~self.discard_request_mask.np[: len(slot_of_row)].astype(bool)  # chunks of a longer prefill sample nothing
        rows_np = np.flatnonzero((slot_of_row != NO_SLOT) & ready)
        if len(rows_np):
            assert self.softrl_hidden is not None
            rows = torch.from_numpy(rows_np).to(logits.device)
            slots = torch.from_numpy(slot_of_row[rows_np]).to(logits.device)
            whole = len(rows_np) == logits.shape[0]
            of_rows = (logits, self.softrl_hidden) if whole else (logits[rows], self.softrl_hidden[rows])
            emitted = self.softrl_decoder.advance(slots, *of_rows).to(torch.int32)
            if whole:
                return SamplerOutput(sampled_token_ids=emitted[:, None], logprobs_tensors=None)
        output = super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        if len(rows_np):
            output.sampled_token_ids[rows, 0] = emitted
        return output

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        """A request left the engine: keep its record if it is finished, forget it if it was aborted."""
        super()._on_request_state_removed(req_id, req_state)  # type: ignore[misc]
        slot = self.softrl_slots.pop(req_id, None)
        if slot is None:
            return
        record_id = self.softrl_record_ids.pop(req_id, None)
        if record_id is not None and int(self.softrl_decoder.phase[slot]) == DONE:
            self.softrl_finished[record_id] = self.softrl_decoder.record(slot)
        self.softrl_decoder.release(slot)

    # ------------------------------------------------------------------ ours

    def softrl_take(self, record_ids: list[str]) -> dict[str, SlotRecord]:
        """The records of finished requests, each handed out once; ids that are not finished are left out."""
        taken = {r: self.softrl_finished.pop(r) for r in record_ids if r in self.softrl_finished}
        wanted = set(record_ids) - taken.keys()
        for req_id, record_id in list(self.softrl_record_ids.items()):
            slot = self.softrl_slots[req_id]
            if record_id in wanted and int(self.softrl_decoder.phase[slot]) == DONE:
                taken[record_id] = self.softrl_decoder.record(slot)
                del self.softrl_record_ids[req_id]
        return taken

    def _softrl_admit(self) -> None:
        """Give new softrl requests a slot, and refresh the slot of every row when the batch changed."""
        rows = self.input_batch.req_ids
        if rows == self.softrl_rows:
            return
        for req_id in rows:
            if req_id in self.softrl_slots:
                continue
            request = self.requests[req_id]
            options = (request.sampling_params.extra_args or {}).get(EXTRA_ARG) if request.sampling_params else None
            if options is not None:
                self.softrl_slots[req_id] = self.softrl_decoder.admit(slot_request(options, request.num_prompt_tokens))
                self.softrl_record_ids[req_id] = options["record_id"]
        self.softrl_rows = list(rows)
        self.softrl_slot_of_row = np.array([self.softrl_slots.get(r, NO_SLOT) for r in rows], dtype=np.int64)

    def _softrl_overlay(self, inputs_embeds: Tensor) -> None:
        """Write the soft inputs over the embeddings of the ids that stand in for them.

        A row that decodes its newest position takes the embedding of the last step. A row that scheduled more than that (a
        prefill chunk after preemption) is replayed from the record, whatever part of the CoT the chunk covers.
        """
        slot_of_row, count = self.softrl_slot_of_row, len(self.softrl_slot_of_row)
        start = self.query_start_loc.np[: count + 1]
        decoder = self.softrl_decoder
        prompt_length = decoder.prompt_length.cpu().numpy()[slot_of_row]
        first = self.input_batch.num_computed_tokens_cpu[:count] - prompt_length  # in CoT steps; negative inside the prompt
        scheduled = np.diff(start)
        newest = (scheduled == 1) & ~self.discard_request_mask.np[:count].astype(bool)
        soft = slot_of_row != NO_SLOT
        rows = np.flatnonzero(soft & newest & (first >= 0))
        if len(rows):
            slots = torch.from_numpy(slot_of_row[rows]).to(decoder.device)
            at = torch.from_numpy(start[rows].astype(np.int64)).to(decoder.device)
            overlaid = decoder.overlaid[slots][:, None]
            inputs_embeds[at] = torch.where(overlaid, decoder.next_input[slots], inputs_embeds[at])
        for row in np.flatnonzero(soft & ~newest & (first + scheduled > 0)):
            slot = int(slot_of_row[row])
            begin, end = max(0, int(first[row])), min(int(first[row] + scheduled[row]), int(decoder.cot_length[slot]))
            if begin < end:
                steps, embeddings = decoder.replay(slot, begin, end)
                at = torch.from_numpy(start[row] - first[row] + steps).to(decoder.device)
                inputs_embeds[at] = embeddings


def attach(runner: Any, decoder: SoftDecoder) -> None:
    """Turn a live V1 runner into a soft-decoding one, whatever platform class it is."""
    runner.softrl_decoder = decoder
    runner.softrl_slots, runner.softrl_record_ids, runner.softrl_finished = {}, {}, {}
    runner.softrl_rows, runner.softrl_slot_of_row = [], np.zeros(0, dtype=np.int64)
    runner.softrl_hidden = None
    runner.__class__ = type(f"Soft{type(runner).__name__}", (SoftModelRunner, type(runner)), {})

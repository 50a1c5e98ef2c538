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

from rollout.slots import SoftRequests, StepRows, mix_in
from rollout.soft_decoding import SoftDecoder


class SoftModelRunner:
    """Mixed in before a V1 runner class by `attach`; every `super()` call below is vLLM's own method."""

    softrl: SoftRequests
    softrl_req_ids: list[str]  # the requests that softrl_slot_of_row was made for
    softrl_slot_of_row: NDArray[np.int64]
    softrl_rows: StepRows
    softrl_hidden: Tensor | None

    # vLLM's own attributes, declared for the type checker.
    input_batch: Any
    requests: dict[str, Any]
    query_start_loc: Any
    discard_request_mask: Any
    execute_model_state: Any

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        inputs = super()._preprocess(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        self.softrl_rows = self._softrl_step_rows()
        if self.softrl.slots:
            self.softrl.overlay(self.softrl_rows, inputs[1])
        return inputs

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Keep the hidden states of the rows that are sampled, [requests, d]; vLLM forgets them before it calls `_sample`."""
        state = self.execute_model_state
        self.softrl_hidden = None if state is None else state.sample_hidden_states
        return super().sample_tokens(grammar_output)  # type: ignore[misc]

    def _sample(self, logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        assert self.softrl_hidden is not None
        index, emitted = self.softrl.advance(self.softrl_rows, logits, self.softrl_hidden)
        emitted = emitted.to(torch.int32)
        if len(emitted) == len(logits):
            return SamplerOutput(sampled_token_ids=emitted[:, None], logprobs_tensors=None)
        output = super()._sample(logits, spec_decode_metadata)  # type: ignore[misc]
        if len(emitted):
            output.sampled_token_ids[index, 0] = emitted
        return output

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        super()._on_request_state_removed(req_id, req_state)  # type: ignore[misc]
        self.softrl.remove(req_id)
        self.softrl_req_ids = []  # the same id may come back as another request

    def _softrl_step_rows(self) -> StepRows:
        """The rows of the step that was just prepared. New softrl requests get a slot; unchanged batches are not looked through."""
        req_ids = self.input_batch.req_ids
        if req_ids != self.softrl_req_ids:
            requests = ((req_id, self.requests[req_id]) for req_id in req_ids)
            slots = [self.softrl.admit(req_id, r.sampling_params, r.num_prompt_tokens) for req_id, r in requests]
            self.softrl_req_ids, self.softrl_slot_of_row = list(req_ids), np.array(slots, dtype=np.int64)
        count = len(req_ids)
        start = self.query_start_loc.np[: count + 1].astype(np.int64)
        return StepRows(
            slot=self.softrl_slot_of_row,
            computed=self.input_batch.num_computed_tokens_cpu[:count].astype(np.int64),
            scheduled=np.diff(start),
            begin=start[:-1],
            sampled=~self.discard_request_mask.np[:count].astype(bool),
        )


def attach(runner: Any, decoder: SoftDecoder) -> None:
    """Turn a live V1 runner into a soft-decoding one, whatever platform class it is."""
    runner.softrl = SoftRequests(decoder)
    runner.softrl_req_ids, runner.softrl_slot_of_row = [], np.zeros(0, dtype=np.int64)
    runner.softrl_hidden = None
    mix_in(runner, SoftModelRunner)

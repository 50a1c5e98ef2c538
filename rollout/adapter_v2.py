"""Soft decoding inside vLLM's V2 model runner (vllm/v1/worker/gpu/model_runner.py), the default where there is Triton.

    scheduler --> add_request, finish_requests          requests come, leave, and come back after preemption
    ids       --> prepare_inputs_embeds --> model       one embedding per token is there: the soft rows are written over it
    logits    --> sample --> Sampler                    softrl's rows go through the state machine, others through vLLM's sampler

Three live objects get one method or two each, no copied code. V2 tells its model state to forget a preempted request and to add it
anew when it comes back: what is softrl's is kept by request id until the scheduler says that the request is finished. Inputs are
written into the persistent buffer that the CUDA graphs were captured with, and no step loops over requests unless some come back.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, get_num_sampled_and_rejected
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from rollout.slots import NO_SLOT, SoftRequests, StepRows, mix_in
from rollout.soft_decoding import SoftDecoder


class SoftModelState(ModelState):
    """Mixed in before the class of the runner's model state by `attach`; every `super()` call below is vLLM's own method."""

    softrl: SoftRequests
    softrl_slot_of_index: NDArray[np.int64]  # slot by the runner's index of a request; NO_SLOT for those that are not softrl's

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        super().add_request(req_index, new_req_data)
        slot = self.softrl.admit(new_req_data.req_id, new_req_data.sampling_params, new_req_data.prompt_len)
        self.softrl_slot_of_index[req_index] = slot

    def prepare_inputs_embeds(self, encoder_inputs: Any, input_batch: InputBatch, req_states: RequestState) -> Tensor:
        inputs_embeds = super().prepare_inputs_embeds(encoder_inputs, input_batch, req_states)
        if self.softrl.slots:
            self.softrl.overlay(self.softrl_step_rows(input_batch), inputs_embeds)
        return inputs_embeds

    def softrl_step_rows(self, batch: InputBatch) -> StepRows:
        """The rows of a step. vLLM's host copies, exact without speculative decoding."""
        computed, scheduled = batch.num_computed_tokens_np.astype(np.int64), batch.num_scheduled_tokens.astype(np.int64)
        return StepRows(
            slot=self.softrl_slot_of_index[batch.idx_mapping_np],
            computed=computed,
            scheduled=scheduled,
            begin=batch.query_start_loc_np[: batch.num_reqs].astype(np.int64),
            sampled=computed + scheduled >= batch.prefill_len_np,
        )


class SoftModelRunner(GPUModelRunner):
    """Mixed in before the runner's class, which may be a platform's own."""

    softrl: SoftRequests

    def finish_requests(self, scheduler_output: SchedulerOutput) -> None:
        """vLLM removes finished and preempted requests alike; softrl's leave only when they are finished."""
        super().finish_requests(scheduler_output)
        for req_id in scheduler_output.finished_req_ids:
            self.softrl.remove(req_id)

    def sample(self, hidden_states: Tensor, input_batch: InputBatch, grammar_output: Any) -> Any:
        """The sampler is handed logits only: lend it the rows and the hidden states [requests, d] that make them."""
        rows = self.model_state.softrl_step_rows(input_batch)
        self.sampler.softrl_step = rows, hidden_states[input_batch.logits_indices]
        try:
            return super().sample(hidden_states, input_batch, grammar_output)
        finally:
            self.sampler.softrl_step = None


class SoftSampler(Sampler):
    """Mixed in before the class of the runner's sampler."""

    softrl: SoftRequests
    softrl_step: tuple[StepRows, Tensor] | None

    def __call__(self, logits: Tensor, input_batch: InputBatch) -> SamplerOutput:
        if self.softrl_step is None:  # a dummy run
            return super().__call__(logits, input_batch)
        rows, hidden = self.softrl_step
        index, emitted = self.softrl.advance(rows, logits, hidden)
        if not (rows.slot != NO_SLOT).all():
            output = super().__call__(logits, input_batch)
            output.sampled_token_ids[index, 0] = emitted
            return output
        sampled = torch.zeros(len(logits), 1, dtype=torch.int64, device=logits.device)
        sampled[index, 0] = emitted
        num_sampled, num_rejected = get_num_sampled_and_rejected(
            input_batch.seq_lens.new_ones(input_batch.num_reqs),
            input_batch.seq_lens,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            self.req_states.prefill_len.gpu,
        )
        return SamplerOutput(
            sampled_token_ids=sampled, logprobs_tensors=None, num_nans=None, num_sampled=num_sampled, num_rejected=num_rejected
        )


def attach(runner: Any, decoder: SoftDecoder) -> None:
    """Turn a live V2 runner into a soft-decoding one, whatever platform class it is."""
    requests = SoftRequests(decoder)
    for target, mixin in ((runner, SoftModelRunner), (runner.model_state, SoftModelState), (runner.sampler, SoftSampler)):
        target.softrl = requests
        mix_in(target, mixin)
    runner.model_state.softrl_slot_of_index = np.full(runner.max_num_reqs, NO_SLOT, dtype=np.int64)
    runner.sampler.softrl_step = None

"""The soft-decoding state machine: what one request feeds back into the model, for all requests of a batch at once.

          logits of the row                                        input of the next position
    COT      mixture over the support (soft, fuzzy) or a sample (hard)   p E + sigma eps, or E[x]
      |      until the shadow text ends with the phrase, or L steps
    PREFILL  forced ids: `\\boxed{`, at the limit the whole phrase first  E[id]
      |
    ANSWER   ordinary sampling until the brace closes, EOS, or the limit  E[x]
      |
    DONE     the scheduler sees the stop id

State is one tensor per quantity, indexed by slot. A step computes every quantity for every row, whatever its phase, and a mask
decides whose is written: so it never asks the device which rows these are (rollout/row_ops.py). It knows neither vLLM nor its
runners: an adapter gives rows of logits and hidden states, and asks for the embeddings to lay over its inputs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Mode
from kernels.soft_embedding import bad_rows
from rollout.record import SlotRecord, SupportArena, tensor_bytes
from rollout.row_ops import FixedOps, RaggedOps, RowOps, Rows
from rollout.token_tables import TokenTables
from rollout.vocab_rows import VocabRows

COT, PREFILL, ANSWER, DONE = range(4)
AFTER_PHRASE, AT_LIMIT = range(2)  # which forced prefill follows the CoT
RUNNING, CLOSED, EOS, LENGTH, BAD_LOGITS = range(5)  # stop codes


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotRequest:
    """What the state machine needs to know of a request; see rollout.trajectory.SampleRequest for the fields."""

    prompt_length: int
    mode: Mode
    tau: float
    sigma: float
    seed: int
    max_cot_tokens: int
    max_answer_tokens: int
    answer_temperature: float
    record_full: bool


class SoftDecoder:
    """Slots of soft, fuzzy and hard requests decoding side by side.

    embedding: [V', n0] the model's input embedding in the engine's dtype (rows past V are padding and never used).
    head: [V', d] the LM head; may be the embedding itself. With tensor parallelism this process holds a part of both; every rank
    decodes every request, and the same calls in the same order.
    prefills: the two forced id lists, AFTER_PHRASE and AT_LIMIT.
    stop_id: the id that ends a request for the scheduler.
    """

    def __init__(
        self,
        *,
        slots: int,
        max_cot_tokens: int,
        max_answer_tokens: int,
        tables: TokenTables,
        prefills: tuple[list[int], list[int]],
        stop_id: int,
        embedding: VocabRows,
        head: VocabRows,
    ) -> None:
        device = embedding.rows.device
        self.device, self.dtype = device, embedding.rows.dtype
        self.tables = tables.to(device)
        self.vocab_size = tables.is_eos.shape[0]
        self.stop_id, self.other_id = stop_id, 0 if stop_id else 1
        self.use_weights(embedding, head)
        width = max(map(len, prefills))
        self.prefill_ids = torch.tensor([p + [0] * (width - len(p)) for p in prefills], device=device)
        self.prefill_length = torch.tensor([len(p) for p in prefills], device=device)

        def per_slot(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.phase, self.step = per_slot(torch.int64), per_slot(torch.int64)  # step counts within the phase
        self.prompt_length = per_slot(torch.int64)
        self.is_hard, self.tau, self.sigma = per_slot(torch.bool), per_slot(torch.float32), per_slot(torch.float32)
        self.seed = per_slot(torch.int64)
        self.cot_limit, self.answer_limit = per_slot(torch.int64), per_slot(torch.int64)
        self.answer_temperature = per_slot(torch.float32)
        self.phrase_state, self.prefill_kind = per_slot(torch.int64), per_slot(torch.int64)
        self.brace_depth, self.stop_code = per_slot(torch.int64), per_slot(torch.int64)
        self.escaping = per_slot(torch.int64)  # 1 where the answer so far ends with an escaping backslash
        self.next_input = per_slot(self.dtype, embedding.rows.shape[1])
        self.overlaid = per_slot(torch.bool)  # the next input is `next_input`, not the embedding of the emitted id
        self.cot_length = per_slot(torch.int64)
        # One more than can be recorded: where rows write that have nothing to record.
        self.shadow_ids = per_slot(torch.int32, max_cot_tokens + 1)
        self.answer_length = per_slot(torch.int64)
        self.answer_ids = per_slot(torch.int32, max_answer_tokens + 1)
        self.answer_logprobs = per_slot(torch.float32, max_answer_tokens + 1)
        self.emitted_length = per_slot(torch.int64)
        self.emitted_ids = per_slot(torch.int64, max_cot_tokens + width + max_answer_tokens)
        self.arena = SupportArena(slots, max_cot_tokens)
        self.ops: RowOps = RaggedOps(self.arena)
        if device.type == "cuda":
            self.ops = FixedOps(self.arena, embedding, slots, self.vocab_size)
        self._full: dict[int, Tensor] = {}  # slot -> [L, n0], the inputs as they were fed, for record: full
        self._free = list(range(slots - 1, -1, -1))

    def use_weights(self, embedding: VocabRows, head: VocabRows) -> None:
        """Take the model's matrices, at the start and after each push, which may have moved them."""
        self.embedding, self.head = embedding, head
        self.stop_row = embedding.row(self.stop_id)  # the input of a true token that is shown as another

    # ------------------------------------------------------------------ slots

    def admit(self, request: SlotRequest) -> int:
        """Take a slot for a new request and return it. Raises RuntimeError when none is left."""
        if not self._free:
            raise RuntimeError(f"no free soft-decoding slot among {len(self.phase)}: raise engine.max_num_seqs")
        slot = self._free.pop()
        for name, value in {
            "phase": COT, "step": 0, "prompt_length": request.prompt_length, "is_hard": request.mode is Mode.hard,
            "tau": request.tau, "sigma": request.sigma, "seed": request.seed, "cot_limit": request.max_cot_tokens,
            "answer_limit": request.max_answer_tokens, "answer_temperature": request.answer_temperature,
            "phrase_state": 0, "prefill_kind": AT_LIMIT, "brace_depth": 1, "escaping": 0, "stop_code": RUNNING, "overlaid": False,
            "cot_length": 0, "answer_length": 0, "emitted_length": 0,
        }.items():  # fmt: skip
            getattr(self, name)[slot] = value
        self.arena.ends[slot] = 0
        self.arena.dropped[slot] = 0
        if request.record_full and request.mode is not Mode.hard:
            self._full[slot] = torch.zeros(request.max_cot_tokens, self.next_input.shape[1], dtype=self.dtype)
        return slot

    def release(self, slot: int) -> None:
        """Give back an admitted slot, once, whatever its phase. Take its `record` first: the next request overwrites it."""
        self.ops.settle()  # what is under way must not reach the next request's record
        self._full.pop(slot, None)
        self._free.append(slot)

    @property
    def free_slots(self) -> int:
        """How many more requests `admit` takes."""
        return len(self._free)

    def record(self, slot: int) -> SlotRecord:
        """A copy of everything recorded for a slot. Waits for the device."""
        self.ops.settle()
        cot, answer = int(self.cot_length[slot]), int(self.answer_length[slot])
        full = self._full.get(slot)
        return SlotRecord(
            shadow_ids=self.shadow_ids[slot, :cot].cpu().numpy().copy(),
            support=self.arena.steps(slot, 0, cot),
            dropped_mass=self.arena.dropped[slot, :cot].copy(),
            soft_embeddings=None if full is None else tensor_bytes(full[:cot]),
            answer_ids=self.answer_ids[slot, :answer].cpu().numpy().copy(),
            answer_logprobs=self.answer_logprobs[slot, :answer].cpu().numpy().copy(),
            stop_code=int(self.stop_code[slot]),
            prefill_kind=int(self.prefill_kind[slot]),
        )

    # ------------------------------------------------------------------ one step

    def advance(self, slots: Tensor, output_index: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """Advance every row's request by one position and return the ids [R] int64 the scheduler should see.

        slots: int64 [R], distinct. output_index: int64 [R], how many outputs the scheduler knows of the request. A scheduler that
        resets its caches discards outputs under way and asks for them again: what was emitted is emitted again, nothing advances.
        logits: [R, V' or V] of the engine. hidden: [R, d] the head's inputs that made them.
        A row whose logits are NaN or +inf, or all -inf, ends with BAD_LOGITS; the other rows do not notice.
        """
        logits = logits[:, : self.vocab_size]
        known = self.emitted_length[slots]
        again, phase, step = output_index < known, self.phase[slots], self.step[slots]
        bad = bad_rows(logits) & ~again & ((phase == COT) | (phase == ANSWER))
        thinks, forced, answers = ((phase == one) & ~again & ~bad for one in (COT, PREFILL, ANSWER))
        mixes = thinks & ~self.is_hard[slots]

        rows = Rows(slots, step, self.seed[slots], self.prompt_length[slots] + step, logits, hidden)
        token, logprob = self._sample(rows, thinks & ~mixes, answers)
        fed, top_ids = self.ops.mix(rows, mixes, self.tau[slots], self.sigma[slots], self.embedding, self.head)
        prefill, prefill_ended = self._prefill(slots, step)
        token = torch.where(mixes, top_ids, torch.where(forced, prefill, token))

        thought_ended = self._record_thought(slots, thinks, step, token)
        code = self._record_answer(slots, answers, step, token, logprob)
        self.stop_code[slots] = torch.where(bad, BAD_LOGITS, torch.where(answers, code, self.stop_code[slots]))
        active = thinks | forced | answers
        ended = torch.where(thinks, thought_ended, torch.where(forced, prefill_ended, code != RUNNING))
        self.phase[slots] = torch.where(bad, DONE, phase + (active & ended))  # the phases follow each other
        self.step[slots] = torch.where(active, torch.where(ended, 0, step + 1), step)

        at = output_index.clamp_max(self.emitted_ids.shape[1] - 1)  # a request that is done may be asked for more
        goes_on = active & ~(answers & ended)
        # The stop id must end a request only when we say so: a true token equal to it is shown as another id and overlaid.
        disguised = goes_on & (token == self.stop_id)
        shown = torch.where(goes_on, torch.where(disguised, self.other_id, token), self.stop_id)
        emitted = torch.where(again, self.emitted_ids[slots, at], shown)
        self._feed(slots, again, mixes, disguised, fed)
        self.emitted_ids[slots, at] = emitted
        self.emitted_length[slots] = torch.maximum(known, output_index + 1)
        if self._full:
            self._record_full(rows, mixes, fed)
        return emitted

    def _sample(self, rows: Rows, thinks: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and log-probs [R] of the rows that think hard tokens or answer."""
        temperature = torch.where(answers, self.answer_temperature[rows.slots], self.tau[rows.slots])
        return self.ops.sample(rows, thinks | answers, temperature, answers, self.head)

    def _prefill(self, slots: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """The forced ids [R], and whether each is the last."""
        kind = self.prefill_kind[slots]
        return self.prefill_ids[kind, step.clamp_max(self.prefill_ids.shape[1] - 1)], step + 1 >= self.prefill_length[kind]

    def _record_thought(self, slots: Tensor, thinks: Tensor, step: Tensor, token: Tensor) -> Tensor:
        """One shadow token of the rows that think; whether the CoT ends with it."""
        before = self.phrase_state[slots]
        state = self.tables.phrase_state[before, token].long()
        found = state == self.tables.accept
        self.shadow_ids[slots, torch.where(thinks, step, self.shadow_ids.shape[1] - 1)] = token.to(torch.int32)
        self.phrase_state[slots] = torch.where(thinks, state, before)
        self.cot_length[slots] += thinks
        self.prefill_kind[slots] = torch.where(thinks & found, AFTER_PHRASE, self.prefill_kind[slots])
        return found | (step + 1 >= self.cot_limit[slots])

    def _record_answer(self, slots: Tensor, answers: Tensor, step: Tensor, token: Tensor, logprob: Tensor) -> Tensor:
        """One token of the rows that answer; the stop code [R] with which the answer ends here, or RUNNING."""
        at = torch.where(answers, step, self.answer_ids.shape[1] - 1)
        self.answer_ids[slots, at] = token.to(torch.int32)
        self.answer_logprobs[slots, at] = logprob
        self.answer_length[slots] += answers
        depth, escaping = self.brace_depth[slots], self.escaping[slots]
        closed = depth + self.tables.brace_lowest[escaping, token] <= 0
        eos, length = self.tables.is_eos[token], step + 1 >= self.answer_limit[slots]
        code = torch.where(closed, CLOSED, torch.where(eos, EOS, torch.where(length, LENGTH, RUNNING)))
        self.brace_depth[slots] = torch.where(answers, depth + self.tables.brace_delta[escaping, token], depth)
        self.escaping[slots] = torch.where(answers, self.tables.escaping[escaping, token].long(), escaping)
        return code

    def _feed(self, slots: Tensor, again: Tensor, mixes: Tensor, disguised: Tensor, fed: Tensor) -> None:
        """The next inputs of the rows that mix, `fed` [R, n0], and of those whose token is disguised; others go by their id."""
        own = torch.where(mixes[:, None], fed, self.stop_row)
        overlaid = mixes | disguised
        self.next_input[slots] = torch.where(overlaid[:, None], own, self.next_input[slots])
        self.overlaid[slots] = torch.where(again, self.overlaid[slots], overlaid)

    def _record_full(self, rows: Rows, mixes: Tensor, fed: Tensor) -> None:
        """Keep the inputs of the requests that asked for it. Waits for the device."""
        for i, slot in enumerate(rows.slots.tolist()):
            if slot in self._full and mixes[i]:
                self._full[slot][int(rows.step[i])] = fed[i].cpu()

    # ------------------------------------------------------------------ inputs

    def replay(self, slot: int, first: int, last: int) -> tuple[NDArray[np.int64], Tensor]:
        """The recorded inputs of CoT steps first .. last-1 that are not the embedding of the id the scheduler knows.

        Returns the step indices [k] and their rows [k, n0] in the engine's dtype, bit for bit as they were fed, or as the weights
        of a push since make them; what is fed again is what a full record keeps. Waits for the device.
        """
        self.ops.settle()
        if bool(self.is_hard[slot]):
            ids = self.shadow_ids[slot, first:last].cpu().numpy()
            hidden_ids = np.flatnonzero(ids == self.stop_id)
            return first + hidden_ids, self.stop_row.expand(len(hidden_ids), -1)
        steps = np.arange(first, last)
        support = self.arena.steps(slot, first, last)
        count = last - first
        rows = self.embedding.soft_embeddings(
            torch.from_numpy(support.ids).to(self.device), torch.from_numpy(support.probs).to(self.device),
            torch.from_numpy(support.offsets).to(self.device), self.sigma[slot].expand(count), self.seed[slot].expand(count),
            self.prompt_length[slot] + torch.from_numpy(steps).to(self.device),
        )  # fmt: skip
        if slot in self._full:  # of new weights, after a push: then other rows than were recorded are fed now
            self._full[slot][first:last] = rows.cpu()
        return steps, rows

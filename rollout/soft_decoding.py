"""The soft-decoding state machine: what one request feeds back into the model, for all requests of a batch at once.

          logits of the row                                        input of the next position
    COT      mixture over the support (soft, fuzzy) or a sample (hard)   p E + sigma eps, or E[x]
      |      until the shadow text ends with the phrase, or L steps
    PREFILL  forced ids: `\\boxed{`, at the limit the whole phrase first  E[id]
      |
    ANSWER   ordinary sampling until the brace closes, EOS, or the limit  E[x]
      |
    DONE     the scheduler sees the stop id

State is one tensor per quantity, indexed by slot; a step is a handful of vectorised operations. It knows neither vLLM nor its
runners: an adapter gives rows of logits and hidden states, and asks for the embeddings to lay over its inputs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import TAU_OF_MODE, Mode
from kernels.noise import STREAM_ANSWER, STREAM_COT, uniform_rows
from kernels.soft_embedding import SupportBatch, rebuild, select_support
from rollout.record import SlotRecord, SupportArena, tensor_bytes
from rollout.token_tables import TokenTables

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
    head: [V', d] the LM head; may be the embedding itself.
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
        embedding: Tensor,
        head: Tensor,
    ) -> None:
        device = embedding.device
        self.device, self.dtype = device, embedding.dtype
        self.embedding, self.head = embedding, head
        self.tables = tables.to(device)
        self.vocab_size = tables.is_eos.shape[0]
        self.stop_id, self.other_id = stop_id, 0 if stop_id else 1
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
        self.next_input = per_slot(self.dtype, embedding.shape[1])
        self.overlaid = per_slot(torch.bool)  # the next input is `next_input`, not the embedding of the emitted id
        self.cot_length = per_slot(torch.int64)
        self.shadow_ids = per_slot(torch.int32, max_cot_tokens)
        self.answer_length = per_slot(torch.int64)
        self.answer_ids = per_slot(torch.int32, max_answer_tokens)
        self.answer_logprobs = per_slot(torch.float32, max_answer_tokens)
        self.emitted_length = per_slot(torch.int64)
        self.emitted_ids = per_slot(torch.int64, max_cot_tokens + width + max_answer_tokens)
        self.arena = SupportArena(slots, max_cot_tokens)
        self._full: dict[int, Tensor] = {}  # slot -> [L, n0], the inputs as they were fed, for record: full
        self._free = list(range(slots - 1, -1, -1))

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
        self._full.pop(slot, None)
        self._free.append(slot)

    @property
    def free_slots(self) -> int:
        """How many more requests `admit` takes."""
        return len(self._free)

    def record(self, slot: int) -> SlotRecord:
        """A copy of everything recorded for a slot."""
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
        again = output_index < self.emitted_length[slots]
        at = output_index.clamp_max(self.emitted_ids.shape[1] - 1)  # a request that is done may be asked for more
        emitted = torch.where(again, self.emitted_ids[slots, at], self.stop_id)
        phase = torch.where(again, DONE, self.phase[slots])
        bad = ~torch.isfinite(logits.amax(dim=1)) & (phase != DONE) & (phase != PREFILL)
        if bad.any():
            self.stop_code[slots[bad]] = BAD_LOGITS
            self.phase[slots[bad]] = DONE
            phase = torch.where(bad, DONE, phase)
        self.overlaid[slots] &= again
        for of_phase, act in ((COT, self._think), (PREFILL, self._force), (ANSWER, self._answer)):
            rows = (phase == of_phase).nonzero().squeeze(1)
            if len(rows):
                emitted[rows] = act(slots[rows], logits, hidden, rows)
        # The stop id must end a request only when we say so: a true token equal to it is shown as another id and overlaid.
        disguised = (emitted == self.stop_id) & (self.phase[slots] != DONE)
        if disguised.any():
            plain = slots[disguised & ~self.overlaid[slots]]
            self.next_input[plain] = self.embedding[self.stop_id]
            self.overlaid[plain] = True
            emitted[disguised] = self.other_id
        self.emitted_ids[slots, at] = emitted
        self.emitted_length[slots] = torch.maximum(self.emitted_length[slots], output_index + 1)
        return emitted

    def _think(self, slots: Tensor, logits: Tensor, hidden: Tensor, rows: Tensor) -> Tensor:
        """One CoT step: the mixture (or the sampled token), its record, and whether the CoT ends here."""
        hard = self.is_hard[slots]
        shadow = torch.empty_like(slots)
        if hard.any():
            shadow[hard] = self._sample(slots[hard], logits[rows[hard]], hidden[rows[hard]])
        soft = ~hard
        if soft.any():
            shadow[soft] = self._mix(slots[soft], logits[rows[soft]], hidden[rows[soft]])
        step = self.step[slots]
        self.shadow_ids[slots, step] = shadow.to(torch.int32)
        state = self.tables.phrase_state[self.phrase_state[slots], shadow].long()
        found, limit = state == self.tables.accept, step + 1 >= self.cot_limit[slots]
        ended = found | limit
        self.phrase_state[slots] = state
        self.cot_length[slots] = step + 1
        self.prefill_kind[slots] = torch.where(found, AFTER_PHRASE, AT_LIMIT)
        self.phase[slots] = torch.where(ended, PREFILL, COT)
        self.step[slots] = torch.where(ended, 0, step + 1)
        return shadow

    def _sample(self, slots: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """The sampled token of hard rows. A greedy one is found as a fuzzy row finds its peak, where bf16 logits tie or swap."""
        position = self.prompt_length[slots] + self.step[slots]
        token, _ = sample_tokens(logits, self.tau[slots], self.seed[slots], position, STREAM_COT)
        greedy = self.tau[slots] <= 0
        if logits.dtype != torch.float32 and greedy.any():
            cold = torch.full_like(self.tau[slots][greedy], TAU_OF_MODE[Mode.fuzzy])
            token[greedy] = self._support(logits[greedy], cold, hidden[greedy]).top_ids
        return token

    def _support(self, logits: Tensor, tau: Tensor, hidden: Tensor) -> SupportBatch:
        """The support of each row's mixture, from float32 logits or from rounded ones and what made them."""
        if logits.dtype == torch.float32:
            return select_support(logits, tau, None, None)
        return select_support(logits, tau, hidden, self.head)

    def _mix(self, slots: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        """The noisy mixture of soft rows, written to `next_input` and recorded; returns the most probable ids."""
        support = self._support(logits, self.tau[slots], hidden)
        step = self.step[slots]
        fed = rebuild(
            support.ids, support.probs, support.offsets, self.embedding,
            self.sigma[slots], self.seed[slots], self.prompt_length[slots] + step, self.dtype,
        )  # fmt: skip
        self.next_input[slots] = fed
        self.overlaid[slots] = True
        self.arena.append(slots.cpu().numpy(), step.cpu().numpy(), support)
        for i, slot in enumerate(slots.tolist() if self._full else ()):
            if slot in self._full:
                self._full[slot][step[i]] = fed[i].cpu()
        return support.top_ids

    def _force(self, slots: Tensor, _logits: Tensor, _hidden: Tensor, _rows: Tensor) -> Tensor:
        """One forced prefill id."""
        kind, step = self.prefill_kind[slots], self.step[slots]
        ended = step + 1 >= self.prefill_length[kind]
        self.phase[slots] = torch.where(ended, ANSWER, PREFILL)
        self.step[slots] = torch.where(ended, 0, step + 1)
        return self.prefill_ids[kind, step]

    def _answer(self, slots: Tensor, logits: Tensor, _hidden: Tensor, rows: Tensor) -> Tensor:
        """One answer token; the stop id in its place when it is the last."""
        step = self.step[slots]
        position = self.prompt_length[slots] + step  # distinct per answer token; the stream keeps it apart from the CoT's
        token, logprob = sample_tokens(logits[rows], self.answer_temperature[slots], self.seed[slots], position, STREAM_ANSWER)
        self.answer_ids[slots, step] = token.to(torch.int32)
        self.answer_logprobs[slots, step] = logprob
        self.answer_length[slots] = step + 1
        depth, escaping = self.brace_depth[slots], self.escaping[slots]
        closed = depth + self.tables.brace_lowest[escaping, token] <= 0
        eos, length = self.tables.is_eos[token], step + 1 >= self.answer_limit[slots]
        code = torch.where(closed, CLOSED, torch.where(eos, EOS, torch.where(length, LENGTH, RUNNING)))
        self.brace_depth[slots] = depth + self.tables.brace_delta[escaping, token]
        self.escaping[slots] = self.tables.escaping[escaping, token].long()
        self.stop_code[slots] = code
        self.phase[slots] = torch.where(code == RUNNING, ANSWER, DONE)
        self.step[slots] = step + 1
        return torch.where(code == RUNNING, token, self.stop_id)

    # ------------------------------------------------------------------ inputs

    def replay(self, slot: int, first: int, last: int) -> tuple[NDArray[np.int64], Tensor]:
        """The recorded inputs of CoT steps first .. last-1 that are not the embedding of the id the scheduler knows.

        Returns the step indices [k] and their rows [k, n0] in the engine's dtype, bit for bit as they were fed.
        """
        if bool(self.is_hard[slot]):
            ids = self.shadow_ids[slot, first:last].cpu().numpy()
            hidden_ids = np.flatnonzero(ids == self.stop_id)
            return first + hidden_ids, self.embedding[self.stop_id].expand(len(hidden_ids), -1)
        steps = np.arange(first, last)
        support = self.arena.steps(slot, first, last)
        count = last - first
        rows = rebuild(
            torch.from_numpy(support.ids).to(self.device), torch.from_numpy(support.probs).to(self.device),
            torch.from_numpy(support.offsets).to(self.device), self.embedding,
            self.sigma[slot].expand(count), self.seed[slot].expand(count),
            self.prompt_length[slot] + torch.from_numpy(steps).to(self.device), self.dtype,
        )  # fmt: skip
        return steps, rows


def sample_tokens(logits: Tensor, temperature: Tensor, seed: Tensor, position: Tensor, stream: int) -> tuple[Tensor, Tensor]:
    """Sample ids [R] int64 by inverse CDF with counter-based uniforms, and their log-probs [R] at temperature 1.

    logits [R, V]; temperature float32 [R], 0 is greedy; seed and position int64 [R]. A row's sample depends on nothing but its
    own logits, seed and position.
    """
    logits = logits.float()
    greedy = temperature <= 0
    token = logits.argmax(dim=1)
    if not greedy.all():
        scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
        weight = (scaled - scaled.amax(dim=1, keepdim=True)).exp_()
        token = torch.where(greedy, token, _draw(weight, uniform_rows(seed, position, stream)))
    return token, logits.gather(1, token[:, None]).squeeze(1) - torch.logsumexp(logits, dim=1)


def _draw(weight: Tensor, u: Tensor) -> Tensor:
    """Ids [R] of unnormalised weights [R, V] at uniforms u [R]: first the block of 128 that holds u, then the entry in it.

    Ten times faster on a CPU than a float64 running sum over all of V, which is what exactness would otherwise take.
    """
    block = 128
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % block)).unflatten(1, (-1, block))
    of_blocks = padded.sum(dim=2, dtype=torch.float64).cumsum(dim=1)
    target = u.double() * of_blocks[:, -1]
    chosen = torch.searchsorted(of_blocks, target[:, None], right=True).clamp_max(of_blocks.shape[1] - 1)
    before = torch.where(chosen > 0, of_blocks.gather(1, (chosen - 1).clamp_min(0)), 0.0)
    inside = padded.gather(1, chosen[:, :, None].expand(-1, -1, block)).squeeze(1).double().cumsum(dim=1)
    within = torch.searchsorted(inside, target[:, None] - before, right=True)
    # Rounding can put the target a hair past the block's own sum: take the block's last entry with weight.
    last = (inside < inside[:, -1:]).sum(dim=1, keepdim=True)
    return (chosen * block + torch.minimum(within, last)).squeeze(1)

"""The two operations of a step that look at whole rows of logits: sampling and mixing. All else is a few numbers per row.

    RaggedOps   CPU   the rows that sample or mix are picked out, and their supports recorded at once
    FixedOps    GPU   every row is worked on, those that a mask names are used: shapes and addresses do not depend on who they are

To pick rows out is to know which, and to know is to wait for the device: `FixedOps` never does. Its supports travel to the host
while the model runs, and are recorded two steps later, or when somebody asks for a record.

    step t     select, soft_embeddings --> buffer t % 2 (pinned, with an event)
    step t+2                               buffer t % 2 --> SupportArena, then it is used again

With asynchronous scheduling vLLM itself waits for the ids of step t before it begins step t + 2, so nothing is waited for then;
except by a row that overflows (kernels/triton_select.py), whose support is selected anew, with room for it, on a stream aside.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from configs.schema import TAU_OF_MODE, Mode
from kernels.soft_embedding import SupportBatch
from rollout.record import SupportArena
from rollout.sampling import draw_uniforms, sample_tokens
from rollout.vocab_rows import VocabRows

RING = 2  # steps whose supports may be on their way to the host


class Rows(NamedTuple):
    """The rows of a step, and what is known of the request of each."""

    slots: Tensor  # int64 [R], distinct
    step: Tensor  # int64 [R] positions decoded before this one in the phase
    seed: Tensor  # int64 [R]
    position: Tensor  # int64 [R] for noise and uniforms
    logits: Tensor  # [R, V]
    hidden: Tensor  # [R, d] what made the logits

    def pick(self, rows: Tensor) -> "Rows":
        """The rows of these indices, in their order; nothing is copied where they are all."""
        return self if len(rows) == len(self.slots) else Rows(*(part[rows] for part in self))


class RowOps(Protocol):
    """What `RaggedOps` and `FixedOps` have in common. What comes of rows that the mask leaves out must not be used."""

    def sample(self, rows: Rows, wanted: Tensor, temperature: Tensor, answering: Tensor, head: VocabRows) -> tuple[Tensor, Tensor]:
        """Ids int64 [R] of the rows `wanted` bool [R] and their log-probs float32 [R] at temperature 1.

        temperature float32 [R], 0 is greedy; answering bool [R], the others think. A greedy thought is the token
        that a fuzzy row would find most probable, where logits that are rounded tie or swap.
        """

    def mix(
        self, rows: Rows, wanted: Tensor, tau: Tensor, sigma: Tensor, embedding: VocabRows, head: VocabRows
    ) -> tuple[Tensor, Tensor]:
        """The noisy mixtures [R, n0] of the rows `wanted` bool [R], in the dtype of the embedding, and their most probable ids
        int64 [R]. They are recorded as step `rows.step` of their slots. tau, sigma float32 [R]; logits that are good.
        """

    def settle(self) -> None:
        """Record what is under way. Waits for the device."""


class RaggedOps:
    """On a CPU, from logits in float32 or bf16."""

    def __init__(self, arena: SupportArena) -> None:
        self.arena = arena

    def sample(self, rows: Rows, wanted: Tensor, temperature: Tensor, answering: Tensor, head: VocabRows) -> tuple[Tensor, Tensor]:
        token, logprob = torch.zeros_like(rows.slots), torch.zeros_like(temperature)
        picked = wanted.nonzero().squeeze(1)
        if len(picked):
            rows, temperature, answering = rows.pick(picked), temperature[picked], answering[picked]
            uniform = draw_uniforms(rows.seed, rows.position, answering) if temperature.any() else None
            token[picked], logprob[picked] = sample_tokens(rows.logits, temperature, uniform)
            cold = (~answering & (temperature <= 0)).nonzero().squeeze(1)
            if len(cold) and rows.logits.dtype != torch.float32:
                fuzzy = torch.full_like(temperature[cold], TAU_OF_MODE[Mode.fuzzy])
                token[picked[cold]] = head.support(rows.logits[cold], fuzzy, rows.hidden[cold]).top_ids
        return token, logprob

    def mix(
        self, rows: Rows, wanted: Tensor, tau: Tensor, sigma: Tensor, embedding: VocabRows, head: VocabRows
    ) -> tuple[Tensor, Tensor]:
        fed, top_ids = embedding.rows.new_zeros(len(wanted), embedding.rows.shape[1]), torch.zeros_like(rows.slots)
        picked = wanted.nonzero().squeeze(1)
        if len(picked):
            rows = rows.pick(picked)
            support = head.support(rows.logits, tau[picked], rows.hidden)
            fed[picked] = embedding.soft_embeddings(
                support.ids, support.probs, support.offsets, sigma[picked], rows.seed, rows.position
            )
            top_ids[picked] = support.top_ids
            self.arena.append(rows.slots.numpy(), rows.step.numpy(), support)
        return fed, top_ids

    def settle(self) -> None:
        pass


@dataclass(slots=True)
class PendingStep:
    """A step's supports on their way to the host: all tensors but `source` are in host memory."""

    slots: Tensor  # int64 [R]
    step: Tensor  # int64 [R]
    counts: Tensor  # int32 [R], this and the following as in FixedSupport
    dropped_mass: Tensor  # float32 [R]
    top_ids: Tensor  # int64 [R]
    ids: Tensor  # int32 [R, K]
    probs: Tensor  # float32 [R, K]
    arrived: torch.Event
    source: tuple[Tensor, Tensor] | None = None  # logits and tau, for rows of more than K entries; None: nothing is pending


class FixedOps:
    """On a GPU, from logits in float32, which nobody may alter afterwards (vLLM makes new ones in each step).

    For steps of at most `rows` rows of `vocabulary` logits. A support of more than `capacity` entries costs a second selection.
    """

    def __init__(self, arena: SupportArena, embedding: VocabRows, rows: int, vocabulary: int, capacity: int | None = None) -> None:
        from kernels import triton_select  # not at the top: a CPU needs no Triton

        device, width = embedding.rows.device, embedding.rows.shape[1]
        self.arena = arena
        self.support = triton_select.allocate(rows, vocabulary, capacity or min(triton_select.CAPACITY, vocabulary), device)
        self.fed = embedding.rows.new_zeros(rows, width)
        self._device = torch.get_device_module(device)
        self._aside = self._device.Stream()  # what is asked on it waits for no step that was begun since

        def on_host(like: Tensor) -> Tensor:
            return torch.zeros(like.shape, dtype=like.dtype, pin_memory=device.type == "cuda")

        s = self.support
        self._ring = [
            PendingStep(
                slots=on_host(s.top_ids), step=on_host(s.top_ids), counts=on_host(s.counts), dropped_mass=on_host(s.dropped_mass),
                top_ids=on_host(s.top_ids), ids=on_host(s.ids), probs=on_host(s.probs), arrived=self._device.Event(),
            )
            for _ in range(RING)
        ]  # fmt: skip
        self._next = 0  # the pending step to be used next, which is the oldest

    def sample(self, rows: Rows, wanted: Tensor, temperature: Tensor, answering: Tensor, head: VocabRows) -> tuple[Tensor, Tensor]:
        return sample_tokens(rows.logits, temperature, draw_uniforms(rows.seed, rows.position, answering))

    def mix(
        self, rows: Rows, wanted: Tensor, tau: Tensor, sigma: Tensor, embedding: VocabRows, head: VocabRows
    ) -> tuple[Tensor, Tensor]:
        from kernels import triton_select

        count, tau = len(tau), torch.where(wanted, tau, 0.0)  # 0: skipped
        triton_select.select(self.support, rows.logits, tau)
        embedding.soft_embeddings_into(self.fed, self.support, rows.logits, tau, sigma, rows.seed, rows.position)
        self._send(rows, tau)
        return self.fed[:count], self.support.top_ids[:count]

    def settle(self) -> None:
        for i in range(RING):
            self._record(self._ring[(self._next + i) % RING])

    def _send(self, rows: Rows, tau: Tensor) -> None:
        """Send the step's supports to the host, once the step that was in their place is recorded."""
        pending, count, s = self._ring[self._next], len(tau), self.support
        self._next = (self._next + 1) % RING
        self._record(pending)
        for host, part in (
            (pending.slots, rows.slots), (pending.step, rows.step), (pending.counts, s.counts), (pending.ids, s.ids),
            (pending.probs, s.probs), (pending.dropped_mass, s.dropped_mass), (pending.top_ids, s.top_ids),
        ):  # fmt: skip
            host[:count].copy_(part[:count], non_blocking=True)
        pending.arrived.record()
        pending.source = rows.logits, tau

    def _record(self, pending: PendingStep) -> None:
        """Wait until the step is here, which it usually is, and append it to the arena."""
        from kernels import triton_select

        if pending.source is None:
            return
        pending.arrived.synchronize()
        (logits, tau), pending.source = pending.source, None
        counts, capacity = pending.counts[: len(tau)], pending.ids.shape[1]
        rows = ((counts > 0) & (counts <= capacity)).nonzero().squeeze(1)
        listed = triton_select.compact(
            pending.ids[rows], pending.probs[rows], counts[rows], pending.dropped_mass[rows], pending.top_ids[rows]
        )
        self._append(pending, rows, listed)
        rows = (counts > capacity).nonzero().squeeze(1)
        if len(rows):
            with self._device.stream(self._aside):
                at = rows.to(tau.device)
                self._append(pending, rows, triton_select.select_support(logits[at], tau[at]))

    def _append(self, pending: PendingStep, rows: Tensor, support: SupportBatch) -> None:
        self.arena.append(pending.slots[rows].numpy(), pending.step[rows].numpy(), support)

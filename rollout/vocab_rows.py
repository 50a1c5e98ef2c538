"""The input embedding or LM head as one tensor-parallel rank of an engine holds it, and what the ranks compute from all of it.

vLLM splits both matrices over the ranks by ids (vllm/model_executor/layers/vocab_parallel_embedding.py) and gathers the logits of
every id to every rank, which then samples for itself. So does soft decoding: each rank decodes each request in full, from equal
logits and scheduler outputs to equal tokens, and noise is a function of seed and position. Only rows are needed from each other:

    mixture        sum of p_v E_v over my ids, float32 --all-reduce [R, n0]--> + sigma eps, rounded once
    rescoring      hidden . head row of my ids, else 0 --all-reduce [N]------> the candidates' logits (from bf16 logits only)
    one embedding  mine, or 0                          --all-reduce [n0]-----> E[id]

An all-reduce waits for every rank: nothing that decides on a call here may depend on the rank. With one rank there is none, and
the functions of kernels.soft_embedding are called as they are. A mixture is grouped into one partial sum a rank, so it differs in
the last bits from the one that the learner rebuilds with the whole matrix; a replay repeats it to the bit as far as the all-reduce
adds ranks in a fixed order, as any sum of two and vLLM's own reductions on CPUs and NVLink do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.soft_embedding import SupportBatch, add_noise, mix, rebuild, rescore, rms, screen, select_support, settle

if TYPE_CHECKING:
    from kernels.triton_select import FixedSupport


@dataclass(frozen=True, slots=True)
class VocabRows:
    """A matrix with one row per id, or the rank's part of it: ids first_id, first_id + 1, ... and, last of all, padding."""

    rows: Tensor  # [V', n] in the engine's dtype
    first_id: int = 0
    all_reduce: Callable[[Tensor], Tensor] | None = None  # the sum over all ranks, may overwrite its argument; None: one rank

    def row(self, token: int) -> Tensor:
        """[n]: the row of one id."""
        if self.all_reduce is None:
            return self.rows[token]
        mine = 0 <= token - self.first_id < len(self.rows)
        return self.all_reduce(self.rows[token - self.first_id].clone() if mine else torch.zeros_like(self.rows[0]))

    def soft_embeddings(
        self, ids: Tensor, probs: Tensor, offsets: Tensor, sigma: Tensor, seeds: Tensor, positions: Tensor
    ) -> Tensor:
        """[R, n] in the engine's dtype: `kernels.soft_embedding.rebuild` of the whole matrix, with the same arguments."""
        dtype = self.rows.dtype
        if self.all_reduce is None:
            return rebuild(ids, probs, offsets, self.rows, sigma, seeds, positions, dtype)
        held = self._held(ids)
        held_before = F.pad(held.cumsum(0), (1, 0))
        part = mix(ids[held] - self.first_id, probs[held], held_before[offsets], self.rows, dtype)
        return add_noise(self.all_reduce(part), sigma, seeds, positions, dtype)

    def soft_embeddings_into(
        self, out: Tensor, support: "FixedSupport", logits: Tensor, tau: Tensor, sigma: Tensor, seeds: Tensor, positions: Tensor
    ) -> None:
        """`kernels.triton_soft_embedding.soft_embeddings` of the whole matrix, with the same arguments."""
        from kernels import triton_soft_embedding  # not at the top: a CPU needs no Triton

        if self.all_reduce is None:
            triton_soft_embedding.soft_embeddings(support, logits, tau, self.rows, sigma, seeds, positions, out)
            return
        part = torch.empty(len(tau), out.shape[1], device=out.device)
        triton_soft_embedding.partial_means(support, logits, tau, self.rows, self.first_id, part)
        out[: len(tau)] = add_noise(self.all_reduce(part), sigma, seeds, positions, out.dtype)

    def support(self, logits: Tensor, tau: Tensor, hidden: Tensor) -> SupportBatch:
        """`kernels.soft_embedding.select_support` from logits [R, V] of all ids; this is the head, hidden [R, n] its input."""
        if logits.dtype == torch.float32:
            return select_support(logits, tau)
        if self.all_reduce is None:
            return select_support(logits, tau, hidden, self.rows)
        found = screen(logits, tau)
        held = self._held(found.ids)
        part = torch.zeros_like(found.logits)
        part[held] = rescore(found.rows[held], found.ids[held] - self.first_id, hidden, self.rows)
        return settle(found, self.all_reduce(part), tau)

    def _held(self, ids: Tensor) -> Tensor:
        """bool [N]: which ids are this rank's."""
        return (ids >= self.first_id) & (ids < self.first_id + len(self.rows))


def vocab_rows(layer: Any) -> VocabRows:
    """What this worker holds of a vLLM VocabParallelEmbedding or ParallelLMHead, or of an embedding that is not split."""
    if getattr(layer, "tp_size", 1) == 1:
        return VocabRows(layer.weight.data)
    from vllm.distributed import get_tp_group

    return VocabRows(layer.weight.data, layer.shard_indices.org_vocab_start_index, get_tp_group().all_reduce)


def rms_over_ranks(embedding: VocabRows, vocab_size: int) -> float:
    """`kernels.soft_embedding.rms` of the whole matrix without its padding, the same on every rank."""
    mine = embedding.rows[: max(0, vocab_size - embedding.first_id)]
    if embedding.all_reduce is None:
        return rms(mine)
    from vllm.distributed import get_tp_group

    total = torch.tensor([rms(mine) ** 2 * mine.numel() if len(mine) else 0.0, mine.numel()], dtype=torch.float64)
    torch.distributed.all_reduce(total, group=get_tp_group().cpu_group)  # sigma needs more digits than float32 has
    return float((total[0] / total[1]).sqrt())

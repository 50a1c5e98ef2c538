"""As a GPU decodes, on a GPU or in Triton's interpreter: like the slow reference and a CPU, and without asking the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from configs.schema import Mode
from kernels import triton_select, triton_soft_embedding
from rollout import vocab_rows
from rollout.plugin import EXTRA_ARG
from rollout.record import SlotRecord
from rollout.row_ops import FixedOps, RaggedOps
from rollout.slots import SoftRequests, StepRows
from rollout.soft_decoding import DONE, SoftDecoder
from rollout.vocab_rows import VocabRows
from tests.rollout.crowd import Seen, decode
from tests.rollout.slow_decoding import LONGEST, STOP_IDS, VOCABULARY, Story, Toy, a_story, decode_slowly, ids
from tests.rollout.test_soft_decoding import assert_is_told, assert_same_record

FEW = 3  # support entries that a row has room for: many mixtures of the toy have more
aten = torch.ops.aten


def fixed(decoder: SoftDecoder, capacity: int = FEW) -> SoftDecoder:
    """The decoder as it would be on a GPU, with room for `capacity` entries."""
    decoder.ops = FixedOps(decoder.arena, decoder.embedding, len(decoder.phase), VOCABULARY, capacity)
    return decoder


def decode_fixed(toy: Toy, decoder: SoftDecoder, stories: list[Story], random: Random | None = None) -> list[Seen]:
    with pytest.MonkeyPatch.context() as patch:  # it chooses by the device of its tensors, which in the interpreter is the CPU
        patch.setattr(vocab_rows, "rebuild", rebuild_as_on_a_gpu)
        return decode(toy, fixed(decoder), stories, random)


def rebuild_as_on_a_gpu(ids: Tensor, probs: Tensor, offsets: Tensor, embedding: Tensor, *keys_and_dtype: Any) -> Tensor:
    *keys, dtype = keys_and_dtype
    return triton_soft_embedding.rebuild(ids, probs, offsets, embedding, *(key.contiguous() for key in keys), dtype)


def assert_close_records(a: SlotRecord | None, b: SlotRecord | None) -> None:
    """The same decisions on the same supports; probabilities as near as float32 is to float64."""
    assert a is not None and b is not None
    for name in ("shadow_ids", "answer_ids", "stop_code", "prefill_kind"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert np.array_equal(a.support.ids, b.support.ids) and np.array_equal(a.support.offsets, b.support.offsets)
    assert np.allclose(a.support.probs, b.support.probs, rtol=8e-6, atol=0)
    assert np.allclose(a.dropped_mass, b.dropped_mass, rtol=1e-4, atol=1e-12)
    assert np.allclose(a.answer_logprobs, b.answer_logprobs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "stop_id"), list(zip([torch.float32, torch.bfloat16, torch.bfloat16], STOP_IDS, strict=True)))
def test_a_changing_batch_decodes_as_the_slow_reference_and_as_a_cpu_does(
    dtype: torch.dtype, stop_id: int, device: torch.device
) -> None:
    toy = Toy(dtype, with_exact_logits=True)
    stories = [a_story(toy, seed) for seed in range(1000 * stop_id, 1000 * stop_id + 5)]
    crowd = decode_fixed(toy, toy.decoder(7, stop_id, device), stories, Random(stop_id))
    on_cpu = decode(toy, toy.decoder(7, stop_id), stories, Random(stop_id))
    counts = []
    for story, seen, known in zip(stories, crowd, on_cpu, strict=True):
        assert_is_told(toy, story, seen, decode_slowly(toy, story), stop_id)
        assert (seen.emitted, seen.phases) == (known.emitted, known.phases)
        assert_close_records(seen.record, known.record)
        assert seen.record is not None
        counts += np.diff(seen.record.support.offsets).tolist()
    assert 0 < sum(count > FEW for count in counts) < sum(count > 0 for count in counts)  # some rows did overflow, some did not


def test_a_request_in_a_crowd_is_bit_for_bit_the_request_alone(device: torch.device) -> None:
    toy = Toy(torch.bfloat16, with_exact_logits=True)
    stories = [a_story(toy, seed) for seed in range(100, 104)]
    crowd = decode_fixed(toy, toy.decoder(4, 2, device), stories, Random(0))
    alone = decode_fixed(toy, toy.decoder(1, 2, device), stories)
    for a, b in zip(crowd, alone, strict=True):
        assert (a.emitted, a.phases) == (b.emitted, b.phases)
        assert len(a.inputs) == len(b.inputs) and all(map(torch.equal, a.inputs, b.inputs))
        assert_same_record(a.record, b.record)


def test_a_slot_taken_again_gets_nothing_that_was_on_its_way_for_the_request_before(device: torch.device) -> None:
    toy = Toy(torch.float32, with_exact_logits=True)
    soft, hard = (next(s for s in map(a_story, [toy] * 50, range(50)) if s.request.mode is mode) for mode in (Mode.soft, Mode.hard))
    decoder = fixed(toy.decoder(1, 2, device))
    slot = decoder.admit(soft.request)
    step_of(decoder, slot, toy, soft)
    decoder.release(slot)
    assert decoder.admit(hard.request) == slot
    decoder.ops.settle()
    assert not decoder.arena.ends[slot].any() and not decoder.arena.dropped[slot].any()


def step_of(decoder: SoftDecoder, slot: int, toy: Toy, story: Story) -> None:
    rows = (torch.tensor([slot]), torch.tensor([0]), story.logits(toy, 0)[None], story.hidden[:1])
    decoder.advance(*(part.to(decoder.device) for part in rows))


def test_ranks_mix_their_parts_into_what_one_mixes(device: torch.device) -> None:
    torch.manual_seed(0)
    logits, embedding = 3 * torch.randn(6, 500, device=device), torch.randn(500, 40, device=device).bfloat16()
    tau, sigma = torch.tensor([0.5, 0.7, 1e-4, 1.0, 0.0, 2.0], device=device), torch.full((6,), 0.3, device=device)
    keys = (logits, tau, sigma, torch.arange(6, device=device), torch.arange(6, device=device) + 9)
    support = triton_select.allocate(6, 500, 60, device)  # some have more
    triton_select.select(support, logits, tau)
    whole, mixed = (torch.zeros(6, 40, dtype=torch.bfloat16, device=device) for _ in range(2))
    parts: list[Tensor] = []
    VocabRows(embedding).soft_embeddings_into(whole, support, *keys)

    def kept(part: Tensor) -> Tensor:
        parts.append(part.clone())
        return part

    for first in (0, 250):
        VocabRows(embedding[first : first + 250], first, kept).soft_embeddings_into(mixed, support, *keys)
    VocabRows(embedding[:250], 0, lambda _: parts[0] + parts[1]).soft_embeddings_into(mixed, support, *keys)
    assert set(support.overflow.tolist()) == {True, False}
    assert torch.allclose(mixed.float(), whole.float(), rtol=2.0**-7, atol=2e-6)


# --- nothing is asked ------------------------------------------------------------------------------------------------


class Asked(Exception):
    """An operation whose result the host has to wait for."""


class Watch:
    """Whether questions are allowed for now."""

    allowed = False

    @contextmanager
    def off(self) -> Iterator[None]:
        before, self.allowed = self.allowed, True
        try:
            yield
        finally:
            self.allowed = before


class NoAnswers(TorchFunctionMode):
    """Raises for methods of a tensor that give the host its values, some of which never reach the dispatcher."""

    METHODS = frozenset(("cpu", "numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__array__"))

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if not self.watch.allowed and getattr(func, "__name__", "") in self.METHODS:
            raise Asked(func.__name__)
        return func(*args, **(kwargs or {}))


class NoUnknownShapes(TorchDispatchMode):
    """Raises for operations that read a value or whose result's shape depends on values, and for copies that are waited for."""

    READ = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.unique_consecutive,
            aten.bincount, aten.is_nonzero, aten.equal)  # fmt: skip
    INDEX = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index)

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operation = func.overloadpacket
        reads = operation in self.READ
        reads |= operation in self.INDEX and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        reads |= operation is aten.repeat_interleave and kwargs.get("output_size") is None
        if reads and not self.watch.allowed:
            raise Asked(func)
        result = func(*args, **kwargs)
        if operation in (aten._to_copy, aten.copy_) and not self.watch.allowed:
            source = args[0] if operation is aten._to_copy else args[1]
            if source.device != result.device and not (kwargs.get("non_blocking") or True in args[2:]):
                raise Asked(func)
        return result


@contextmanager
def unasked() -> Iterator[None]:
    """Nothing inside may ask the device, but for two things: the interpreter, and what is done with a step that has arrived."""
    watch = Watch()

    def allowed(function: Callable[..., Any]) -> Callable[..., Any]:
        def with_questions(*args: Any, **kwargs: Any) -> Any:
            with watch.off():
                return function(*args, **kwargs)

        return with_questions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedOps, "_record", allowed(FixedOps._record))
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")
        else:
            from triton.runtime.interpreter import GridExecutor

            patch.setattr(GridExecutor, "__call__", allowed(GridExecutor.__call__))
        try:
            with NoAnswers(watch), NoUnknownShapes(watch):
                yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def steps_of(requests: SoftRequests, prompts: list[int], vocabulary: int) -> Iterator[tuple[StepRows, Tensor, Tensor, Tensor]]:
    """What a runner gives in each step of as many as the longest request takes: rows, inputs, logits and hidden states."""
    device, count = requests.decoder.device, len(prompts)
    lengths, slots = np.array(prompts), np.array(list(requests.slots.values()))
    say = torch.tensor(ids("a", "so: ", "so", "{", "}", "x", "1", "</s>"), device=device)
    for k in range(LONGEST):
        scheduled = lengths if k == 0 else np.ones_like(lengths)
        rows = StepRows(
            slot=slots,
            computed=0 * lengths if k == 0 else lengths + k - 1,
            scheduled=scheduled,
            begin=np.cumsum(scheduled) - scheduled,
            sampled=np.ones(count, dtype=bool),
        )
        logits = torch.randn(count, vocabulary, device=device)
        logits[torch.arange(count, device=device), say[(torch.arange(count, device=device) + k) % len(say)]] += 6.0
        if k == 3:
            logits[0] = torch.nan
        yield rows, torch.zeros(int(scheduled.sum()), 12, device=device), logits, torch.zeros(count, 8, device=device)


def run_unasked(decoder: SoftDecoder) -> None:
    """Requests of every mode from their first step to their last, and beyond."""
    requests, prompts = SoftRequests(decoder), [5, 9, 7, 6, 8]
    modes = [(Mode.soft, 0.5), (Mode.soft, 1.0), (Mode.fuzzy, 1e-4), (Mode.hard, 1.0), (Mode.hard, 0.0)]
    for i, ((mode, tau), prompt) in enumerate(zip(modes, prompts, strict=True)):
        options = {
            "record_id": str(i), "mode": str(mode), "tau": tau, "sigma": 0.3 * (mode is not Mode.hard), "seed": i,
            "max_cot_tokens": 3 + i, "max_answer_tokens": 4, "answer_temperature": float(i % 2), "record_full": False,
        }  # fmt: skip
        requests.admit(str(i), SimpleNamespace(extra_args={EXTRA_ARG: options}), prompt)
    for rows, inputs, logits, hidden in steps_of(requests, prompts, VOCABULARY):
        with unasked():
            requests.overlay(rows, inputs)
            requests.advance(rows, logits, hidden)
    assert (decoder.phase == DONE).all()
    assert len(requests.take(["0", "1", "2", "3", "4"])) == 5


def test_no_step_asks_the_device_anything(device: torch.device) -> None:
    run_unasked(fixed(Toy(torch.float32).decoder(5, 2, device), VOCABULARY))


def test_a_cpus_way_is_caught_asking() -> None:
    decoder = Toy(torch.float32).decoder(5, 2)
    assert isinstance(decoder.ops, RaggedOps)
    with pytest.raises(Asked, match="nonzero"):
        run_unasked(decoder)

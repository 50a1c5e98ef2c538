"""The state machine is the slow reference, whatever else is in the batch; and what it recorded is what it fed, bit for bit."""

from dataclasses import replace
from itertools import product
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.schema import Mode
from rollout import record
from rollout.record import SlotRecord
from rollout.soft_decoding import (
    AFTER_PHRASE,
    ANSWER,
    AT_LIMIT,
    BAD_LOGITS,
    CLOSED,
    COT,
    DONE,
    EOS,
    LENGTH,
    RUNNING,
)
from rollout.vocab_rows import VocabRows
from tests.rollout.crowd import Seen, decode, next_fed
from tests.rollout.scripts import PINNED, Script, scripts
from tests.rollout.slow_decoding import (
    EOS_IDS,
    LONGEST,
    PREFILLS,
    STOP_IDS,
    WIDTH,
    Story,
    Told,
    Toy,
    a_request,
    a_story,
    advance,
    certain,
    decode_slowly,
    ids,
    say,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def assert_same_record(a: SlotRecord | None, b: SlotRecord | None) -> None:
    assert a is not None and b is not None
    for name in ("shadow_ids", "dropped_mass", "soft_embeddings", "answer_ids", "answer_logprobs", "stop_code", "prefill_kind"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    for name in ("ids", "probs", "offsets"):
        assert np.array_equal(getattr(a.support, name), getattr(b.support, name)), name


# --- against the reference -------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("stop_id", STOP_IDS)
def test_a_changing_batch_decodes_as_the_slow_reference_does(dtype: torch.dtype, stop_id: int) -> None:
    toy, ends = Toy(dtype), set[tuple[int, int]]()

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(st.lists(scripts(), min_size=1, max_size=4), st.integers(0, 999))
    @example(PINNED, 0)
    def decodes_alike(drawn: list[Script], order: int) -> None:
        stories = [script.story(toy) for script in drawn]
        crowd = decode(toy, toy.decoder(slots=4, stop_id=stop_id), stories, Random(order))
        for story, seen in zip(stories, crowd, strict=True):
            told = decode_slowly(toy, story)
            assert_is_told(toy, story, seen, told, stop_id)
            ends.add((told.prefill_kind, told.stop_code))

    decodes_alike()
    assert ends >= {*product((AFTER_PHRASE, AT_LIMIT), (CLOSED, EOS, LENGTH)), (AT_LIMIT, BAD_LOGITS)}  # all was seen


def assert_is_told(toy: Toy, story: Story, seen: Seen, told: Told, stop_id: int) -> None:
    assert seen.phases == told.phases
    assert seen.emitted[-1] == stop_id and stop_id not in seen.emitted[:-1]
    for emitted, token in zip(seen.emitted[:-1], told.true_ids, strict=False):
        assert emitted == token or token == stop_id  # a true token equal to the stop id is shown as some other one
    for fed, wanted in zip(seen.inputs, told.inputs, strict=True):
        rounding = 2.0**-8 * np.abs(wanted) if toy.dtype == torch.bfloat16 else 0.0
        assert (np.abs(fed.double().numpy() - wanted) <= rounding + 5e-4).all()  # what is dropped is below 40e-6 of |E| < 4
    record = seen.record
    assert record is not None
    assert (record.stop_code, record.prefill_kind) == (told.stop_code, told.prefill_kind)
    assert record.shadow_ids.tolist() == told.shadow_ids
    assert record.answer_ids.tolist() == told.answer_ids
    assert np.allclose(record.answer_logprobs, told.answer_logprobs, rtol=0, atol=1e-5)
    assert_is_support_of(record, told.mixtures)
    thinks_softly = story.request.mode is not Mode.hard
    assert (record.soft_embeddings is not None) == (story.request.record_full and thinks_softly)
    if record.soft_embeddings is not None and told.shadow_ids:
        fed_rows = torch.stack(seen.inputs[: len(told.shadow_ids)])
        assert torch.equal(torch.from_numpy(record.soft_embeddings).view(toy.dtype), fed_rows)


def assert_is_support_of(record: SlotRecord, mixtures: list[NDArray[np.float64]]) -> None:
    """The recorded steps are the mixtures without what is below the threshold, renormalised; none of a hard request."""
    support = record.support
    if not mixtures:
        assert len(support.ids) == 0 and not support.offsets.any() and not record.dropped_mass.any()
        assert len(support.offsets) == len(record.shadow_ids) + 1
    for step, mixture in enumerate(mixtures):
        entries = slice(int(support.offsets[step]), int(support.offsets[step + 1]))
        chosen, probs = support.ids[entries], support.probs[entries]
        assert (np.diff(chosen) > 0).all() and abs(probs.sum(dtype=np.float64) - 1) < 1e-6
        assert set(np.flatnonzero(mixture > 1.01e-6)) <= set(chosen) <= set(np.flatnonzero(mixture > 0.99e-6))
        assert np.allclose(probs, mixture[chosen] / mixture[chosen].sum(), rtol=1e-3, atol=1e-7)
        assert abs(record.dropped_mass[step] - (1 - mixture[chosen].sum())) < 1e-6


@DTYPES
def test_a_request_in_a_crowd_is_bit_for_bit_the_request_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "FIRST_CAPACITY", 10)  # so that the crowd's arena grows under it
    toy = Toy(dtype)
    stories = [a_story(toy, seed) for seed in range(100, 125)]
    crowd = decode(toy, toy.decoder(slots=9, stop_id=2), stories, Random(0))
    alone = decode(toy, toy.decoder(slots=1, stop_id=2), stories)
    for a, b in zip(crowd, alone, strict=True):
        assert (a.emitted, a.phases) == (b.emitted, b.phases)
        assert len(a.inputs) == len(b.inputs) and all(map(torch.equal, a.inputs, b.inputs))
        assert_same_record(a.record, b.record)


@DTYPES
def test_one_bad_row_ends_and_the_others_do_not_notice(dtype: torch.dtype) -> None:
    toy = Toy(dtype)
    stories = [replace(a_story(toy, seed), bad_at=None) for seed in range(200, 212)]
    hurt = replace(stories[5], request=replace(stories[5].request, max_cot_tokens=9), bad_at=0)
    calm = decode(toy, toy.decoder(12, 2), stories, Random(3))
    with_bad = decode(toy, toy.decoder(12, 2), [*stories[:5], hurt, *stories[6:]], Random(3))
    assert with_bad[5].record is not None and with_bad[5].record.stop_code == BAD_LOGITS
    assert with_bad[5].emitted == [2] and len(with_bad[5].record.shadow_ids) == 0
    for i in {*range(12)} - {5}:
        assert with_bad[i].emitted == calm[i].emitted and all(map(torch.equal, with_bad[i].inputs, calm[i].inputs))
        assert_same_record(with_bad[i].record, calm[i].record)


@DTYPES
def test_fuzzy_without_noise_thinks_the_greedy_tokens_and_is_fed_their_embeddings(dtype: torch.dtype) -> None:
    """bfloat16 logits are rescored for both, so a near tie falls the same way."""
    toy = Toy(dtype)
    for seed in range(12):
        story = replace(a_story(toy, seed), bad_at=None)
        story = replace(story, hidden=toy.leaning_to([seed + i for i in range(20)] + [0] * (LONGEST - 20), seed, pull=4.0))
        calm = replace(story.request, sigma=0.0, answer_temperature=0.0)
        fuzzy = replace(story, request=replace(calm, mode=Mode.fuzzy, tau=1e-4))
        greedy = replace(story, request=replace(calm, mode=Mode.hard, tau=0.0))
        a, b = (decode(toy, toy.decoder(1, 2), [one])[0] for one in (fuzzy, greedy))
        assert a.record is not None and b.record is not None
        assert (a.emitted, a.record.shadow_ids.tolist()) == (b.emitted, b.record.shadow_ids.tolist())
        assert all(map(torch.equal, a.inputs, b.inputs))
        assert a.record.answer_ids.tolist() == b.record.answer_ids.tolist()


# --- where the CoT and the answer end --------------------------------------------------------------------------------


SHORT, LONG = PREFILLS
STOP = EOS_IDS[0]


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize(
    ("limit", "thoughts", "kind"),
    [
        (8, ["a", "so: "], AFTER_PHRASE),
        (8, ["so: "], AFTER_PHRASE),
        (8, ["sso", ":", " "], AFTER_PHRASE),
        (8, ["so:s", "o", "", ": "], AFTER_PHRASE),
        (8, ["so: x", "x so: "], AFTER_PHRASE),  # the phrase with more after it in its token ends nothing
        (2, ["so:", " "], AFTER_PHRASE),  # at the very limit
        (1, ["so: "], AFTER_PHRASE),
        (3, ["so", ":", "x"], AT_LIMIT),
        (1, ["so"], AT_LIMIT),
        (4, ["</s>", "<end>", "</s>", "a"], AT_LIMIT),  # an EOS does not end a thought
        (4, ["</s>", "so", "</s>", ": "], AT_LIMIT),  # it is text like any other
    ],
)
def test_where_a_thought_ends(mode: Mode, limit: int, thoughts: list[str], kind: int) -> None:
    decoder = Toy(torch.float32).decoder(slots=3, stop_id=STOP)
    slot = decoder.admit(a_request(mode=mode, max_cot_tokens=limit))
    emitted = say(decoder, slot, ids(*thoughts))
    assert decoder.record(slot).shadow_ids.tolist() == ids(*thoughts)
    assert decoder.record(slot).prefill_kind == kind and int(decoder.phase[slot]) == ANSWER
    assert STOP not in emitted and emitted[len(thoughts) :] == PREFILLS[kind]


@pytest.mark.parametrize(
    ("limit", "answer", "code"),
    [
        (6, ["}"], CLOSED),  # an empty answer
        (6, ["1", "2", "}."], CLOSED),
        (6, ["{", "1", "}", "x", "}"], CLOSED),
        (6, ["{{", "{}", "}}", "}"], CLOSED),
        (6, ["y{", "}{", "}}"], CLOSED),
        (6, ["}{"], CLOSED),  # closed inside the token, though its sum is 0
        (6, ["\\{", "\\}", "{\\}", "}}"], CLOSED),  # printed braces do not count
        (6, ["\\", "}", "1", "}"], CLOSED),  # nor do they cut from their backslash
        (3, ["1", "2", "}"], CLOSED),  # with the last token allowed
        (6, ["</s>"], EOS),
        (6, ["1", "{", "<end>"], EOS),
        (2, ["1", "<end>"], EOS),
        (1, ["1"], LENGTH),
        (3, ["{", "1", "}"], LENGTH),
        (3, ["so: ", "\\}", "\\}"], LENGTH),
    ],
)
def test_where_an_answer_ends(limit: int, answer: list[str], code: int) -> None:
    decoder = Toy(torch.float32).decoder(slots=3, stop_id=STOP)
    slot = decoder.admit(a_request(max_cot_tokens=1, max_answer_tokens=limit))
    say(decoder, slot, ids("a"))
    emitted = say(decoder, slot, ids(*answer))
    record = decoder.record(slot)
    assert emitted == [*ids(*answer[:-1]), STOP]
    assert (record.answer_ids.tolist(), record.stop_code, int(decoder.phase[slot])) == (ids(*answer), code, DONE)
    assert np.array_equal(record.answer_logprobs, np.zeros(len(answer)))


def test_a_finished_request_stays_finished_and_its_record_as_it_was() -> None:
    decoder = Toy(torch.float32).decoder(slots=2, stop_id=STOP)
    slot = decoder.admit(a_request(max_cot_tokens=1))
    emitted = say(decoder, slot, ids("a", "1", "}"))
    record = decoder.record(slot)
    assert say(decoder, slot, [3, 4]) == [STOP, STOP] and int(decoder.phase[slot]) == DONE
    assert advance(decoder, torch.tensor([slot]), certain(3) * torch.nan, torch.zeros(1, WIDTH)) == [STOP]
    for index, token in enumerate([*emitted, *[STOP] * LONGEST]):  # what it said is said again, and nothing more, however far
        again = decoder.advance(torch.tensor([slot]), torch.tensor([index]), certain(5), torch.zeros(1, WIDTH))
        assert again.tolist() == [token]
    assert_same_record(decoder.record(slot), record)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("bad", [[0, torch.nan], [0, torch.inf], [slice(None), -torch.inf]])
def test_bad_logits_end_thoughts_and_answers_but_not_what_is_forced(mode: Mode, bad: list[Any]) -> None:
    logits = certain(5)
    logits[0, bad[0]] = bad[1]
    decoder = Toy(torch.float32).decoder(slots=2, stop_id=STOP)

    def slot_after(*pieces: str) -> int:
        slot = decoder.admit(a_request(mode=mode, max_cot_tokens=2))
        say(decoder, slot, ids(*pieces))
        return slot

    for said, shadow, answer in ((["a"], 1, 0), (["a", "b", "1"], 2, 1)):
        slot = slot_after(*said)
        assert advance(decoder, torch.tensor([slot]), logits, torch.zeros(1, WIDTH)) == [STOP]
        record = decoder.record(slot)
        assert (record.stop_code, len(record.shadow_ids), len(record.answer_ids)) == (BAD_LOGITS, shadow, answer)
        assert len(record.support.offsets) == shadow + 1
        decoder.release(slot)
    slot = decoder.admit(a_request(mode=mode, max_cot_tokens=1))
    advance(decoder, torch.tensor([slot]), certain(0), torch.zeros(1, WIDTH))
    forced = [advance(decoder, torch.tensor([slot]), logits, torch.zeros(1, WIDTH)) for _ in LONG]
    assert forced == [[token] for token in LONG] and int(decoder.stop_code[slot]) == RUNNING


@DTYPES
@pytest.mark.parametrize("stop_id", STOP_IDS)
def test_a_true_token_equal_to_the_stop_id_is_disguised_and_fed_as_itself(dtype: torch.dtype, stop_id: int) -> None:
    """The mixture of a soft thought is left alone. (Forced and answered ones: the slow reference, above.)"""
    toy = Toy(dtype)
    decoder = toy.decoder(slots=2, stop_id=stop_id)
    hidden = torch.zeros(1, WIDTH, dtype=dtype)
    hard, soft = (decoder.admit(a_request(mode=mode, max_cot_tokens=2)) for mode in (Mode.hard, Mode.soft))
    both = torch.tensor([soft, hard])
    emitted = advance(decoder, both, certain(stop_id).expand(2, -1), hidden.expand(2, -1))
    assert stop_id not in emitted and decoder.overlaid[both].all()
    assert decoder.shadow_ids[both, 0].tolist() == [stop_id, stop_id]
    assert torch.equal(decoder.next_input[hard], toy.embedding[stop_id])
    assert not torch.equal(decoder.next_input[soft], toy.embedding[stop_id])
    steps, rows = decoder.replay(hard, 0, 1)
    assert steps.tolist() == [0] and torch.equal(rows[0], toy.embedding[stop_id])
    advance(decoder, both, certain(33).expand(2, -1), hidden.expand(2, -1))
    assert decoder.overlaid[both].tolist() == [True, False]  # a soft thought always, a hard one no longer
    assert decoder.replay(hard, 0, 2)[0].tolist() == [0]


@pytest.mark.parametrize("mode", list(Mode))
def test_a_discarded_output_is_emitted_again_while_its_neighbour_advances(mode: Mode) -> None:
    toy = Toy(torch.float32)
    decoder = toy.decoder(slots=2, stop_id=STOP)
    ahead, behind = (decoder.admit(a_request(mode=mode, max_cot_tokens=4)) for _ in range(2))
    emitted = say(decoder, ahead, ids("a", "b", "x"))
    record, fed = decoder.record(ahead), next_fed(toy, decoder, ahead, emitted[-1])
    logits = torch.cat([certain(30), certain(31)])  # those of the row ahead are computed anew, and need not be what they were
    for known in range(3):
        both = decoder.advance(torch.tensor([ahead, behind]), torch.tensor([known, known]), logits, torch.zeros(2, WIDTH))
        assert both.tolist() == [emitted[known], 31]
    assert_same_record(decoder.record(ahead), record)
    assert torch.equal(next_fed(toy, decoder, ahead, emitted[-1]), fed)
    assert decoder.record(behind).shadow_ids.tolist() == [31] * 3


@DTYPES
def test_a_full_record_keeps_what_is_fed_again_after_a_push(dtype: torch.dtype) -> None:
    """A request that is preempted goes on with keys and values of mixtures of the new rows."""
    toy = Toy(dtype)
    decoder = toy.decoder(slots=1, stop_id=STOP)
    slot = decoder.admit(a_request(record_full=True))
    say(decoder, slot, ids("a", "b", "x", "s"))
    before = decoder.record(slot).soft_embeddings
    decoder.use_weights(VocabRows(2 * toy.embedding), VocabRows(toy.head))
    rows = decoder.replay(slot, 1, 3)[1]
    after = decoder.record(slot).soft_embeddings
    assert before is not None and after is not None
    assert np.array_equal(after[[0, 3]], before[[0, 3]])  # still in the cache, as they were
    assert torch.equal(torch.from_numpy(after[1:3]).view(dtype), rows) and not np.array_equal(after[1:3], before[1:3])


# --- slots -----------------------------------------------------------------------------------------------------------


def test_a_slot_keeps_nothing_of_the_request_before() -> None:
    toy = Toy(torch.float32)
    used, fresh = toy.decoder(slots=1, stop_id=STOP), toy.decoder(slots=1, stop_id=STOP)
    for mode, said in (
        (Mode.soft, ["so", "a", "x", "so: ", "{", "{"]),
        (Mode.hard, ["so", "</s>", "so:"]),
        (Mode.fuzzy, ["so"]),
    ):
        slot = used.admit(a_request(mode=mode, record_full=True))
        say(used, slot, ids(*said))
        used.release(slot)
    records = []
    for decoder in (used, fresh):
        slot = decoder.admit(a_request(max_cot_tokens=3))
        assert_same_record(decoder.record(slot), replace(decoder.record(slot), prefill_kind=AT_LIMIT, stop_code=RUNNING))
        assert int(decoder.phase[slot]) == COT and decoder.record(slot).soft_embeddings is None
        say(decoder, slot, ids(": ", "a", "a", "1", "}"))
        records.append(decoder.record(slot))
    assert_same_record(*records)


def test_no_slot_is_given_twice() -> None:
    decoder = Toy(torch.float32).decoder(slots=3, stop_id=STOP)
    slots = [decoder.admit(a_request()) for _ in range(3)]
    assert sorted(slots) == [0, 1, 2] and decoder.free_slots == 0
    with pytest.raises(RuntimeError, match=r"no free soft-decoding slot among 3: raise engine\.max_num_seqs"):
        decoder.admit(a_request())
    decoder.release(slots[1])
    assert decoder.admit(a_request()) == slots[1]

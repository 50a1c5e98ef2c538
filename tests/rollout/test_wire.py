"""What enters and leaves a worker is what was sent, to the last bit."""

import json
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import Mode
from rollout.plugin import EXTRA_ARG
from rollout.record import SlotRecord, SlotSupport
from rollout.trajectory import SampleRequest
from rollout.wire import AttachSpec, pack_records, request_options, slot_request, unpack_records


def a_record(seed: int, cot: int, answer: int, full: bool) -> SlotRecord:
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], random.integers(0, 50, cot).cumsum()])
    return SlotRecord(
        shadow_ids=random.integers(0, 49_152, cot, dtype=np.int32),
        support=SlotSupport(
            random.integers(0, 49_152, int(offsets[-1]), dtype=np.int32),
            random.random(int(offsets[-1]), dtype=np.float32),
            offsets.astype(np.int64),
        ),
        dropped_mass=random.random(cot, dtype=np.float32),
        soft_embeddings=random.integers(0, 256, (cot, 24), dtype=np.uint8) if full else None,
        answer_ids=random.integers(0, 49_152, answer, dtype=np.int32),
        answer_logprobs=-random.random(answer, dtype=np.float32),
        stop_code=int(random.integers(0, 5)),
        prefill_kind=int(random.integers(0, 2)),
    )


def arrays_of(record: SlotRecord) -> list[np.ndarray]:
    support = record.support
    full = [] if record.soft_embeddings is None else [record.soft_embeddings]
    others = [record.shadow_ids, record.dropped_mass, record.answer_ids, record.answer_logprobs]
    return [support.ids, support.probs, support.offsets, *others, *full]


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(max_size=8),
        st.builds(a_record, st.integers(0, 1000), st.integers(0, 20), st.integers(0, 5), st.booleans()),
        max_size=5,
    )
)
def test_records_come_out_as_they_went_in(records: dict[str, SlotRecord]) -> None:
    """Whatever their ids, and with empty arrays where a request ended at once."""
    back = unpack_records(pack_records(records))
    assert back.keys() == records.keys()
    for record_id, record in records.items():
        for a, b in zip(arrays_of(record), arrays_of(back[record_id]), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b) and a.shape == b.shape
        assert (back[record_id].stop_code, back[record_id].prefill_kind) == (record.stop_code, record.prefill_kind)
        assert (back[record_id].soft_embeddings is None) == (record.soft_embeddings is None)


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("seed", [0, 2**53 + 1, 2**63 - 1])
def test_a_slot_gets_the_request_as_it_was_made(mode: Mode, seed: int) -> None:
    request = SampleRequest(
        prompt_ids=np.arange(7, dtype=np.int32), prompt_index=3, sample_index=1, mode=mode, tau=1e-4, sigma=0.1 + 0.2, seed=seed,
        max_cot_tokens=128, max_answer_tokens=32, answer_temperature=0.7, record_full=mode is Mode.soft,
    )  # fmt: skip
    options = json.loads(json.dumps(request_options(request, "17")))  # plain JSON survives any serialiser
    assert options[EXTRA_ARG]["record_id"] == "17"
    slot = slot_request(options[EXTRA_ARG], prompt_length=7, rms_embedding=9.0)
    assert slot.prompt_length == 7
    for field in {f.name for f in fields(slot)} - {"prompt_length"}:
        assert getattr(slot, field) == getattr(request, field), field
        assert type(getattr(slot, field)) is type(getattr(request, field)), field


def test_an_attach_spec_comes_out_as_it_went_in() -> None:
    spec = AttachSpec(
        tokenizer="a folder/with 'é'", stop_phrase="The final answer is: ", prefills=([1, 2], [3, 4, 5]), eos_ids=[2, 0],
        stop_id=2, max_num_seqs=256, max_cot_tokens=510, max_answer_tokens=32,
    )  # fmt: skip
    assert AttachSpec.from_json(spec.to_json()) == spec

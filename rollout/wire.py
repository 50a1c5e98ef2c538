"""How requests enter and records leave a vLLM worker: plain JSON in, one safetensors blob out, no pickle."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import safetensors.numpy

from configs.schema import Mode
from rollout.engine_args import eos_ids
from rollout.plugin import EXTRA_ARG
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, STOP_PHRASE
from rollout.record import SlotRecord, SlotSupport
from rollout.soft_decoding import SlotRequest
from rollout.trajectory import SampleRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachSpec:
    """What a worker needs before it can decode soft tokens; sent once, as JSON."""

    tokenizer: str  # folder or id
    stop_phrase: str
    prefills: tuple[list[int], list[int]]  # after the phrase, at the limit
    eos_ids: list[int]
    stop_id: int
    max_num_seqs: int
    max_cot_tokens: int
    max_answer_tokens: int

    @staticmethod
    def of_model(model: str, *, max_num_seqs: int, max_cot_tokens: int, max_answer_tokens: int) -> "AttachSpec":
        """The paper's phrase and prefills in the ids of a model's tokenizer; `model` is a folder or an id.

        Raises InputError when nothing says which token ends a text.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model)
        eos = eos_ids(model, tokenizer)
        prefills = [tokenizer.encode(text, add_special_tokens=False) for text in (PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT)]
        return AttachSpec(
            tokenizer=model,
            stop_phrase=STOP_PHRASE,
            prefills=(prefills[0], prefills[1]),
            eos_ids=eos,
            stop_id=eos[0],
            max_num_seqs=max_num_seqs,
            max_cot_tokens=max_cot_tokens,
            max_answer_tokens=max_answer_tokens,
        )

    def most_generated(self, max_cot_tokens: int, max_answer_tokens: int) -> int:
        """The positions that a request decodes at most: its CoT, the longer prefill, its answer."""
        return max_cot_tokens + max(map(len, self.prefills)) + max_answer_tokens

    def to_json(self) -> str:
        """What `from_json` reads back into an equal spec."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "AttachSpec":
        """The inverse of `to_json`."""
        fields = json.loads(text)
        return AttachSpec(**{**fields, "prefills": tuple(fields["prefills"])})  # JSON knows no tuples


def request_options(request: SampleRequest, record_id: str) -> dict[str, Any]:
    """The extra_args of one request."""
    return {
        EXTRA_ARG: {
            "record_id": record_id,
            "mode": str(request.mode),
            "tau": request.tau,
            "sigma": request.sigma,
            "seed": request.seed,
            "max_cot_tokens": request.max_cot_tokens,
            "max_answer_tokens": request.max_answer_tokens,
            "answer_temperature": request.answer_temperature,
            "record_full": request.record_full,
        }
    }


def slot_request(options: dict[str, Any], prompt_length: int, rms_embedding: float) -> SlotRequest:
    """What `request_options`, or rollout.serving for a client, put under EXTRA_ARG, as the state machine takes it.

    `prompt_length` is vLLM's own count. A client gives gamma where the actor gives sigma = gamma RMS(E) (paper, section 4.1).
    """
    fields = {k: v for k, v in options.items() if k not in ("record_id", "gamma")}
    if "gamma" in options:
        fields["sigma"] = options["gamma"] * rms_embedding
    return SlotRequest(prompt_length=prompt_length, **{**fields, "mode": Mode(fields["mode"])})


def pack_records(records: dict[str, SlotRecord]) -> bytes:
    """Records by id as one blob; ids may hold any character but "/"."""
    arrays: dict[str, np.ndarray] = {}
    for record_id, r in records.items():
        arrays |= {
            f"{record_id}/shadow_ids": r.shadow_ids,
            f"{record_id}/support_ids": r.support.ids,
            f"{record_id}/support_probs": r.support.probs,
            f"{record_id}/support_offsets": r.support.offsets,
            f"{record_id}/dropped_mass": r.dropped_mass,
            f"{record_id}/answer_ids": r.answer_ids,
            f"{record_id}/answer_logprobs": r.answer_logprobs,
            f"{record_id}/codes": np.array([r.stop_code, r.prefill_kind], dtype=np.int64),
        }
        if r.soft_embeddings is not None:
            arrays[f"{record_id}/soft_embeddings"] = r.soft_embeddings
    return safetensors.numpy.save(arrays)


def unpack_records(blob: bytes) -> dict[str, SlotRecord]:
    """The inverse of pack_records."""
    by_id: dict[str, dict[str, np.ndarray]] = {}
    for key, array in safetensors.numpy.load(blob).items():
        record_id, name = key.rsplit("/", 1)
        by_id.setdefault(record_id, {})[name] = array
    return {
        record_id: SlotRecord(
            shadow_ids=a["shadow_ids"],
            support=SlotSupport(a["support_ids"], a["support_probs"], a["support_offsets"]),
            dropped_mass=a["dropped_mass"],
            soft_embeddings=a.get("soft_embeddings"),
            answer_ids=a["answer_ids"],
            answer_logprobs=a["answer_logprobs"],
            stop_code=int(a["codes"][0]),
            prefill_kind=int(a["codes"][1]),
        )
        for record_id, a in by_id.items()
    }

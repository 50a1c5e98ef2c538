"""Soft decoding once more, the slow and obvious way, and a toy model for both: one request at a time, the text as bytes that are
looked at again after every token, float64 throughout, and mixtures over the whole vocabulary instead of a support.
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.schema import Mode
from kernels.noise import STREAM_ANSWER, STREAM_COT, normal_rows, uniform_rows
from rollout import soft_decoding as machine
from rollout.soft_decoding import SlotRequest, SoftDecoder
from rollout.token_tables import TokenTables, brace_tables, pad_pieces, phrase_table
from rollout.vocab_rows import VocabRows

PHRASE = b"so: "
PIECES = [
    b"a", b"b", b"</s>", b"s", b"o", b":", b" ", b"so", b": ", b"o: ", b"so:", b"so: ", b" so", b"x so: ", b"so: x", b"sso",
    b"so:s", b"o:", b"", b"{", b"}", b"{}", b"}{", b"}}", b"{{", b"\\{", b"\\}", b"{\\}", b"}.", b"\\", b"\\boxed", b"<end>",
    b"0", b"1", b"2", b"3", b" 4", b"5", b"x", b"y{",
]  # fmt: skip
EOS_IDS = [PIECES.index(b"</s>"), PIECES.index(b"<end>")]
PREFILLS = ([PIECES.index(b"\\boxed"), PIECES.index(b"{")], [PIECES.index(p) for p in (b"so", b": ", b"\\boxed", b"{")])
VOCABULARY = len(PIECES)
PADDED = VOCABULARY + 3  # rows of embedding, head and logits; what stands in the last three must never matter
WIDTH, EMBEDDING_WIDTH = 8, 12
MOST_COT, MOST_ANSWER = 12, 6
LONGEST = MOST_COT + max(map(len, PREFILLS)) + MOST_ANSWER
STOP_IDS = [EOS_IDS[0], PIECES.index(b"{"), 0]  # an EOS as in real life; one that is forced and answered; what disguises others


def ids(*pieces: str) -> list[int]:
    return [PIECES.index(piece.encode()) for piece in pieces]


def toy_tables() -> TokenTables:
    flat, lengths = pad_pieces(PIECES)
    is_eos = torch.zeros(VOCABULARY, dtype=torch.bool)
    is_eos[EOS_IDS] = True
    braces = (torch.from_numpy(table) for table in brace_tables(flat, lengths))
    return TokenTables(torch.from_numpy(phrase_table(flat, lengths, PHRASE)), *braces, is_eos)


class Toy:
    """An embedding and an untied head in the engine's dtype. The head's and the hidden states' numbers are multiples of 1/8, so
    their dot products are exact in float32, and rounding, where there is any, is bfloat16's: none `with_exact_logits`."""

    def __init__(self, dtype: torch.dtype, with_exact_logits: bool = False) -> None:
        random = torch.Generator().manual_seed(7)
        self.dtype, self.logits_dtype = dtype, torch.float32 if with_exact_logits else dtype
        self.head = eighths(torch.randn(PADDED, WIDTH, generator=random)).to(dtype)
        self.embedding = torch.randn(PADDED, EMBEDDING_WIDTH, generator=random).to(dtype)
        self.head[VOCABULARY:] = torch.nan
        self.embedding[VOCABULARY:] = torch.nan

    def decoder(self, slots: int, stop_id: int, device: torch.device | None = None) -> SoftDecoder:
        return SoftDecoder(
            slots=slots, max_cot_tokens=MOST_COT, max_answer_tokens=MOST_ANSWER, tables=toy_tables(), prefills=PREFILLS,
            stop_id=stop_id, embedding=VocabRows(self.embedding.to(device)), head=VocabRows(self.head.to(device)),
        )  # fmt: skip

    def leaning_to(self, wanted: list[int], seed: int, pull: float = 0.75) -> Tensor:
        """Hidden states [K, d] that make the wanted ids likely, but not certain."""
        noise = torch.randn(len(wanted), WIDTH, generator=torch.Generator().manual_seed(seed))
        return eighths(pull * self.head[wanted].float() + 0.5 * noise).to(self.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """The engine's logits [R, V']."""
        return hidden.to(self.logits_dtype) @ self.head.T.to(self.logits_dtype)


def eighths(values: Tensor) -> Tensor:
    return (values * 8).round() / 8


@dataclass(frozen=True)
class Story:
    """A request and what the model will say to it: hidden[k] makes the logits of its k-th decoded position."""

    request: SlotRequest
    hidden: Tensor  # [K, d]
    bad_at: int | None = None  # the position whose logits hold a NaN

    def logits(self, toy: Toy, k: int) -> Tensor:
        row = toy.logits(self.hidden[k : k + 1])[0]
        if k == self.bad_at:
            row[VOCABULARY // 2] = torch.nan
        return row


def a_request(**fields: Any) -> SlotRequest:
    usual: dict[str, Any] = {
        "prompt_length": 5, "mode": Mode.soft, "tau": 0.5, "sigma": 0.33, "seed": 11, "max_cot_tokens": MOST_COT,
        "max_answer_tokens": MOST_ANSWER, "answer_temperature": 1.0, "record_full": False,
    }  # fmt: skip
    return SlotRequest(**usual | fields)


def a_story(toy: Toy, seed: int) -> Story:
    """A random request of a model that is fond of the phrase, of braces, of EOS and of the stop ids."""
    random = Random(seed)
    mode, tau = random.choice([(Mode.hard, 0.0), (Mode.hard, 1.0), (Mode.soft, 0.5), (Mode.soft, 0.5), (Mode.fuzzy, 1e-4)])
    request = a_request(
        prompt_length=random.randrange(1, 40), mode=mode, tau=tau, seed=random.randrange(2**63),
        sigma=0.0 if mode is Mode.hard else random.choice([0.0, 0.33]), max_cot_tokens=random.randrange(1, MOST_COT + 1),
        max_answer_tokens=random.randrange(1, MOST_ANSWER + 1), answer_temperature=random.choice([0.0, 1.0]),
        record_full=random.random() < 0.5,
    )  # fmt: skip
    thoughts = [
        ids("so: "),
        ids("so", ": "),
        ids("s", "o", ":", " "),
        ids("so:s", "o: "),
        ids("sso", ":", " "),
        EOS_IDS,
        STOP_IDS,
    ]
    answers = [ids("}"), ids("{", "1", "}}"), ids("2", "{\\}", "}."), ids("y{", "}{"), EOS_IDS, STOP_IDS]
    wanted: list[int] = []
    while len(wanted) < LONGEST:
        wanted += random.choice(thoughts if len(wanted) < request.max_cot_tokens else answers)
        wanted += random.choices(range(VOCABULARY), k=random.randrange(3))
    hidden = toy.leaning_to(wanted[:LONGEST], seed, pull=random.choice([0.5, 1.0, 2.0]))
    return Story(request, hidden, bad_at=random.randrange(LONGEST) if random.random() < 0.3 else None)


def certain(token: int) -> Tensor:
    """float32 logits [1, V] of a model that says nothing else."""
    logits = torch.full((1, VOCABULARY), -60.0)
    logits[0, token] = 60.0
    return logits


def advance(decoder: SoftDecoder, slots: Tensor, logits: Tensor, hidden: Tensor) -> list[int]:
    """The next output of each slot."""
    return decoder.advance(slots, decoder.emitted_length[slots], logits, hidden).tolist()


def say(decoder: SoftDecoder, slot: int, tokens: list[int]) -> list[int]:
    """Have the model say tokens of the CoT or the answer, with what is forced in between; returns the emitted ids."""
    emitted, left = [], list(tokens)
    while left or decoder.phase[slot] == machine.PREFILL:
        token = 0 if decoder.phase[slot] == machine.PREFILL else left.pop(0)
        emitted += advance(decoder, torch.tensor([slot]), certain(token), torch.zeros(1, WIDTH))
    return emitted


@dataclass
class Told:
    """How a request went, position by position, and what was recorded of it."""

    true_ids: list[int] = field(default_factory=list)  # shadow, forced and answer ids
    inputs: list[NDArray[np.float64]] = field(default_factory=list)  # [n0] what the model is fed next; none after the last
    phases: list[int] = field(default_factory=list)  # after the position
    shadow_ids: list[int] = field(default_factory=list)
    mixtures: list[NDArray[np.float64]] = field(default_factory=list)  # [V] per CoT step, when not hard
    answer_ids: list[int] = field(default_factory=list)
    answer_logprobs: list[float] = field(default_factory=list)
    prefill_kind: int = machine.AT_LIMIT
    stop_code: int = machine.RUNNING


def decode_slowly(toy: Toy, story: Story) -> Told:
    request, told, phase = story.request, Told(), machine.COT
    embedding = toy.embedding[:VOCABULARY].double().numpy()
    exact_head = toy.head[:VOCABULARY].double().numpy()
    forced: list[int] = []
    k = 0
    while phase != machine.DONE:
        logits = story.logits(toy, k)[:VOCABULARY].double().numpy()
        if phase != machine.PREFILL and k == story.bad_at:
            told.stop_code = machine.BAD_LOGITS
            told.phases.append(machine.DONE)
            break
        if phase == machine.COT:
            position = request.prompt_length + k
            exact_logits = exact_head @ story.hidden[k].double().numpy()
            if request.mode is Mode.hard:
                greedy = request.tau == 0
                token = draw(exact_logits if greedy else logits, request.tau, request.seed, position, STREAM_COT)
                fed = embedding[token]
            else:
                mixture = softmax(exact_logits / single(request.tau))
                token = int(np.argmax(exact_logits))
                fed = mixture @ embedding + single(request.sigma) * noise(request.seed, position)
                told.mixtures.append(mixture)
            told.shadow_ids.append(token)
            if b"".join(PIECES[i] for i in told.shadow_ids).endswith(PHRASE):
                phase, told.prefill_kind = machine.PREFILL, machine.AFTER_PHRASE
            elif len(told.shadow_ids) == request.max_cot_tokens:
                phase, told.prefill_kind = machine.PREFILL, machine.AT_LIMIT
            if phase == machine.PREFILL:
                forced = list(PREFILLS[told.prefill_kind])
        elif phase == machine.PREFILL:
            token = forced.pop(0)
            fed = embedding[token]
            if not forced:
                phase = machine.ANSWER
        else:
            position = request.prompt_length + len(told.answer_ids)
            token = draw(logits, request.answer_temperature, request.seed, position, STREAM_ANSWER)
            fed = embedding[token]
            told.answer_ids.append(token)
            told.answer_logprobs.append(float(np.log(softmax(logits)[token])))
            told.stop_code = why_it_ends(told.answer_ids, request.max_answer_tokens)
            if told.stop_code != machine.RUNNING:
                phase = machine.DONE
        told.true_ids.append(token)
        told.phases.append(phase)
        if phase != machine.DONE:
            told.inputs.append(fed)
        k += 1
    return told


def why_it_ends(answer: list[int], limit: int) -> int:
    """The brace that the prefill opened is depth 1; a brace after a backslash that is not itself escaped is text."""
    depth, escaped = 1, False
    for byte in b"".join(PIECES[token] for token in answer):
        depth += 0 if escaped else {ord("{"): 1, ord("}"): -1}.get(byte, 0)
        escaped = byte == ord("\\") and not escaped
        if depth == 0:
            return machine.CLOSED
    if answer[-1] in EOS_IDS:
        return machine.EOS
    return machine.LENGTH if len(answer) == limit else machine.RUNNING


def draw(logits: NDArray[np.float64], tau: float, seed: int, position: int, stream: int) -> int:
    if tau == 0:
        return int(np.argmax(logits))
    u = float(uniform_rows(torch.tensor([seed]), torch.tensor([position]), stream))
    return int(np.searchsorted(np.cumsum(softmax(logits / single(tau))), u, side="right"))


def single(number: float) -> float:
    """As the slots hold it: rounded to float32."""
    return float(np.float32(number))


def noise(seed: int, position: int) -> NDArray[np.float64]:
    return normal_rows(torch.tensor([seed]), torch.tensor([position]), EMBEDDING_WIDTH)[0].double().numpy()


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()

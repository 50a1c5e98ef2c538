"""Scripts of what a model says to a request, drawn by Hypothesis: every way to cut the stop phrase into tokens, near misses of it,
EOS among the thoughts, braces in braces, empty answers, and whatever else the vocabulary holds. One that fails is shrunk."""

from dataclasses import dataclass
from functools import cache
from itertools import chain

import torch
from hypothesis import strategies as st
from torch import Tensor

from configs.schema import Mode
from rollout.soft_decoding import SlotRequest
from tests.rollout.slow_decoding import (
    EOS_IDS,
    LONGEST,
    MOST_ANSWER,
    MOST_COT,
    PHRASE,
    PIECES,
    PREFILLS,
    STOP_IDS,
    VOCABULARY,
    Story,
    Toy,
    a_request,
    eighths,
    ids,
)

SURE, UNSURE = 16.0, 4.0  # lengths of hidden states: nearly always the wanted token, or often another


@dataclass(frozen=True)
class Script:
    """A request, and the tokens that its model wants to say, in thought and in answer."""

    request: SlotRequest
    thoughts: list[int]
    answer: list[int]
    length: float = SURE
    bad_at: int | None = None  # the position whose logits hold a NaN

    def story(self, toy: Toy) -> Story:
        """The hidden states that say it; what is forced in between gets some too."""
        wanted = list(self.thoughts[: self.request.max_cot_tokens])
        ends = [n for n in range(1, len(wanted) + 1) if b"".join(PIECES[i] for i in wanted[:n]).endswith(PHRASE)]
        del wanted[ends[0] if ends else len(wanted) :]
        if not ends:
            wanted += [0] * (self.request.max_cot_tokens - len(wanted))
        wanted += PREFILLS[0 if ends else 1] + self.answer
        wanted = (wanted + [0] * LONGEST)[:LONGEST]
        return Story(self.request, eighths(self.length * voices(toy.dtype)[wanted]).to(toy.dtype), self.bad_at)


@cache
def voices(dtype: torch.dtype) -> Tensor:
    """For each id a hidden state [d] of length 1 whose largest logit is the id's, where the toy's head has one."""
    head = Toy(dtype).head[:VOCABULARY].float()
    found = []
    for token, row in enumerate(head):
        voice = row.clone()
        for _ in range(200):
            logits = head @ voice
            rivals = logits.clone()
            rivals[token] = -torch.inf
            if logits[token] - rivals.max() > 0.15 * voice.norm():
                break
            voice += 0.3 * (row - head[rivals.argmax()])
        found.append(voice / voice.norm())
    return torch.stack(found)


def cuts(text: bytes) -> list[list[int]]:
    """Every way to write a text in tokens that are not empty."""
    if not text:
        return [[]]
    starts = [i for i, piece in enumerate(PIECES) if piece and text.startswith(piece)]
    return [[i, *rest] for i in starts for rest in cuts(text[len(PIECES[i]) :])]


# In tokens of its own, or begun in one that ends with its first bytes.
PHRASES = cuts(PHRASE) + [
    [i, *rest]
    for i, piece in enumerate(PIECES)
    for begun in range(1, len(PHRASE) + 1)
    if len(piece) > begun and piece.endswith(PHRASE[:begun])
    for rest in cuts(PHRASE[begun:])
]
TOKENS = st.integers(0, VOCABULARY - 1)


def scripts() -> st.SearchStrategy[Script]:
    """A request of any mode, and what it hears."""
    phrases = st.sampled_from(PHRASES)
    missed = st.builds(lambda phrase, at, token: [*phrase[: at % len(phrase)], token], phrases, TOKENS, TOKENS)
    interrupted = st.builds(lambda phrase, token: [phrase[0], token, *phrase[1:]], phrases, TOKENS)
    odd = st.sampled_from([EOS_IDS[:1], EOS_IDS[1:], ids(""), *([stop] for stop in STOP_IDS)])
    thoughts = st.lists(phrases | missed | interrupted | odd | st.lists(TOKENS, max_size=2), max_size=4)
    braces = st.sampled_from([ids(b) for b in ("}", "{", "{{", "}}", "{}", "}{", "y{", "}.", "\\{", "\\}", "{\\}", "\\", "1")])
    answers = st.lists(braces | odd | TOKENS.map(lambda token: [token]), max_size=MOST_ANSWER)
    modes = st.sampled_from([(Mode.soft, 0.5), (Mode.hard, 1.0), (Mode.hard, 0.0), (Mode.fuzzy, 1e-4)])
    return st.builds(
        lambda mode, noise, fields, thoughts, answer, length, bad_at: Script(
            a_request(mode=mode[0], tau=mode[1], sigma=0.0 if mode[0] is Mode.hard else noise, **fields),
            list(chain(*thoughts)), list(chain(*answer)), length, bad_at,
        ),
        modes,
        st.sampled_from([0.33, 0.0]),
        st.fixed_dictionaries({
            "prompt_length": st.integers(1, 40), "seed": st.integers(0, 2**63 - 1), "max_cot_tokens": st.integers(1, MOST_COT),
            "max_answer_tokens": st.integers(1, MOST_ANSWER), "answer_temperature": st.sampled_from([1.0, 0.0]),
            "record_full": st.booleans(),
        }),
        thoughts,
        answers,
        st.sampled_from([SURE, UNSURE]),
        st.none() | st.none() | st.integers(0, LONGEST - 1),
    )  # fmt: skip


def script(
    limit: int, thoughts: list[str], answer: list[str], answer_limit: int = MOST_ANSWER, bad_at: int | None = None
) -> Script:
    """One of our own, in the pieces of the toy's vocabulary."""
    request = a_request(tau=0.5, max_cot_tokens=limit, max_answer_tokens=answer_limit, answer_temperature=0.0, record_full=True)
    return Script(request, ids(*thoughts), ids(*answer), bad_at=bad_at)


PINNED = [
    script(8, ["a", "so: "], ["}"]),  # an empty answer
    script(8, ["sso", ":", " "], ["1", "{{", "{}", "}}", "}"]),  # over token borders; braces in braces
    script(2, ["so:", " "], ["y{", "}{", "}}"]),  # at the very limit
    script(1, ["so: "], ["</s>"]),
    script(12, ["so:s", "o", "", ": "], ["1", "2"], answer_limit=2),
    script(3, ["so", ":", "x"], ["\\{", "\\}", "}"]),  # a near miss; printed braces
    script(4, ["</s>", "so", "</s>", ": "], ["2", "</s>"]),  # EOS is a thought like any other, and ends an answer
    script(2, ["s", "o"], ["1", "2", "2"], answer_limit=3),  # cut off by the limit
    script(3, ["a"], ["}{"]),  # closed inside the token, though its sum is 0
    script(9, ["a", "b"], ["}"], bad_at=1),
]

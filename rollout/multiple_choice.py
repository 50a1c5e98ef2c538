"""Out of domain: HellaSwag, MMLU, ARC-Easy and ARC-Challenge, by the likelihood of each choice as a continuation.

    row of the hub --> Item (context, choices, the right one) --> per choice, token ids [T] of context + " " + choice
                   --> RolloutEngine.token_logprobs --> ItemScore --> accuracy, NLL per token of the right answer

The paper (section 4.2) reports accuracy and NLL per token of the correct answer on these sets and gives no prompt. Here both come
from the prompts of EleutherAI's lm-evaluation-harness 0.4 (tasks `hellaswag`, `mmlu`, `arc_easy`, `arc_challenge`, zero-shot as
they are by default). Nothing is sampled: the choice with the highest log-likelihood is the answer, as under greedy decoding.
"""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, RunError
from rollout.rows import Row, file_rows, fingerprint, hub_rows, repeated_id, say

DELIMITER = " "  # between context and choice: lm-eval's default target_delimiter
MMLU_LETTERS = ("A", "B", "C", "D")
ITEMS_PER_CALL = 64  # some 256 sequences: what an engine decodes at once
SPECIAL_TOKENS = 4  # more than any tokenizer puts around a text

TokenIds = NDArray[np.int32]
Encode = Callable[[str], list[int]]  # a tokenizer's `encode`, with the special tokens that it adds by itself
TokenLogprobs = Callable[[list[TokenIds]], Awaitable[list[NDArray[np.float32]]]]  # [T] each -> [T-1] each, of tokens 1 .. T-1
Parts = tuple[str, list[str], int]  # (context, choices, index of the right choice)


@dataclass(frozen=True, slots=True)
class Item:
    """One multiple-choice question as text."""

    index: int  # its place in the data set
    context: str
    choices: tuple[str, ...]  # without the delimiter before them
    gold: int  # which choice is right

    @property
    def fingerprint(self) -> str:
        """Of context, choices and the right one."""
        return fingerprint(self.context, *self.choices, str(self.gold))


@dataclass(frozen=True, slots=True)
class ItemScore:
    """What a model makes of one item: all that any of the metrics is computed from."""

    index: int
    gold: int
    log_likelihoods: tuple[float, ...]  # of each choice given the context, nats
    tokens: tuple[int, ...]  # in each choice, delimiter included
    characters: tuple[int, ...]  # in each choice, delimiter not included
    fingerprint: str  # of the item

    @property
    def correct(self) -> bool:
        """lm-eval's `acc`; of equally likely choices the first counts."""
        return int(np.argmax(self.log_likelihoods)) == self.gold

    @property
    def correct_norm(self) -> bool:
        """lm-eval's `acc_norm`: by log-likelihood per character."""
        return int(np.argmax(np.divide(self.log_likelihoods, self.characters))) == self.gold


@dataclass(frozen=True, slots=True)
class Summary:
    """A model on one data set."""

    items: int
    accuracy: float
    accuracy_norm: float  # equals `accuracy` on MMLU, whose choices are letters
    nll_per_token: float  # nats: over the right answers of all items together, so a long answer weighs more than a short one


@dataclass(frozen=True, slots=True)
class ChoiceSet:
    """Where the hub keeps a data set, and how its rows become items."""

    path: str
    config: str | None
    split: str
    parts: Callable[[Mapping[str, Any]], Parts]


# --- rows to items, as in lm_eval/tasks ------------------------------------------------------------------------------


def hellaswag_parts(row: Mapping[str, Any]) -> Parts:
    """tasks/hellaswag: the activity and the scene, continued by an ending. KeyError, ValueError for a row that is none."""
    context = f"{_text(row, 'activity_label')}: {_text(row, 'ctx_a')} {_text(row, 'ctx_b').capitalize()}"
    return _without_brackets(context), [_without_brackets(ending) for ending in _texts(row, "endings")], int(row["label"])


def mmlu_parts(row: Mapping[str, Any]) -> Parts:
    """tasks/mmlu/default: the question and its four choices, continued by a letter. KeyError, ValueError for a row that is none."""
    choices = _texts(row, "choices")
    listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(MMLU_LETTERS, choices, strict=True))
    subject = _text(row, "subject").replace("_", " ")
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return f"{about}{_text(row, 'question').strip()}\n{listed}\nAnswer:", list(MMLU_LETTERS), int(row["answer"])


def arc_parts(row: Mapping[str, Any]) -> Parts:
    """tasks/arc: the question, continued by the text of an answer. KeyError, ValueError for a row that is none."""
    labels, texts = _texts(row["choices"], "label"), _texts(row["choices"], "text")
    return f"Question: {_text(row, 'question')}\nAnswer:", texts, labels.index(_text(row, "answerKey"))


def _without_brackets(text: str) -> str:
    """HellaSwag's text without the marks that WikiHow pages left in it: tasks/hellaswag/utils.py."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise ValueError(f"field {field!r} holds a {type(row[field]).__name__}, expected text")
    return row[field]


def _texts(row: Mapping[str, Any], field: str) -> list[str]:
    if not isinstance(row[field], list) or not all(isinstance(text, str) and text.strip() for text in row[field]):
        raise ValueError(f"field {field!r}: expected a list of texts, none empty")
    return row[field]


SETS = {
    "hellaswag": ChoiceSet("Rowan/hellaswag", None, "validation", hellaswag_parts),
    "mmlu": ChoiceSet("cais/mmlu", "all", "test", mmlu_parts),
    "arc_easy": ChoiceSet("allenai/ai2_arc", "ARC-Easy", "test", arc_parts),
    "arc_challenge": ChoiceSet("allenai/ai2_arc", "ARC-Challenge", "test", arc_parts),
}
OWN = "choices"  # any other set: a file with ARC's fields (question, choices: {text, label}, answerKey)


def load_items(name: str, path: str | None = None, report: Callable[[str], None] = say) -> list[Item]:
    """The items of a set of SETS, from the hub or from a file with the hub's fields, or of OWN, in their order.

    InputError names the row at fault: nothing is left out. A row whose id was there before is such a fault. MMLU's rows have no id,
    and 27 of its 14,042 test items stand there twice: lm-eval counts them twice, so they stay, and `report` hears how many.
    """
    if name not in (*SETS, OWN):
        raise InputError(f"out of domain: unknown set {name!r}; expected one of {', '.join(SETS)}, or {OWN}=FILE")
    parts = arc_parts if name == OWN else SETS[name].parts
    items: list[Item] = []
    places: dict[str, str] = {}  # id -> where it stood first
    for where, row in _rows(name, path):
        try:
            context, choices, gold = parts(row)
        except KeyError as error:
            raise InputError(f"{where}: no field {error}, expected {name}'s; its fields are {', '.join(row) or 'none'}") from error
        except (ValueError, TypeError) as error:
            raise InputError(f"{where}: no item of {name}: {error}; mend the row or remove it") from error
        if not 0 <= gold < len(choices):
            raise InputError(f"{where}: choice {gold} is the right one, but there are {len(choices)}; mend the row or remove it")
        if "" in choices:
            raise InputError(f"{where}: choice '' is empty; mend the row or remove it")
        if fault := repeated_id(where, row, places):
            raise InputError(f"{where}: {fault}; mend the row or remove it")
        items.append(Item(len(items), context, tuple(choices), gold))
    if not items:
        raise InputError(f"{path or name}: holds no items of {name}")
    if repeated := len(items) - len({(item.context, item.choices) for item in items}):
        report(f"{path or name}: {repeated} of {len(items)} items repeat another, and count as often as they stand there")
    return items


def _rows(name: str, path: str | None) -> Iterable[Row]:
    if path is not None:
        return file_rows(Path(path).expanduser())
    if name == OWN:
        raise InputError(f"out of domain: {OWN}: expected {OWN}=FILE, a file with the fields question, choices and answerKey")
    source = SETS[name]
    return hub_rows(source.path, source.config)[source.split]


# --- items to token ids, as in lm_eval/api/model.py ------------------------------------------------------------------


def encode_choices(item: Item, encode: Encode) -> list[tuple[TokenIds, int]]:
    """Per choice: token ids [T] of context and choice, and how many of them, at the end, are the choice's.

    lm-eval's rule (TemplateLM._encode_pair): the whole text is encoded at once and cut where the context's own tokens end; spaces
    at the end of a context belong to the choice, because tokens begin with a space. InputError for a choice without tokens."""
    context = item.context.rstrip()
    start = len(encode(context))
    pairs = []
    for choice in item.choices:
        whole = encode(f"{item.context}{DELIMITER}{choice}")
        if not 0 < start < len(whole):
            raise InputError(f"out of domain: item {item.index}: no token of choice {choice!r} is its own; remove the item")
        pairs.append((np.array(whole, dtype=np.int32), len(whole) - start))
    return pairs


def require_items_fit(items: Iterable[Item], encode: Encode, max_model_len: int) -> None:
    """InputError for the longest item that an engine of `engine.max_model_len` cannot score; lm-eval cuts such a context off."""
    longest, at = 0, 0
    for item in items:
        texts = [f"{item.context}{DELIMITER}{choice}" for choice in item.choices]
        if max(len(text.encode()) for text in texts) + SPECIAL_TOKENS < max_model_len:
            continue  # no tokenizer makes more tokens than bytes
        tokens = max(len(encode(text)) for text in texts)
        longest, at = max((longest, at), (tokens, item.index))
    if longest >= max_model_len:
        raise InputError(
            f"engine.max_model_len = {max_model_len}: item {at} has {longest} tokens and vLLM wants room for one more; "
            f"set engine.max_model_len={longest + 1} or more"
        )


# --- token ids to scores ---------------------------------------------------------------------------------------------


async def score_items(items: Sequence[Item], encode: Encode, token_logprobs: TokenLogprobs) -> AsyncIterator[ItemScore]:
    """The scores in the items' order, as batches of ITEMS_PER_CALL come back. RunError for a log-likelihood that is no number."""
    for start in range(0, len(items), ITEMS_PER_CALL):
        batch = items[start : start + ITEMS_PER_CALL]
        pairs = [encode_choices(item, encode) for item in batch]
        logprobs = iter(await token_logprobs([ids for choices in pairs for ids, _ in choices]))
        for item, choices in zip(batch, pairs, strict=True):
            of_choices = [next(logprobs)[-length:] for _, length in choices]
            score = ItemScore(
                index=item.index,
                gold=item.gold,
                log_likelihoods=tuple(float(np.sum(values, dtype=np.float64)) for values in of_choices),
                tokens=tuple(len(values) for values in of_choices),
                characters=tuple(map(len, item.choices)),
                fingerprint=item.fingerprint,
            )
            if not np.isfinite(score.log_likelihoods).all():
                raise RunError(f"out of domain: item {item.index}: log-likelihoods {score.log_likelihoods} are not finite")
            yield score


def summarise(scores: Sequence[ItemScore]) -> Summary:
    """The metrics over at least one item; ValueError for none."""
    if not scores:
        raise ValueError("summarise: expected at least one item, got none")
    return Summary(
        items=len(scores),
        accuracy=float(np.mean([score.correct for score in scores])),
        accuracy_norm=float(np.mean([score.correct_norm for score in scores])),
        nll_per_token=-sum(s.log_likelihoods[s.gold] for s in scores) / sum(s.tokens[s.gold] for s in scores),
    )

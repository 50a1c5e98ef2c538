"""Contexts and choices are lm-eval's, token by token, and the bookkeeping of log-probs agrees with transformers."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer, LlamaForCausalLM

from configs.errors import InputError, RunError
from rollout import multiple_choice
from rollout.multiple_choice import Item, ItemScore, encode_choices, load_items, require_items_fit, score_items, summarise
from tests.shared_data import SHARED, needs_shared
from tests.tiny_model import make_tiny_llama

# Rows as on the hub, and what lm-eval 0.4 makes of them: written from its yamls (doc_to_text, doc_to_choice, description) by hand.
HELLASWAG = [
    (
        {
            "activity_label": "Roof shingle removal",
            "ctx_a": "A man is sitting on a roof.",
            "ctx_b": "he",
            "endings": ["is using wrap to wrap a pair of skis.", "starts pulling up roofing on a roof."],
            "label": "1",
        },
        "Roof shingle removal: A man is sitting on a roof. He",
        ("is using wrap to wrap a pair of skis.", "starts pulling up roofing on a roof."),
        1,
    ),
    (
        {
            "activity_label": "Personal Care and Style",
            "ctx_a": "[header] How to dress [title] Look at your closet. [step] Take stock.",
            "ctx_b": "",
            "endings": ["[substeps] Keep [title] Shop. ", "Buy  one [step] hat."],
            "label": "0",
        },
        "Personal Care and Style: How to dress. Look at your closet. Take stock.",
        (" Keep. Shop.", "Buy one hat."),  # the space before a mark at the start stays
        0,
    ),
    (
        {
            "activity_label": "Sport",
            "ctx_a": "They play.",
            "ctx_b": "the BALL [substeps]",  # the rest of a capitalised text is lower case, and a mark leaves its space
            "endings": ["flies.", "rolls."],
            "label": 0,
        },
        "Sport: They play. The ball ",
        ("flies.", "rolls."),
        0,
    ),
]
MMLU = [
    (
        {"question": " Which is prime?\n", "subject": "abstract_algebra", "choices": ["4", "6 ", "7", "8"], "answer": 2},
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "Which is prime?\nA. 4\nB. 6 \nC. 7\nD. 8\nAnswer:",
        ("A", "B", "C", "D"),
        2,
    ),
    (
        {
            "question": "Who wrote it?",
            "subject": "us_foreign_policy",
            "choices": ["Wilson", "Kennan", "Nixon", "Bush"],
            "answer": 1,
        },
        "The following are multiple choice questions (with answers) about us foreign policy.\n\n"
        "Who wrote it?\nA. Wilson\nB. Kennan\nC. Nixon\nD. Bush\nAnswer:",
        ("A", "B", "C", "D"),
        1,
    ),
]
ARC = [
    (
        {
            "id": "Mercury_1",
            "question": "Which falls faster?",
            "choices": {"text": ["a feather", 'a "stone" isn\'t {light}'], "label": ["A", "B"]},
            "answerKey": "B",
        },
        "Question: Which falls faster?\nAnswer:",
        ("a feather", 'a "stone" isn\'t {light}'),
        1,
    ),
    (
        {
            "id": "NYSED_2",
            "question": "What is ice?",
            "choices": {"text": ["rock", "water", "air"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Question: What is ice?\nAnswer:",
        ("rock", "water", "air"),
        1,
    ),
]
EXPECTED = [("hellaswag", HELLASWAG), ("mmlu", MMLU), ("arc_easy", ARC), ("arc_challenge", ARC)]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- items -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "expected"), EXPECTED)
def test_contexts_and_choices_are_those_of_lm_eval(tmp_path: Path, name: str, expected: list[Any]) -> None:
    items = load_items(name, write(tmp_path / "rows.jsonl", *(row for row, *_ in expected)))
    assert [(i.context, i.choices, i.gold) for i in items] == [(context, choices, gold) for _, context, choices, gold in expected]
    assert [i.index for i in items] == list(range(len(expected)))


@pytest.mark.parametrize(
    ("name", "row", "change", "message"),
    [
        ("mmlu", MMLU[0][0], {"answer": 4}, ":2: choice 4 is the right one, but there are 4"),
        ("mmlu", MMLU[0][0], {"choices": ["1", "2", "3"]}, ":2: no item of mmlu"),
        ("mmlu", MMLU[0][0], {"question": None}, "field 'question' holds a NoneType, expected text"),
        ("hellaswag", HELLASWAG[0][0], {"label": ""}, ":2: no item of hellaswag"),
        ("hellaswag", HELLASWAG[0][0], {"endings": "is"}, "field 'endings': expected a list of texts"),
        ("hellaswag", HELLASWAG[0][0], {"endings": ["is", "[x]"]}, "choice '' is empty"),
        ("arc_easy", ARC[0][0], {"answerKey": "C"}, ":2: no item of arc_easy"),
        ("arc_easy", ARC[0][0], {"choices": ["a", "b"]}, ":2: no item of arc_easy"),
        (
            "arc_easy",
            {"question": "Why?"},
            {"answerKey": "A"},
            "no field 'choices', expected arc_easy's; its fields are question, answer",
        ),
    ],
)
def test_a_row_that_is_no_item_is_refused_with_its_place(
    tmp_path: Path, name: str, row: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    good = dict(EXPECTED)[name][0][0]
    with pytest.raises(InputError) as refused:
        load_items(name, write(tmp_path / "rows.jsonl", good, row | change))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_an_id_that_was_there_before_is_refused(tmp_path: Path) -> None:
    rows = [row for row, *_ in ARC]
    with pytest.raises(InputError, match=r"rows.jsonl:3: id 'Mercury_1' is also that of .*rows.jsonl:1; mend the row or remove it"):
        load_items("arc_easy", write(tmp_path / "rows.jsonl", *rows, rows[1] | {"id": "Mercury_1"}))


def test_items_without_ids_that_repeat_are_counted_and_said(tmp_path: Path) -> None:
    said: list[str] = []
    path = write(tmp_path / "rows.jsonl", *(row for row, *_ in MMLU), MMLU[0][0])
    assert len(load_items("mmlu", path, said.append)) == 3  # as lm-eval counts them
    assert said == [f"{path}: 1 of 3 items repeat another, and count as often as they stand there"]
    load_items("mmlu", write(tmp_path / "rows.jsonl", *(row for row, *_ in MMLU)), said.append)
    assert len(said) == 1


def test_no_items_and_unknown_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no items of mmlu"):
        load_items("mmlu", write(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="unknown set 'arc'; expected one of hellaswag, mmlu, arc_easy, arc_challenge"):
        load_items("arc")


@needs_shared
@pytest.mark.parametrize(
    ("name", "file", "count"),
    [
        ("hellaswag", "hellaswag/validation.jsonl.gz", 10042),
        ("mmlu", "mmlu/test.jsonl.gz", 14042),
        ("mmlu", "mmlu/dev.jsonl", 285),
        ("arc_easy", "arc/ARC-Easy/test.jsonl", 2376),
        ("arc_easy", "arc/ARC-Easy/validation.jsonl", 570),
        ("arc_challenge", "arc/ARC-Challenge/test.jsonl", 1172),
        ("arc_challenge", "arc/ARC-Challenge/validation.jsonl", 299),
    ],
)
def test_the_real_sets_load_with_their_official_counts(name: str, file: str, count: int) -> None:
    assert len(load_items(name, str(SHARED / file))) == count


@needs_shared
def test_the_first_real_items() -> None:
    hellaswag = load_items("hellaswag", str(SHARED / "hellaswag/validation.jsonl.gz"))[0]
    assert hellaswag.context == "Roof shingle removal: A man is sitting on a roof. He"
    assert (hellaswag.choices[hellaswag.gold], hellaswag.gold) == ("starts pulling up roofing on a roof.", 3)
    mmlu = load_items("mmlu", str(SHARED / "mmlu/test.jsonl.gz"))[0]
    assert mmlu.context == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\nFind the degree for the given field "
        "extension Q(sqrt(2), sqrt(3), sqrt(18)) over Q.\nA. 0\nB. 4\nC. 2\nD. 6\nAnswer:"
    )
    assert mmlu.choices[mmlu.gold] == "B"
    arc = load_items("arc_easy", str(SHARED / "arc/ARC-Easy/test.jsonl"))[0]
    assert arc.context == "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:"
    assert arc.choices[arc.gold] == "Sunlight is the source of energy for nearly all ecosystems."


# --- tokens and scores -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Any]:
    folder = make_tiny_llama(tmp_path_factory.mktemp("tiny"))
    return LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def items_of_all_sets() -> list[Item]:
    rows = [(name, row) for name, expected in EXPECTED for row, *_ in expected]
    parts = [multiple_choice.SETS[name].parts(row) for name, row in rows]
    return [Item(i, context, tuple(choices), gold) for i, (context, choices, gold) in enumerate(parts)]


def engine_of(model: LlamaForCausalLM, calls: list[int]) -> Callable[[list[NDArray[np.int32]]], Any]:
    """What RolloutEngine.token_logprobs computes, by transformers: [T] each -> [T-1] each."""

    @torch.no_grad()
    def one(ids: NDArray[np.int32]) -> NDArray[np.float32]:
        logprobs = model(torch.from_numpy(ids).long()[None]).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, torch.from_numpy(ids[1:]).long()[:, None])[:, 0].numpy()

    async def token_logprobs(sequences: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        calls.append(len(sequences))
        return [one(ids) for ids in sequences]

    return token_logprobs


def score_all(items: list[Item], encode: Callable[[str], list[int]], token_logprobs: Any) -> list[ItemScore]:
    async def collect() -> list[ItemScore]:
        return [score async for score in score_items(items, encode, token_logprobs)]

    return asyncio.run(collect())


def test_a_choice_begins_after_the_last_visible_character_of_its_context(tiny: tuple[LlamaForCausalLM, Any]) -> None:
    tokenizer = tiny[1]
    for item in items_of_all_sets():
        for choice, (ids, length) in zip(item.choices, encode_choices(item, tokenizer.encode), strict=True):
            assert tokenizer.decode(ids[:-length]) == item.context.rstrip()
            assert tokenizer.decode(ids[-length:]) == item.context[len(item.context.rstrip()) :] + " " + choice


def test_a_tokenizers_own_special_tokens_stay_with_the_context(tiny: tuple[LlamaForCausalLM, Any]) -> None:
    tokenizer, item = tiny[1], Item(0, "Question: 1?\nAnswer:", ("one", "two"), 0)
    plain = encode_choices(item, tokenizer.encode)
    begun = encode_choices(item, lambda text: [1, *tokenizer.encode(text)])
    assert [(ids.tolist(), length) for ids, length in begun] == [([1, *ids], length) for ids, length in plain]


def test_scores_are_sums_of_log_probs_by_transformers(tiny: tuple[LlamaForCausalLM, Any]) -> None:
    model, tokenizer = tiny
    items = items_of_all_sets()
    scores = score_all(items, tokenizer.encode, engine_of(model, []))
    for item, score in zip(items, scores, strict=True):
        for c, choice in enumerate(item.choices):
            context_ids = tokenizer.encode(item.context.rstrip())
            ids = tokenizer.encode(f"{item.context} {choice}")
            labels = torch.tensor([[-100] * len(context_ids) + ids[len(context_ids) :]])
            loss = model(torch.tensor([ids]), labels=labels).loss.item()  # transformers' own shift and mean over the choice
            assert score.tokens[c] == len(ids) - len(context_ids)
            assert score.log_likelihoods[c] == pytest.approx(-loss * score.tokens[c], abs=1e-4)
            assert score.characters[c] == len(choice)
        assert (score.index, score.gold) == (item.index, item.gold)


def test_batches_keep_the_items_order(tiny: tuple[LlamaForCausalLM, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny
    items, calls = items_of_all_sets(), list[int]()
    whole = score_all(items, tokenizer.encode, engine_of(model, calls))
    monkeypatch.setattr(multiple_choice, "ITEMS_PER_CALL", 2)
    assert score_all(items, tokenizer.encode, engine_of(model, calls)) == whole
    assert calls[0] == sum(len(item.choices) for item in items) and len(calls) == 1 + math.ceil(len(items) / 2)


def test_metrics_of_known_scores() -> None:
    scores = [
        ItemScore(0, 0, (-1.0, -2.0), tokens=(1, 4), characters=(2, 10), fingerprint=""),  # right, not per character: -0.5 < -0.2
        ItemScore(1, 1, (-3.0, -6.0), tokens=(2, 3), characters=(5, 20), fingerprint=""),  # wrong, but right per character
        ItemScore(2, 0, (-5.0, -5.0), tokens=(6, 1), characters=(4, 4), fingerprint=""),  # a tie counts for the first
        ItemScore(3, 1, (-5.0, -5.0), tokens=(6, 2), characters=(4, 4), fingerprint=""),
    ]
    summary = summarise(scores)
    assert (summary.items, summary.accuracy, summary.accuracy_norm) == (4, 0.5, 0.5)
    assert summary.nll_per_token == pytest.approx((1 + 6 + 5 + 5) / (1 + 3 + 6 + 2))


def test_what_cannot_be_scored_is_refused(tiny: tuple[LlamaForCausalLM, Any]) -> None:
    item = Item(7, "Question: 1?\nAnswer:", ("one", "two"), 0)
    encode = tiny[1].encode
    length = len(encode("Question: 1?\nAnswer: one"))
    require_items_fit([item], encode, length + 1)
    with pytest.raises(InputError, match=rf"item 7 has {length} tokens .* set engine.max_model_len={length + 1}"):
        require_items_fit([item], encode, length)
    with pytest.raises(InputError, match="no token of choice 'one' is its own"):
        encode_choices(item, lambda text: [1, 2])
    with pytest.raises(ValueError, match="at least one item"):
        summarise([])

    async def broken(sequences: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        return [np.full(len(ids) - 1, np.nan, dtype=np.float32) for ids in sequences]

    with pytest.raises(RunError, match=r"item 7: log-likelihoods .* not finite"):
        score_all([item], encode, broken)

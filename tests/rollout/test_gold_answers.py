"""The reward agrees with the reference solutions of GSM8K and MATH-500, and reads numbers however they are written."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

import pytest

from rollout.reward import Scorer, Verdict
from rollout.tasks import load_task
from rollout.verifier import equivalent
from tests.shared_data import SHARED, needs_shared

RIGHT, WRONG = Verdict(100.0, True), Verdict(10.0, False)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(workers=2, deadline_s=10.0) as scorer:
        yield scorer


def score(scorer: Scorer, golds: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    """The verdicts on the answers, each boxed."""

    async def all_at_once() -> list[Verdict]:
        return await asyncio.gather(*(scorer.score(g, a + "}", True) for g, a in zip(golds, answers, strict=True)))

    return asyncio.run(all_at_once())


def not_as(expected: Verdict, golds: Sequence[str], answers: Sequence[str], verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(g, a) for g, a, verdict in zip(golds, answers, verdicts, strict=True) if verdict != expected]


def gsm8k_answers() -> list[str]:
    return [p.answer for p in load_task({"path": str(SHARED / "gsm8k/test.jsonl"), "question": "question", "answer": "answer"})]


def math500_answers(field: str) -> list[str]:
    return [p.answer for p in load_task({"path": str(SHARED / "math500/test.jsonl"), "question": "problem", "answer": field})]


def bare(answer: str) -> str:
    """MATH answers that mean the same become the same text: without layout, units and the variable that is asked for."""
    return re.sub(r"^[a-z]=|\\left|\\right|\\text\{.*?\}|\\d?frac|\\[,;!$ ]|[{}\s]", "", answer)


@needs_shared
@pytest.mark.slow
def test_gsm8k_gold_answers_are_right_in_any_notation(scorer: Scorer) -> None:
    golds = gsm8k_answers()
    assert len(golds) == 1319
    for notation in ("{:d}", "{:,d}", "{:d}.0", "\\${:,d}", "{:d}\\text{{ dollars}}"):
        answers = [notation.format(int(g)) for g in golds]
        assert not_as(RIGHT, golds, answers, score(scorer, golds, answers)) == []


@needs_shared
@pytest.mark.slow
def test_gsm8k_neighbours_and_other_answers_are_wrong(scorer: Scorer) -> None:
    golds = gsm8k_answers()
    plus_one = [f"{int(g) + 1}.0" for g in golds]  # with a decimal point, so that math-verify has to see the difference
    assert not_as(WRONG, golds, plus_one, score(scorer, golds, plus_one)) == []
    others = [(g, o) for g, o in zip(golds, golds[1:] + golds[:1], strict=True) if Fraction(g) != Fraction(o)]
    assert len(others) > 1250
    golds, others_answers = zip(*others, strict=True)
    assert not_as(WRONG, golds, others_answers, score(scorer, golds, others_answers)) == []


@needs_shared
@pytest.mark.slow
def test_math500_gold_answers_are_right(scorer: Scorer) -> None:
    golds, of_solutions = math500_answers("answer"), math500_answers("solution")
    assert len(golds) == 500
    assert not_as(RIGHT, golds, golds, score(scorer, golds, golds)) == []
    assert not_as(RIGHT, golds, of_solutions, score(scorer, golds, of_solutions)) == []
    assert [g for g in golds if not equivalent(g, g)] == []  # by math-verify, which `score` spares where texts are the same


@needs_shared
@pytest.mark.slow
def test_math500_neighbours_and_other_answers_are_wrong(scorer: Scorer) -> None:
    golds = math500_answers("answer")
    plus_one = [f"{g} + 1" for g in golds]
    assert not_as(WRONG, golds, plus_one, score(scorer, golds, plus_one)) == []
    others = [(g, o) for g, o in zip(golds, golds[1:] + golds[:1], strict=True) if bare(g) != bare(o)]
    assert len(others) > 490
    golds, others_answers = zip(*others, strict=True)
    assert not_as(WRONG, golds, others_answers, score(scorer, golds, others_answers)) == []


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("-3", "\N{MINUS SIGN}3"),
        ("-3", "\N{EN DASH}3"),
        ("3", "\N{FULLWIDTH DIGIT THREE}"),
        ("18", "\N{ZERO WIDTH SPACE}18\N{BYTE ORDER MARK}"),
        ("18", "18."),
        ("12345", "12\\,345"),
        ("12345", "12{,}345"),
        ("12345", "12,\\!345"),
        ("12345", "12\N{NARROW NO-BREAK SPACE}345"),
        ("\\frac{1}{2}", "½"),
        ("\\frac{7}{2}", "3½"),
        ("\\frac{1}{2}", "1\N{FRACTION SLASH}2"),
        ("x^2", "x²"),
        ("2\\sqrt{2}", "2√2"),
        ("2\\pi", "2π"),
        ("90^\\circ", "90°"),
        ("-\\infty", "\N{MINUS SIGN}∞"),
        ("6", "2·3"),
        ("6", "2\N{MULTIPLICATION SIGN}3"),
        ("x \\le 3", "x≤3"),
        ("50\\%", "50%"),
    ],
)
def test_unicode_and_latex_spellings_of_a_right_answer_are_right(gold: str, answer: str) -> None:
    assert equivalent(gold, answer) and equivalent(answer, gold)
    assert not equivalent("7", answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("3", "3\N{SUPERSCRIPT TWO}"), ("100", "100, 200"), ("100200", "100,\\ 200"), ("x^{12}", "x²"), ("1.5", "15."), ("3", "0.3.")],
)
def test_spellings_of_other_numbers_stay_wrong(gold: str, answer: str) -> None:
    assert not equivalent(gold, answer)

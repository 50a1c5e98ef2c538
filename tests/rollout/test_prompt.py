"""The paper's prompt holds the question and nothing else changes; the forced texts fit together."""

import pytest

from configs.errors import InputError
from rollout.prompt import PAPER_PROMPT, PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, STOP_PHRASE, render


def test_the_paper_prompt_asks_the_question_and_ends_at_the_assistant() -> None:
    text = render("paper", "What is 12 + 5?")
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant solves it.")
    assert "provides the final answer in \\boxed{}. The assistant must" in text
    assert "[detailed reasoning] The final answer is: \\boxed{[answer]}.' User:" in text
    assert text.endswith("' User: What is 12 + 5? Assistant:")
    assert text == PAPER_PROMPT.replace("{question}", "What is 12 + 5?")


def test_braces_of_latex_survive_in_template_and_question() -> None:
    assert render("{x} \\boxed{1} {question} %s {0}", "\\frac{1}{2}{question}") == "{x} \\boxed{1} \\frac{1}{2}{question} %s {0}"


def test_both_prefills_open_the_same_box() -> None:
    assert PREFILL_AT_LIMIT == STOP_PHRASE + PREFILL_AFTER_PHRASE == "The final answer is: \\boxed{"


@pytest.mark.parametrize("template", ["papre", "", "User: {Question} Assistant:"])
def test_a_template_without_a_place_for_the_question_is_refused(template: str) -> None:
    with pytest.raises(InputError, match=r"task\.prompt: .*\{question\}"):
        render(template, "?")

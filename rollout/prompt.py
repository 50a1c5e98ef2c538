"""The paper's prompt and the two texts around the answer (arXiv 2509.19170v2, section 4.1): plain text, no chat template."""

from configs.errors import InputError

PAPER_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first shows the complete reasoning process step by step, then provides the final answer in \\boxed{}. "
    "The assistant must always follow the format: "
    "'User: [question] Assistant: [detailed reasoning] The final answer is: \\boxed{[answer]}.' "
    "User: {question} Assistant:"
)
TEMPLATES = {"paper": PAPER_PROMPT}

STOP_PHRASE = "The final answer is: "  # the CoT ends where its shadow text ends with this
PREFILL_AFTER_PHRASE = "\\boxed{"  # what is forced then
PREFILL_AT_LIMIT = STOP_PHRASE + PREFILL_AFTER_PHRASE  # what is forced after L tokens without the phrase

PLACEHOLDER = "{question}"


def template(name_or_text: str) -> str:
    """The template of a `task.prompt`: by name, or the text itself when it has a place for the question; else InputError."""
    text = TEMPLATES.get(name_or_text, name_or_text)
    if PLACEHOLDER not in text:
        raise InputError(
            f"task.prompt: {name_or_text!r} is neither a template's name ({', '.join(TEMPLATES)}) nor a text with {PLACEHOLDER}"
        )
    return text


def render(name_or_text: str, question: str) -> str:
    """The prompt text for one question. Plain replacement: LaTeX braces in template and question stay as they are."""
    return template(name_or_text).replace(PLACEHOLDER, question)

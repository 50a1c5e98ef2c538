"""`softrl show`: what a model thought on one problem, with the mixture behind each soft token.

    RUN/rollouts/test_000040_gsm8k_test.* (transcripts.py) --> Transcript of each setting --> terminal, or one HTML page

The text of a soft thought is its shadow: the most probable token of each mixture. What the model was fed is the whole mixture
and noise; the top of the mixture and its entropy say how much of it the shadow hides.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.transcripts import FOLDER, kept_samples
from configs.errors import InputError
from configs.schema import EVAL_SETTINGS
from rollout.eval_statistics import mixture_profile
from rollout.files import RolloutFile, list_rollouts, replace_file
from rollout.models import load_tokenizer
from rollout.trajectory import Sample, Trajectory

TOP = 5  # tokens of a mixture that are shown
HEAT = {0.1: "", 0.5: "yellow", 1.5: "dark_orange", float("inf"): "bold red"}  # entropies below so many nats: their style


@dataclass(frozen=True, slots=True)
class Step:
    """One token of the thought; a hard one has only its text."""

    text: str  # of the shadow token; empty where a character takes several tokens, which stands with the last
    entropy: float = 0.0  # nats
    support_size: int = 1  # tokens in the mixture
    dropped_mass: float = 0.0
    top: Sequence[tuple[str, float]] = ()  # the likeliest tokens and their weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """One sample as text."""

    evaluation: str  # such as test_000040_gsm8k_test
    problem: int
    setting: str
    soft: bool
    prompt: str
    steps: Sequence[Step]
    prefill: str
    answer: str
    verdict: str


def show(run: Path, problem: int, setting: str | None, evaluation: str | None, html: Path | None) -> None:
    """Print the transcripts of a problem, or write them to `html`: of all settings or one, of the newest evaluation or the named.

    Raises InputError when there is no such transcript, RunError when `html` cannot be written.
    """
    console = Console()
    transcripts, others = find_transcripts(run, problem, setting, evaluation)
    if html is not None:
        from cluster.show_html import page

        text = page(run.resolve().name, transcripts)
        replace_file(html, lambda partial: partial.write_text(text, encoding="utf-8"))
        console.print(Text(f"wrote {html}"), soft_wrap=True)
    for transcript in transcripts if html is None else ():
        print_transcript(console, transcript)
    if others:
        console.print(Text(f"other evaluations, by --evaluation: {', '.join(others)}", style="dim"), soft_wrap=True)


def find_transcripts(run: Path, problem: int, setting: str | None, evaluation: str | None) -> tuple[list[Transcript], list[str]]:
    """The transcripts, in the order of EVAL_SETTINGS, and the names of the run's other evaluations."""
    folder = run / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{run}: holds no transcripts (no {folder}); `softrl train` and `softrl eval` leave them in a run's folder"
        )
    files = {file.path.stem: file for file in list_rollouts(folder)}
    if evaluation is not None and evaluation not in files:
        raise InputError(f"{folder}: no evaluation {evaluation}; expected one of {', '.join(files)}")
    name = evaluation or newest(list(files))
    kept = kept_samples(folder, name)
    of_problem = {kind: kept[problem, kind] for kind in EVAL_SETTINGS if (problem, kind) in kept}
    if not of_problem:
        problems = ", ".join(map(str, sorted({index for index, _ in kept})))
        raise InputError(f"{folder / name}: problem {problem} was not kept; expected one of {problems}")
    if setting is not None and setting not in of_problem:
        raise InputError(f"{folder / name}: problem {problem} has no {setting}; expected one of {', '.join(of_problem)}")
    chosen = of_problem if setting is None else {setting: of_problem[setting]}
    found = _as_text(files[name], chosen)
    return found, [other for other in files if other != name]


def newest(names: Sequence[str]) -> str:
    """The evaluation of the latest weights; of several the test, then the first by name."""

    def rank(name: str) -> tuple[int, bool, str]:
        match = re.search(r"_(\d{6})", name)
        return -int(match[1]) if match else 1, not name.startswith("test_"), name

    return min(names, key=rank)


# --- tokens to text --------------------------------------------------------------------------------------------------


def _as_text(file: RolloutFile, samples: dict[str, Sample]) -> list[Transcript]:
    tokenizer = load_tokenizer(file.model)
    return [transcript_of(tokenizer, file.path.stem, setting, sample) for setting, sample in samples.items()]


def transcript_of(tokenizer: Any, evaluation: str, setting: str, sample: Sample) -> Transcript:
    """A kept sample as text."""
    trajectory = sample.trajectory
    right = "right" if sample.correct else "boxed but wrong" if sample.reward > 0 else "nothing boxed"
    ended = "the thought ended itself" if trajectory.phrase_found else "the thought was cut at its limit"
    return Transcript(
        evaluation=evaluation,
        problem=trajectory.prompt_index,
        setting=setting,
        soft=bool(trajectory.support_offsets[-1]),
        prompt=decoded(tokenizer, trajectory.prompt_ids.tolist()),
        steps=_steps(tokenizer, trajectory),
        prefill=decoded(tokenizer, trajectory.prefill_ids.tolist()),
        answer=decoded(tokenizer, trajectory.answer_ids.tolist()),
        verdict=f"{right} (reward {sample.reward:g}); {ended} after {trajectory.cot_length} tokens"
        + ("; the check of the answer timed out" if sample.timed_out else ""),
    )


def _steps(tokenizer: Any, trajectory: Trajectory) -> list[Step]:
    texts = pieces(tokenizer, int(trajectory.prompt_ids[-1]), trajectory.shadow_ids.tolist())
    if trajectory.support_offsets[-1] == 0:
        return [Step(text) for text in texts]
    profile = mixture_profile(trajectory)
    steps = []
    for t, text in enumerate(texts):
        inside = slice(trajectory.support_offsets[t], trajectory.support_offsets[t + 1])
        ids, probs = trajectory.support_ids[inside], trajectory.support_probs[inside]
        likeliest = np.argsort(-probs, kind="stable")[:TOP]
        top = [(decoded(tokenizer, [int(ids[i])]), float(probs[i])) for i in likeliest]
        steps.append(Step(text, float(profile.entropy[t]), len(ids), float(trajectory.dropped_mass[t]), top))
    return steps


def pieces(tokenizer: Any, before: int, ids: Sequence[int]) -> list[str]:
    """The text that each token adds to the text of those before it; `before` is the id that stands in front of them all.

    Decoding tokens one by one would lose the space in front of a word and every character that takes several tokens.
    """
    shown, texts = decoded(tokenizer, [before]), []
    for count in range(1, len(ids) + 1):
        whole = decoded(tokenizer, [before, *ids[:count]])
        unfinished = whole.endswith("\ufffd") and count < len(ids)
        texts.append("" if unfinished else whole[len(shown) :])
        shown = shown if unfinished else whole
    return texts


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Exactly what the ids stand for."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --- on a terminal ---------------------------------------------------------------------------------------------------


def print_transcript(console: Console, transcript: Transcript) -> None:
    """Head, prompt, shadow text with the uncertain tokens coloured, answer, and a row for each soft step."""
    console.rule(Text(f"{transcript.setting}: problem {transcript.problem} of {transcript.evaluation}"), align="left")
    console.print(Text(transcript.verdict, style="bold"), soft_wrap=True)
    console.print(Text(transcript.prompt, style="dim"))
    thought = Text()
    for step in transcript.steps:
        thought.append(step.text, style=heat(step.entropy))
    console.print(thought + Text(transcript.prefill, style="dim") + Text(transcript.answer, style="bold"))
    if not transcript.soft:
        return
    table = Table(caption="entropy in nats; support: tokens in the mixture", caption_justify="left")
    for column in ("step", "shadow", "entropy", "support"):
        table.add_column(column, justify="left" if column == "shadow" else "right", no_wrap=True)
    table.add_column("top of the mixture")
    for t, step in enumerate(transcript.steps):
        mixture = "  ".join(f"{token!r} {weight:.3f}" for token, weight in step.top)
        cells = str(t), repr(step.text), f"{step.entropy:.3f}", str(step.support_size), mixture
        table.add_row(*(Text(cell, style=heat(step.entropy)) for cell in cells))
    console.print(table)


def heat(entropy: float) -> str:
    """The style of a token by its entropy."""
    return next(style for below, style in HEAT.items() if entropy < below)

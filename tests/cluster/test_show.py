"""A transcript loses no character and no weight, and its page stands alone."""

import io
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cluster.show import TOP, Transcript, find_transcripts, newest, pieces, print_transcript, transcript_of
from cluster.show_html import page
from cluster.transcripts import KEPT_PROBLEMS, Transcripts
from configs.errors import InputError
from configs.load import load_config
from configs.schema import EVAL_SETTINGS
from rollout.trajectory import Sample, SampleRequest
from tests.cluster.engines import byte_tokenizer, trajectory

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TOKENIZER = byte_tokenizer()
CHROMIUM = shutil.which("chromium")
BAD = "<!doctype html><title>bad</title><script>console.error('broken')</script>"


def sample(setting: str, problem: int = 0, index: int = 0, text: str = "7", cot: int = 3) -> Sample:
    mode, tau, noisy = EVAL_SETTINGS[setting]
    request = SampleRequest(
        prompt_ids=np.array(TOKENIZER.encode("Why? <b>"), np.int32),
        prompt_index=problem,
        sample_index=index,
        mode=mode,
        tau=tau,
        sigma=0.25 if noisy else 0.0,
        seed=1,
        max_cot_tokens=8,
        max_answer_tokens=4,
        answer_temperature=0.0,
    )
    drawn = trajectory(request, np.array(TOKENIZER.encode(text + "}"), np.int32), cot)
    return Sample(trajectory=drawn, reward=10.0, correct=False, answer_text=text)


def transcript(setting: str, text: str = "7", cot: int = 3) -> Transcript:
    return transcript_of(TOKENIZER, "test_000004_gsm8k_test", setting, sample(setting, text=text, cot=cot))


def keep(run: Path, name: str, problems: int = 2) -> None:
    transcripts = Transcripts(load_config(DEMO), run / "rollouts", name, 4, go_on=False)
    for problem in range(problems):
        for setting in ("soft_sample", "hard_greedy"):
            for index in range(2):
                transcripts.keep(setting, sample(setting, problem, index))


@pytest.mark.parametrize("text", ["an é and 数学", "\\frac12 \U0001f600!", "a  b\n c", "cut \u00e9"])
def test_pieces_are_the_text_and_no_character_is_torn(text: str) -> None:
    ids = TOKENIZER.encode(text)
    found = pieces(TOKENIZER, ids[0], ids[1:])
    assert len(found) == len(ids) - 1 and "".join(found) == text[1:]
    assert not any("\ufffd" in piece for piece in found)


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    ids = TOKENIZER.encode("aé")[:-1]
    assert pieces(TOKENIZER, ids[0], ids[1:]) == ["\ufffd"]


def test_a_soft_step_says_its_entropy_and_the_top_of_its_mixture() -> None:
    found = transcript("soft_sample")
    assert found.soft and [step.text for step in found.steps] == ["A", "B", "C"]
    for step, (first, second) in zip(found.steps, ("AB", "BC", "CD"), strict=True):
        assert list(step.top) == [(first, pytest.approx(0.75)), (second, pytest.approx(0.25))]
        assert step.entropy == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)) and step.support_size == 2
    assert (found.prefill, found.answer) == ("BC", "7}")
    assert "boxed but wrong (reward 10)" in found.verdict and "after 3 tokens" in found.verdict
    assert len(found.steps[0].top) <= TOP


def test_a_hard_thought_is_text_alone() -> None:
    found = transcript("hard_greedy")
    assert not found.soft and [(step.text, step.top) for step in found.steps] == [("A", ()), ("B", ()), ("C", ())]
    console = Console(width=100, record=True, file=io.StringIO())
    print_transcript(console, found)
    assert "mixture" not in console.export_text()


def test_a_terminal_shows_what_looks_like_markup_as_it_is() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_transcript(console, transcript("soft_greedy", text="[red]x[/]"))
    shown = console.export_text()
    assert "[red]x[/]}" in shown and "'A' 0.750  'B' 0.250" in shown and "0.562" in shown


class Tags(HTMLParser):
    """What a page is made of; fails on a tag that is closed in the wrong place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name == "href"]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    text = page("first", [transcript("soft_sample", text="<i>&"), transcript("hard_sample"), transcript("fuzzy_greedy", cot=0)])
    found = Tags(text)
    assert found.open == [] and "<i>&}" in found.text and "Why? <b>" in found.text
    assert not {"script", "link", "img", "iframe", "i", "b"} & set(found.tags) and not {"src", "onclick"} & found.attributes
    assert found.links == ["#soft_sample", "#hard_sample", "#fuzzy_greedy"] and all(
        f'id="{link[1:]}"' in text for link in found.links
    )
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert found.tags.count("section") == 3 and found.tags.count("svg") == 1  # a chart where there are soft steps
    assert "--h:0.28" in text  # 0.562 of 2 nats


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_browser_takes_the_page_without_complaint(tmp_path: Path) -> None:
    for name, text in (
        ("good", page("first", [transcript("soft_sample", text="<i>&é数学"), transcript("hard_sample")])),
        ("bad", BAD),
    ):
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
    dom, complaints = rendered(tmp_path / "good.html", tmp_path / "profile")
    found = Tags(dom)
    for shown in ("first: problem 0 of test_000004_gsm8k_test", "Why? <b>", "<i>&é数学}", "0.562 nats", "All steps", "'A' 0.750"):
        assert shown in found.text
    assert complaints == []
    assert "broken" in rendered(tmp_path / "bad.html", tmp_path / "profile")[1][0]  # a complaint would have been heard


def rendered(html: Path, profile: Path) -> tuple[str, list[str]]:
    """What a browser makes of a page, and what it writes to its console meanwhile."""
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync --disable-quic"
    options = f"--headless --no-sandbox --disable-gpu {quiet} --enable-logging=stderr --user-data-dir={profile} --dump-dom".split()
    done = subprocess.run([str(CHROMIUM), *options, html.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_an_evaluation_keeps_one_sample_of_its_first_problems(tmp_path: Path) -> None:
    keep(tmp_path, "test_000004_gsm8k_test", problems=KEPT_PROBLEMS + 2)
    written = sorted(file.name for file in (tmp_path / "rollouts").iterdir())
    assert written == ["test_000004_gsm8k_test.json", "test_000004_gsm8k_test.safetensors"]
    with pytest.raises(InputError, match=r"problem 9 was not kept; expected one of 0, 1, 2, 3, 4, 5, 6, 7"):
        find_transcripts(tmp_path, 9, None, None)


def test_the_newest_test_is_shown_unless_another_is_named() -> None:
    names = ["test_000000_a", "test_000004_b", "test_000004_a", "validation_000004_a", "validation_000002_a"]
    assert newest(names) == "test_000004_a" and newest(names[3:]) == "validation_000004_a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "fuzzy_greedy", None), "problem 0 has no fuzzy_greedy; expected one of hard_greedy, soft_sample"),
        ((0, None, "test_000009_x"), "no evaluation test_000009_x; expected one of test_000004_x"),
    ],
)
def test_what_is_not_there_is_named(tmp_path: Path, arguments: tuple[int, str | None, str | None], message: str) -> None:
    keep(tmp_path, "test_000004_x")
    with pytest.raises(InputError, match=message):
        find_transcripts(tmp_path, *arguments)
    with pytest.raises(InputError, match="holds no transcripts"):
        find_transcripts(tmp_path / "rollouts", *arguments)

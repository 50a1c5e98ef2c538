"""100, 10 or 0; equivalent answers are right; an answer that hangs or kills its checker costs that answer only."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import RunError
from rollout import reward
from rollout.reward import Scorer, Verdict, boxed_answer, extract_boxed, quick_verdict

HANGS = "9^{9^{9^{9}}}"  # sympy never comes back from comparing it
RIGHT, WRONG, NOTHING = Verdict(100.0, True), Verdict(10.0, False), Verdict(0.0, False)


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    with Scorer(workers=2, deadline_s=10.0) as scorer:
        yield scorer


def score(scorer: Scorer, *answers: tuple[str, str | None, bool]) -> list[Verdict]:
    """The verdicts on (gold, answer text, closed), all asked for at once, in order."""

    async def all_at_once() -> list[Verdict]:
        return await asyncio.gather(*(scorer.score(*answer) for answer in answers))

    return asyncio.run(all_at_once())


def checkers() -> dict[int, psutil.Process]:
    """This process's checking processes by process id."""
    children = psutil.Process().children()
    return {child.pid: child for child in children if any("verifier.py" in word for word in child.cmdline())}


# --- the box ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{17}.", "17"),
        ("\\boxed{1} then \\boxed{ \\frac{1}{2} } end", "\\frac{1}{2}"),
        ("\\boxed{1} then \\boxed{2", "1"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("$\\boxed 5$", "5"),
        ("\\boxed{}", ""),
        ("no box", None),
        ("\\boxed{\\", None),
    ],
)
def test_the_last_balanced_box(text: str, content: str | None) -> None:
    assert extract_boxed(text) == content


@given(st.recursive(st.sampled_from(["x", "\\{", "\\\\", " 1 "]), lambda s: st.builds("{{{}}}{}".format, s, s)), st.text("}x."))
def test_a_closed_box_is_cut_at_its_own_brace(content: str, rest: str) -> None:
    assert extract_boxed(f"a \\boxed{{{content}}}{rest}") == content.strip()
    assert boxed_answer(f"{content}}}{rest}", closed=True) == (content.strip() or None)


@pytest.mark.parametrize(("text", "closed"), [(None, True), ("", True), ("  }", True), ("}", True), ("17", False), ("17}", False)])
def test_nothing_boxed_is_worth_nothing(text: str | None, closed: bool) -> None:
    assert quick_verdict("17", boxed_answer(text, closed)) == NOTHING


# --- right and wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("17", "17}", RIGHT),
        ("17", "17", RIGHT),
        ("17", " 17 }. So", RIGHT),
        ("17", "18}", WRONG),
        ("17", "17, 18}", WRONG),
        ("17", "seventeen}", WRONG),
        ("1080", "1,080}", RIGHT),
        ("17", "17.0}", RIGHT),
        ("18", "\\$18}", RIGHT),
        ("\\frac{1}{2}", "0.5}", RIGHT),
        ("\\frac{1}{2}", "\\dfrac12}", RIGHT),
        ("\\frac{1}{2}", "1/3}", WRONG),
        ("90^\\circ", "90}", RIGHT),
        ("\\text{east}", "east}", RIGHT),
        ("(1, 2)", "(2, 1)}", WRONG),
        ("\\{1, 2\\}", "\\{2, 1\\}}", RIGHT),
        ("x^2 - 1", "(x-1)(x+1)}", RIGHT),
        ("17", "\\frac{}}", WRONG),
        ("17", "}}{{\\\\\\left(}", NOTHING),
        ("17", "17" * 5000 + "}", WRONG),
    ],
)
def test_verdicts(scorer: Scorer, gold: str, answer: str, verdict: Verdict) -> None:
    assert score(scorer, (gold, answer, True)) == [verdict]


@pytest.mark.parametrize(
    "answer", ["\ud800", "\0", "\u202e17", "\\" * 99, "\\frac" * 20, "{" * 8 + "}" * 8, "\u0661\u0667", "∞", "0/0"]
)
def test_strange_answers_are_judged_and_wrong(scorer: Scorer, answer: str) -> None:
    assert score(scorer, ("3", f"{answer}}}", True)) == [WRONG]


@given(st.integers(-(10**6), 10**6), st.integers(-2, 2))
def test_plain_integers_need_no_algebra(number: int, error: int) -> None:
    gold, answer = str(number), f"{number + error:,}"
    assert quick_verdict(gold, answer) == (RIGHT if error == 0 else WRONG)


def test_a_task_of_integers_starts_no_process() -> None:
    before = len(checkers())
    with Scorer(workers=2) as own:
        assert score(own, ("17", "17}", True), ("17", "18}", True), ("17", None, False)) == [RIGHT, WRONG, NOTHING]
        assert len(checkers()) == before


def test_many_at_once_keep_their_order(scorer: Scorer) -> None:
    verdicts = score(scorer, *(("\\frac{1}{2}", f"{i}/8}}", True) for i in range(24)))
    assert [i for i, verdict in enumerate(verdicts) if verdict.correct] == [4]


# --- processes that hang, die, or cannot start -----------------------------------------------------------------------


def test_a_hanging_answer_is_cut_and_everything_else_goes_on() -> None:
    with Scorer(workers=2, deadline_s=1.5) as own:
        score(own, *[("\\frac{1}{2}", "2/4}", True)] * 2)  # so that starting is not in the time below
        start = time.monotonic()
        hung, *easy = score(own, ("17", HANGS + "}", True), *[("\\frac{1}{2}", "2/4}", True)] * 6)
        assert hung == Verdict(10.0, False, timed_out=True)
        assert set(easy) == {RIGHT}
        assert 1.5 <= time.monotonic() - start < 20
        assert score(own, *[("\\frac{1}{2}", "0.5}", True)] * 4) == [RIGHT] * 4


def test_a_checker_that_was_killed_is_replaced() -> None:
    others = checkers().keys()
    with Scorer(workers=1) as own:
        assert score(own, ("\\frac{1}{2}", "0.5}", True)) == [RIGHT]
        (first,) = checkers().keys() - others
        psutil.Process(first).kill()
        assert score(own, ("\\frac{1}{2}", "0.5}", True)) == [RIGHT]
        (second,) = checkers().keys() - others
    assert first != second
    assert checkers().keys() == others  # closing ends them


def test_an_answer_that_kills_every_checker_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fragile = tmp_path / "verifier.py"
    fragile.write_text(
        "import os, sys\n"
        "from multiprocessing.connection import Connection\n"
        "pipe = Connection(int(sys.argv[1]))\n"
        "pipe.send(None)\n"
        "while 'bomb' not in pipe.recv():\n"
        "    pipe.send(True)\n"
        "os.abort()\n"
    )
    monkeypatch.setattr(reward, "VERIFIER", fragile)
    with Scorer(workers=1) as own:
        verdicts = score(own, ("1/2", "0.5}", True), ("1/2", "bomb}", True), ("1/2", "0.5}", True))
    assert verdicts == [RIGHT, Verdict(10.0, False, timed_out=True), RIGHT]


def test_checkers_load_no_torch_and_die_with_their_parent() -> None:
    script = (
        "import asyncio, os\n"
        "from rollout.reward import Scorer\n"
        "scorer = Scorer(workers=1)\n"
        "asyncio.run(scorer.score('1/2', '0.5}', True))\n"
        "pid = scorer._idle.queue[0]._process.pid\n"
        "print(pid, 'torch' in open(f'/proc/{pid}/maps').read(), flush=True)\n"
        "os._exit(1)\n"
    )
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # vLLM's config sets it: torch's OpenMP
    output = subprocess.run([sys.executable, "-c", script], env=alone, capture_output=True, text=True, timeout=120).stdout.split()
    pid, has_torch = int(output[0]), output[1]
    assert has_torch == "False"
    with suppress(psutil.NoSuchProcess):  # it may be gone at any moment
        checker = psutil.Process(pid)
        psutil.wait_procs([checker], timeout=20)
        assert checker.status() == psutil.STATUS_ZOMBIE


def test_a_checker_that_cannot_start_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "verifier.py"
    broken.write_text("raise SystemExit(1)")
    monkeypatch.setattr(reward, "VERIFIER", broken)
    with Scorer(workers=1) as own, pytest.raises(RunError, match="does not start: it ended at once"):
        score(own, ("1/2", "0.5}", True))

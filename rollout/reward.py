"""The paper's reward: 100 for a right answer, 10 for a boxed but wrong one, 0 when nothing was boxed (section 4.1).

    answer text --> what the box holds --> identical, or both integers? --> Verdict
                                       \\-> a checking process (verifier.py), 6 to 30 ms, cut at the deadline --> Verdict

Every checking process serves one thread of a small pool; a check that hangs or kills its process costs that process only.
"""

import asyncio
import os
import queue
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from configs.errors import RunError

REWARD_RIGHT, REWARD_WRONG, REWARD_NOTHING = 100.0, 10.0, 0.0

VERIFIER = Path(__file__).with_name("verifier.py")
START_TIMEOUT_S = 120.0  # of a checking process: 1 s alone, far more while an engine compiles on the same cores
ATTEMPTS = 2  # a process that died is replaced and its check runs again: the death may have had nothing to do with it

BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
BARE_BOX = re.compile(r"\\(?:boxed|fbox)\s+([^\s${}]+)")  # TeX's one-token form, which some MATH solutions use
INTEGER = re.compile(r"[+-]?(?:[0-9]{1,18}|[0-9]{1,3}(?:,[0-9]{3}){1,5})")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an answer is worth."""

    reward: float  # 100, 10 or 0
    correct: bool
    timed_out: bool = False  # the check did not end: it ran past the deadline, or killed its process twice; counted as wrong


NOTHING_BOXED = Verdict(REWARD_NOTHING, correct=False)


def to_the_closing_brace(text: str) -> str | None:
    """What precedes the brace that closes a group opened before `text`; None when it never closes. `\\{` does not count."""
    depth, i = 1, 0
    while i < len(text):
        if text[i] == "\\":
            i += 1
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[:i]
        i += 1
    return None


def extract_boxed(text: str) -> str | None:
    """The content of the last balanced \\boxed{...} or \\fbox{...} (else the last `\\boxed x`), stripped; None without one."""
    for opening in reversed(list(BOX.finditer(text))):
        if (content := to_the_closing_brace(text[opening.end() :])) is not None:
            return content.strip()
    bare = BARE_BOX.findall(text)
    return bare[-1].strip() if bare else None


def boxed_answer(answer_text: str | None, closed: bool) -> str | None:
    """What stands in the box when `answer_text` followed the forced `\\boxed{`, its closing brace included or already cut off.
    None when the box was not closed or is empty."""
    if answer_text is None or not closed:
        return None
    content = to_the_closing_brace(answer_text)
    return (answer_text if content is None else content).strip() or None


def quick_verdict(gold: str, answer: str | None) -> Verdict | None:
    """The verdict where no algebra is needed: nothing boxed, the same text, or two plain integers. None: ask math-verify."""
    if answer is None:
        return NOTHING_BOXED
    if answer == gold.strip():
        return judged(True)
    if INTEGER.fullmatch(answer) and INTEGER.fullmatch(gold.strip()):
        return judged(int(answer.replace(",", "")) == int(gold.replace(",", "")))
    return None


def judged(correct: bool, timed_out: bool = False) -> Verdict:
    """The verdict on a boxed answer: 100 or 10."""
    return Verdict(REWARD_RIGHT if correct else REWARD_WRONG, correct, timed_out)


class Scorer:
    """Scores answers, many at a time. Each of the `workers` checking processes starts when it is first needed, so a task of
    plain integers starts none. `deadline_s` is per check, without the wait for a turn."""

    def __init__(self, workers: int | None = None, deadline_s: float = 5.0):
        count = workers or max(1, min(8, (os.cpu_count() or 2) // 2))
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="scorer")
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()  # last in, first out: as few processes as the load needs
        for _ in range(count):
            self._idle.put(_Worker(deadline_s))

    async def score(self, gold: str, answer_text: str | None, closed: bool) -> Verdict:
        """The verdict on the text that followed the forced `\\boxed{`; `closed` says that its box was closed."""
        answer = boxed_answer(answer_text, closed)
        if (quick := quick_verdict(gold, answer)) is not None:
            return quick
        return await asyncio.wrap_future(self._threads.submit(self._check, gold, answer or ""))

    def close(self) -> None:
        """End every checking process; checks under way finish first."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        while not self._idle.empty():
            self._idle.get().stop()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, gold: str, answer: str) -> Verdict:
        worker = self._idle.get()  # as many threads as workers: never waits
        try:
            for _ in range(ATTEMPTS):
                try:
                    return judged(worker.check(gold, answer))
                except TimeoutError:
                    break
                except (EOFError, OSError):
                    continue
            return judged(False, timed_out=True)
        finally:
            self._idle.put(worker)


class _Worker:
    """One checking process and the pipe to it: started at need, replaced after it hung or died. For one thread at a time."""

    def __init__(self, deadline_s: float):
        self._deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def check(self, gold: str, answer: str) -> bool:
        """math-verify's opinion. TimeoutError past the deadline, EOFError or OSError when the process died: it is gone then."""
        pipe = self._pipe or self._start()
        try:
            pipe.send((gold, answer))
            if not pipe.poll(self._deadline_s):
                raise TimeoutError
            return pipe.recv()
        except (EOFError, OSError):  # TimeoutError is an OSError
            self.stop()
            raise

    def stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        """Start a process and wait until it is ready; RunError when it cannot run, which no other process would either."""
        for _ in range(ATTEMPTS):
            self._pipe, failure = self._launch()
            if failure is None:
                return self._pipe
            self.stop()
        raise RunError(f"reward: the answer-checking process does not start: {failure}; check with `softrl doctor`")

    def _launch(self) -> tuple[Connection, str | None]:
        """The pipe to a new process, and what kept it from getting ready."""
        ours, theirs = Pipe()
        # -P: without it the folder of verifier.py would come first on the process's path. Not `multiprocessing`: its spawn runs
        # the parent's main module again, and with it torch and Ray.
        command = [sys.executable, "-P", str(VERIFIER), str(theirs.fileno()), str(self._deadline_s)]
        self._process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        theirs.close()
        try:
            return ours, ours.recv() if ours.poll(START_TIMEOUT_S) else f"not ready after {START_TIMEOUT_S:.0f} s"
        except (EOFError, OSError):
            return ours, "it ended at once"

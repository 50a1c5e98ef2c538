"""How far a long piece of work is, in one line: said now and then where lines stay, redrawn in place on a terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

from cluster.live import duration

Say = Callable[[str], None]

LINE_EVERY_S = 30.0  # where every line stays
REDRAW_EVERY_S = 0.5


class Progress:
    """Counts what is done of `total`; says a line with rate and ETA at most every `every_s` seconds."""

    def __init__(self, what: str, total: int, say: Say, every_s: float = LINE_EVERY_S) -> None:
        self.what, self.total, self.done, self.tokens = what, total, 0, 0
        self._say, self._every_s = say, every_s
        self._begun = self._said = time.monotonic()

    def advance(self, tokens: int) -> None:
        """One more is done, and these tokens with it."""
        self.done += 1
        self.tokens += tokens
        if (now := time.monotonic()) - self._said >= self._every_s:
            self._said = now
            self._say(self.line(now - self._begun))

    def line(self, seconds: float) -> str:
        """After so many seconds; one of the last to finish is taken to be as long as the others."""
        left = seconds / max(1, self.done) * (self.total - self.done)
        share = f"{self.done}/{self.total} ({self.done / max(1, self.total):.0%})"
        return f"{self.what}: {share}, {self.tokens / max(seconds, 1e-9):,.0f} tokens/s, ETA {duration(left)}"


@contextmanager
def progress_line(console: Console) -> Iterator[Callable[[str, int], Progress]]:
    """Makes the Progress of (what, total): a line that is redrawn at the bottom of a terminal, else one every LINE_EVERY_S."""
    if not console.is_terminal:
        yield lambda what, total: Progress(what, total, lambda line: console.print(line, soft_wrap=True, highlight=False))
        return
    with console.status("starting") as status:
        yield lambda what, total: Progress(what, total, status.update, REDRAW_EVERY_S)

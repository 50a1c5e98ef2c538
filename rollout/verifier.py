"""One answer-checking process: reads (gold, answer) pairs from a pipe, writes back whether math-verify finds them equivalent.

`rollout.reward` starts this file by its path, so the process imports math-verify and nothing else of softrl (no torch, no Ray).
It lives alone because sympy can hang inside one C call, where no signal handler and no thread can stop it: the parent ends the
process at the deadline, and if the parent is gone the alarm below does.
"""

import logging
import re
import resource
import signal
import sys
import unicodedata
from multiprocessing.connection import Connection

MEMORY_LIMIT_BYTES = 4 << 30  # an answer like 10^{10^{10}} asks sympy for gigabytes
ALARM_MARGIN_S = 1.0  # the parent cuts first

SLASH = "\N{FRACTION SLASH}"
LATEX_OF = {"°": "^\\circ ", "∞": "\\infty ", "·": "\\cdot ", SLASH: "/"}
ROOT = re.compile("√ ?([0-9]+|[A-Za-z])")
DIGIT_GAP = re.compile(r"(?<=[0-9])(?:\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))")  # 12\,345
FULL_STOP = re.compile(r"(?<=[0-9])\.$")


def in_latex(text: str) -> str:
    """`text` with the spellings that math-verify does not read as the mathematics they are in those that it does: invisible
    characters, dashes, digits, exponents and fractions of Unicode, spaces between groups of digits, a full stop."""
    text = text if text.isascii() else ROOT.sub(r"\\sqrt{\1}", "".join(map(_character_in_latex, text)))
    return FULL_STOP.sub("", DIGIT_GAP.sub("", text.strip()))


def _character_in_latex(c: str) -> str:
    category, decomposition = unicodedata.category(c), unicodedata.decomposition(c)
    if c in LATEX_OF:
        return LATEX_OF[c]
    if category == "Cf":  # zero-width spaces, byte-order and direction marks
        return ""
    if category == "Zs":
        return " " if c == " " else "\\,"
    if category == "Pd":
        return "-"
    if category == "Nd":
        return str(unicodedata.decimal(c))
    if decomposition.startswith("<super>"):
        return f"^{{{unicodedata.normalize('NFKC', c)}}}"
    if decomposition.startswith("<fraction>"):
        return "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", c).split(SLASH))
    return c


def equivalent(gold: str, answer: str) -> bool:
    """math-verify's opinion, its own time-outs off (this process has a better one). False for what it cannot parse."""
    from math_verify import parse, verify

    parsed = [parse(f"\\boxed{{{in_latex(text)}}}", parsing_timeout=None) for text in (gold, answer)]
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None))


def serve(connection: Connection, deadline_s: float) -> None:
    """Answer pairs until the other end closes. The first message out is None when ready, else why math-verify does not run."""
    logging.disable(logging.CRITICAL)  # math-verify warns of its time-outs, sympy of what it cannot parse
    try:
        equivalent("1", "2")  # the first check builds grammars and takes several times as long as the next
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while True:
        try:
            gold, answer = connection.recv()
        except EOFError:
            return
        # No handler: SIGALRM then ends the process even in the middle of a C call.
        signal.setitimer(signal.ITIMER_REAL, deadline_s + ALARM_MARGIN_S)
        verdict = _guarded(gold, answer)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(verdict)


def _guarded(gold: str, answer: str) -> bool:
    try:
        return equivalent(gold, answer)
    except (Exception, RecursionError, MemoryError):  # whatever sympy raises on a strange string, the string is no right answer
        return False


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes the pipe
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    serve(Connection(int(sys.argv[1])), float(sys.argv[2]))

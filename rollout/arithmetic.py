"""Arithmetic problems from nothing: the demo's task, its held-out problems, and two that show what training on it forgets.

    arithmetic:train, :validation, :test    a + b of one range, split by pair: a + b and b + a are always on the same side
    arithmetic:far                          sums of larger operands than training ever shows
    arithmetic:times                        products, never trained on

`arithmetic:train?low=1&high=49` sets the operands' range. Problems come in an order fixed by hash, so the first n are a fair
sample.
"""

import hashlib
from collections.abc import Mapping

from configs.errors import InputError

RANGES = {"train": (1, 49), "validation": (1, 49), "test": (1, 49), "far": (50, 99), "times": (2, 12)}
HELD_OUT = {0: "validation", 1: "test"}  # of TENTHS buckets; the other eight are training's
TENTHS = 10
LARGEST_RANGE = 1000  # operands: their square is the number of problems


def generate(split: str, parameters: Mapping[str, str]) -> list[tuple[str, str]]:
    """(question, answer) pairs of a split, `low <= a, b <= high`; InputError for a parameter that is unknown or no integer."""
    low, high = (_integer(parameters, key, default) for key, default in zip(("low", "high"), RANGES[split], strict=True))
    if unknown := set(parameters) - {"low", "high"}:
        raise InputError(f"task: arithmetic: unknown parameter {sorted(unknown)[0]!r}; expected low or high")
    if not 0 <= low <= high:
        raise InputError(f"task: arithmetic: expected 0 <= low <= high, got low={low}, high={high}")
    if high - low >= LARGEST_RANGE:
        raise InputError(f"task: arithmetic: low={low}, high={high}: expected at most {LARGEST_RANGE:,} numbers; narrow the range")
    pairs = [(a, b) for a in range(low, high + 1) for b in range(low, high + 1)]
    if split == "times":
        problems = [(f"What is {a} * {b}?", str(a * b)) for a, b in pairs]
    elif split == "far":
        problems = [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs]
    else:
        problems = [(f"What is {a} + {b}?", str(a + b)) for a, b in pairs if _split_of(a, b) == split]
    return sorted(problems, key=lambda problem: _hash(problem[0]))


def _split_of(a: int, b: int) -> str:
    return HELD_OUT.get(_hash(f"{min(a, b)}+{max(a, b)}") % TENTHS, "train")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _integer(parameters: Mapping[str, str], key: str, default: int) -> int:
    text = parameters.get(key, str(default))
    if not text.isdecimal():
        raise InputError(f"task: arithmetic: {key}={text!r}: expected a whole number")
    return int(text)

"""What many samples of many problems say: pass@k, its uncertainty, the majority's answer, and how soft the thoughts were.

    right and drawn samples of each problem --> pass_at_k [P, K] --> mean over problems, bootstrap_interval over problems
    answers of one problem's samples        --> majority_vote
    recorded supports of one sample         --> mixture_profile [C] --> IndexMeans over samples

Pure numpy; nothing here knows of files or engines.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from rollout.trajectory import Trajectory

RESAMPLES = 2000  # of a bootstrap: the 2.5 % point rests on 50 of them
LEVEL = 0.95


# --- pass@k ----------------------------------------------------------------------------------------------------------


def pass_at_k(correct: NDArray[np.int64], samples: NDArray[np.int64], up_to: int | None = None) -> NDArray[np.float64]:
    """Per problem, the probability that one of k of its n samples, drawn without replacement, is right, for k = 1 .. K: [P, K].

    `correct` [P] and `samples` [P] are counts; K is `up_to`, or the fewest samples of any problem. This is the unbiased
    estimator 1 - C(n-c, k) / C(n, k) (paper, section 4.2; Chen et al. 2021). Its mean over axis 0 is the curve of a data set.

    Raises InputError for no problem, a problem without samples, and k > n.
    """
    if len(samples) == 0 or samples.min() == 0:
        raise InputError(f"pass@k: {'a problem has' if len(samples) else 'there are'} no samples; expected at least one a problem")
    if ((correct < 0) | (correct > samples)).any():
        raise ValueError("expected 0 <= correct <= samples for every problem")
    fewest = int(samples.min())
    most = fewest if up_to is None else up_to
    if not 1 <= most <= fewest:
        raise InputError(f"pass@{most}: expected k from 1 to {fewest}, the fewest samples of a problem; raise eval.samples")
    kinds, which = np.unique(np.stack([correct, samples], axis=1), axis=0, return_inverse=True)
    # C(n-c, k) / C(n, k) as a product of k factors in [0, 1]: no binomial is formed, so nothing overflows or cancels at any n.
    drawn = np.arange(most)
    factors = np.maximum(kinds[:, 1:] - kinds[:, :1] - drawn, 0) / (kinds[:, 1:] - drawn)
    curves: NDArray[np.float64] = 1.0 - np.cumprod(factors, axis=1, dtype=np.float64)
    return curves[which.reshape(-1)]


def bootstrap_interval(
    values: NDArray[np.float64], seed: int, level: float = LEVEL, resamples: int = RESAMPLES
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The percentile interval (low, high) of the mean over problems: `values` is [P] or [P, K], each bound [] or [K].

    Problems are drawn with replacement, whole rows at a time, so it covers the choice of problems and the chance of sampling.
    Equal values give an interval of width zero: the bootstrap sees no spread where the sample shows none. The same seed gives the
    same interval. Raises InputError for no problem.
    """
    count = len(values)
    if count == 0:
        raise InputError("bootstrap: there are no problems; expected at least one")
    generator = np.random.default_rng(seed)
    # one resample at a time: all of them at once would be resamples x problems counts in memory
    draws = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples))
    means = np.stack([draw @ values for draw in draws]) / count
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


# --- majority vote ---------------------------------------------------------------------------------------------------

SPACING = re.compile(r"\\[!,;: ]|\\(?:left|right|displaystyle)(?![A-Za-z])|[\s$~]")
TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\{([^{}]*)\}")
FRACTION = re.compile(r"([+-]?)\\frac(?:\{(\d{1,18})\}\{(\d{1,18})\}|(\d)(\d))")
THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
RATIONAL = re.compile(r"[+-]?(?:\d{1,18}/\d{1,18}|\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})")


def normalised_answer(text: str) -> str:
    """Boxed text by which answers are counted as one: without spacing, and rational numbers in lowest terms ("0.50", "\\frac12",
    "1/2"). Algebra beyond that stays apart: a vote must not cost a checking process per pair, and never sees the gold answer."""
    text = SPACING.sub("", TEXT.sub(r"\1", text)).rstrip(".")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    if match := FRACTION.fullmatch(text):
        sign, *parts = match.groups()
        over, under = (part for part in parts if part is not None)
        text = f"{sign}{over}/{under}"
    if THOUSANDS.fullmatch(text):
        text = text.replace(",", "")
    if RATIONAL.fullmatch(text) and not re.search(r"/0+$", text):
        text = str(Fraction(text))
    return text


def majority_vote(answers: Sequence[str | None]) -> int | None:
    """The place of the first sample that gives the most frequent answer; None when no sample has one.

    `answers` are boxed texts in sample order; None abstains. Of equally frequent answers the one that was given first wins.
    """
    votes: dict[str, list[int]] = {}  # normalised answer: the places that gave it, in the order of their first
    for place, answer in enumerate(answers):
        if answer is not None:
            votes.setdefault(normalised_answer(answer), []).append(place)
    return max(votes.values(), key=len)[0] if votes else None


# --- mixtures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MixtureProfile:
    """One sample's mixtures by CoT index; C is 0 for a hard sample, which has none."""

    entropy: NDArray[np.float64]  # [C] nats, of the recorded support renormalised, at the CoT's temperature
    support_size: NDArray[np.int64]  # [C] tokens
    dropped_mass: NDArray[np.float32]  # [C] probability outside the support


def mixture_profile(trajectory: Trajectory) -> MixtureProfile:
    """Entropy, support size and dropped mass of every soft step. The whole distribution's entropy is higher, by at most
    d log(V / d) + d nats for a dropped mass d: 0.005 at 2e-4, its usual p99."""
    offsets = trajectory.support_offsets
    if offsets[-1] == 0:
        return MixtureProfile(np.empty(0), np.empty(0, np.int64), np.empty(0, np.float32))
    probs = trajectory.support_probs.astype(np.float64)
    # differences of a running sum, because reduceat is wrong where a step has no entries
    total = np.concatenate([[0.0], np.cumsum(-probs * np.log(np.maximum(probs, np.finfo(np.float64).tiny)))])
    entropy = np.maximum(total[offsets[1:]] - total[offsets[:-1]], 0.0)
    return MixtureProfile(entropy, np.diff(offsets), trajectory.dropped_mass)


class IndexMeans:
    """Mean by CoT index over samples of different lengths: an index counts the samples that reached it."""

    def __init__(self) -> None:
        self._sums, self._counts = np.zeros(0), np.zeros(0, np.int64)

    def add(self, row: Sequence[float] | NDArray[np.float64]) -> None:
        """One sample's values [C]."""
        self._extend(len(row))
        self._sums[: len(row)] += row
        self._counts[: len(row)] += 1

    @classmethod
    def merged(cls, parts: Iterable["IndexMeans"]) -> "IndexMeans":
        """As if every sample of the parts had been added to one."""
        whole = cls()
        for part in parts:
            count = len(part._counts)
            whole._extend(count)
            whole._sums[:count] += part._sums
            whole._counts[:count] += part._counts
        return whole

    def _extend(self, length: int) -> None:
        if (longer := length - len(self._sums)) > 0:
            self._sums, self._counts = np.pad(self._sums, (0, longer)), np.pad(self._counts, (0, longer))

    @property
    def mean(self) -> NDArray[np.float64]:
        """[longest C]"""
        return self._sums / self._counts

    @property
    def counts(self) -> NDArray[np.int64]:
        """[longest C] samples that reached each index"""
        return self._counts

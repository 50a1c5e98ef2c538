"""What a rollout leaves behind: one immutable record per sample, in numpy, small enough to travel.

Noise never travels. A soft step keeps the support of its mixture (ids and renormalised probabilities, CSR over steps) and the
trajectory's seed; `kernels.soft_embedding.rebuild` returns the very bits that the engine fed back into the model.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.schema import Mode

COLDEST_TAU = 1e-5  # below, float32 has no room for z / tau

STOP_ANSWER_CLOSED = "closed"  # the answer's brace was balanced
STOP_ANSWER_EOS = "eos"
STOP_ANSWER_LENGTH = "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleRequest:
    """One sample to draw. Token ids are ints of the model's vocabulary; `seed` is a 64-bit non-negative noise seed."""

    prompt_ids: NDArray[np.int32]  # [P]
    prompt_index: int  # the problem's index in its data set
    sample_index: int  # 0 .. G-1 within the group
    mode: Mode
    tau: float  # CoT temperature, at least COLDEST_TAU; 0 (hard only) is greedy
    sigma: float  # noise standard deviation per coordinate; 0 for hard and for greedy soft
    seed: int  # [0, 2**63)
    max_cot_tokens: int  # L
    max_answer_tokens: int
    answer_temperature: float  # 0 is greedy
    record_full: bool = False  # also return the soft embeddings


def impossible(request: SampleRequest) -> tuple[str, object, str] | None:
    """The first field of a request that no engine can decode with, as (name, value, what was expected); None if there is none."""
    for name, expected in (
        ("tau", tau_expected(request.mode, request.tau)),
        ("sigma", at_least_zero(request.sigma)),
        ("answer_temperature", at_least_zero(request.answer_temperature)),
        ("seed", None if 0 <= request.seed < 2**63 else "a whole number from 0 to 2**63 - 1"),
        ("max_cot_tokens", None if request.max_cot_tokens >= 1 else "at least 1"),
        ("max_answer_tokens", None if request.max_answer_tokens >= 1 else "at least 1"),
    ):
        if expected is not None:
            return name, getattr(request, name), expected
    return None


def tau_expected(mode: Mode, tau: float) -> str | None:
    """What a CoT temperature should have been, or None if it is possible in the mode. A mixture has no greedy limit at 0."""
    if COLDEST_TAU <= tau < math.inf or (mode is Mode.hard and tau == 0):
        return None
    return f"a finite number of at least {COLDEST_TAU:g}" + (", or 0 in hard mode" if mode is Mode.hard else f" in {mode} mode")


def at_least_zero(number: float) -> str | None:
    """What a temperature or a standard deviation should have been, or None if it is possible."""
    return None if 0 <= number < math.inf else "a finite number of at least 0"


def sample_seed(*place: object) -> int:
    """The 63-bit noise seed of one sample, a hash of where it stands: (run seed, step, prompt, sample). A run can be replayed."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """One finished sample. P prompt tokens, C CoT steps, F forced prefill tokens, A answer tokens, N support entries."""

    prompt_ids: NDArray[np.int32]  # [P]
    prompt_index: int
    sample_index: int
    mode: Mode
    tau: float
    sigma: float
    noise_seed: int
    shadow_ids: NDArray[np.int32]  # [C] the most probable token of each step; the sampled token when hard
    support_ids: NDArray[np.int32]  # [N] ascending within a step; empty when hard
    support_probs: NDArray[np.float32]  # [N] renormalised: each step sums to 1
    support_offsets: NDArray[np.int64]  # [C+1]; all zeros when hard
    dropped_mass: NDArray[np.float32]  # [C] probability outside the support; zeros when hard
    soft_embeddings: NDArray[np.uint8] | None  # [C, n0 * itemsize] raw bytes in the engine's dtype, only when recorded in full
    prefill_ids: NDArray[np.int32]  # [F]
    answer_ids: NDArray[np.int32]  # [A]
    answer_logprobs: NDArray[np.float32]  # [A] the engine's, at temperature 1
    stop_reason: str  # STOP_ANSWER_*
    phrase_found: bool  # the CoT ended by itself, before L
    weight_versions: NDArray[np.int64]  # [K] the versions of the weights that drew it, in order; one where no push came between
    weight_version_starts: NDArray[np.int64]  # [K] the first generated position (CoT, prefill, answer) of each, from 0

    @property
    def cot_length(self) -> int:
        """C: CoT steps, the one that completes the stop phrase included, the forced prefill not."""
        return len(self.shadow_ids)

    @property
    def generated(self) -> int:
        """Positions the engine decoded: CoT, forced prefill and answer."""
        return len(self.shadow_ids) + len(self.prefill_ids) + len(self.answer_ids)

    def input_ids(self) -> NDArray[np.int32]:
        """Token ids [P + C + F + A] of the whole sequence; at soft steps the shadow id stands in for the mixture."""
        return np.concatenate([self.prompt_ids, self.shadow_ids, self.prefill_ids, self.answer_ids])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A trajectory with what the scorer said of it."""

    trajectory: Trajectory
    reward: float  # 100 right, 10 boxed but wrong, 0 nothing boxed (paper, section 4.1)
    correct: bool
    answer_text: str
    timed_out: bool = False  # the check of the answer did not end; counted as wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All G samples of one prompt: the unit that is scored, given advantages and learned from."""

    step: int
    prompt_index: int
    samples: tuple[Sample, ...]

"""An engine that answers at once in place of one that takes half a minute to start, and a tokenizer of single bytes."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from cluster.rollouts import Rollouts
from configs.schema import Config, Mode
from rollout.reward import Scorer
from rollout.token_tables import byte_level_alphabet
from rollout.trajectory import SampleRequest, Trajectory

COT = 3


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that "é" takes two."""
    vocabulary = {character: byte for byte, character in byte_level_alphabet().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class FakeEngine:
    """Answers `answer(request)`, in the order in which it was asked; raises ConnectionError once `fails_after` are done."""

    def __init__(self, tokenizer: Any, answer: Callable[[SampleRequest], str], fails_after: int | None = None) -> None:
        self.tokenizer, self.answer, self.fails_after = tokenizer, answer, fails_after
        self.calls: list[list[SampleRequest]] = []
        self.scored: list[int] = []  # sequences of each call
        self.generate = _Remote(self._generate)
        self.token_logprobs = _Remote(self._token_logprobs)

    async def _generate(self, requests: list[SampleRequest]) -> AsyncIterator[Awaitable[Trajectory]]:
        self.calls.append(requests)
        for done, request in enumerate(requests):
            if done == self.fails_after:
                raise ConnectionError("the engine is gone")
            yield _done(trajectory(request, np.array(self.tokenizer.encode(self.answer(request) + "}"), np.int32)))

    async def _token_logprobs(self, sequences: list[Any]) -> list[Any]:
        self.scored.append(len(sequences))
        if len(self.scored) - 1 == self.fails_after:
            raise ConnectionError("the engine is gone")
        return [-(ids[1:] % 7 + 0.1 * (ids[:-1] % 3)).astype(np.float32) for ids in sequences]


class _Remote:
    """What Ray makes of an actor's method, as far as it is used."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method

    def options(self, num_returns: str) -> "_Remote":
        assert num_returns == "streaming"
        return self


async def _done(value: Any) -> Any:
    return value


def trajectory(request: SampleRequest, answer_ids: Any, cot: int = COT) -> Trajectory:
    """What an engine might have made of the request: each soft step mixes its shadow token and the next id, 3 to 1."""
    hard = request.mode is Mode.hard
    shadow = 65 + (request.prompt_index + request.sample_index + np.arange(cot, dtype=np.int32)) % 20
    return Trajectory(
        prompt_ids=request.prompt_ids,
        prompt_index=request.prompt_index,
        sample_index=request.sample_index,
        mode=request.mode,
        tau=request.tau,
        sigma=request.sigma,
        noise_seed=request.seed,
        shadow_ids=shadow.astype(np.int32),
        support_ids=np.empty(0, np.int32) if hard else np.stack([shadow, shadow + 1], axis=1).reshape(-1).astype(np.int32),
        support_probs=np.empty(0, np.float32) if hard else np.tile(np.array([0.75, 0.25], np.float32), cot),
        support_offsets=np.zeros(cot + 1, np.int64) if hard else np.arange(0, 2 * cot + 1, 2),
        dropped_mass=np.zeros(cot, np.float32),
        soft_embeddings=None,
        prefill_ids=np.arange(66, 68, dtype=np.int32),
        answer_ids=answer_ids,
        answer_logprobs=np.zeros(len(answer_ids), np.float32),
        stop_reason="closed",
        phrase_found=True,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )


def rollouts(config: Config, engines: list[Any], tokenizer: Any, scorer: Scorer, sigma: float = 0.25) -> Rollouts:
    return Rollouts(config, [], engines, tokenizer, scorer, sigma)

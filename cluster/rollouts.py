"""From problems to scored groups: seeds, requests over all engines, scoring as samples finish, groups in data order."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cluster.waits import Waiting, wait_all
from configs.errors import InputError
from configs.schema import Config, Mode, Record
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, render
from rollout.reward import Scorer, to_the_closing_brace
from rollout.tasks import Problem, batch_indices
from rollout.trajectory import STOP_ANSWER_CLOSED, Group, Sample, SampleRequest, Trajectory, sample_seed


class Rollouts:
    """Draws groups of the training problems with the given engines (Ray handles of RolloutEngine).

    sigma is the run's fixed noise scale: gamma times the RMS of the base model's embedding (paper, section 4.1).
    """

    def __init__(
        self, config: Config, problems: list[Problem], engines: list[Any], tokenizer: Any, scorer: Scorer, sigma: float
    ) -> None:
        self.config, self.problems, self.engines = config, problems, engines
        self.tokenizer, self.scorer, self.sigma = tokenizer, scorer, sigma

    @classmethod
    async def start(
        cls, config: Config, problems: list[Problem], engines: list[Any], tokenizer: Any, scorer: Scorer, waiting: Waiting
    ) -> tuple[Self, list[dict[str, Any]]]:
        """Start the engines, take the noise scale from the first; the rollouts and what each engine reports of itself."""
        starting = [engine.start.remote() for engine in engines]
        reports = await wait_all(waiting, "start", "engines", config.engine.start_timeout_s, starting)
        sigma = config.policy.gamma * float(reports[0]["rms_embedding"])
        return cls(config, problems, engines, tokenizer, scorer, sigma), reports

    def under(self, config: Config) -> Self:
        """The same engines and noise under another config."""
        return type(self)(config, self.problems, self.engines, self.tokenizer, self.scorer, self.sigma)

    async def groups(self, step: int) -> AsyncIterator[Group]:
        """The step's groups, each as soon as it and all before it are scored: the order never depends on timing."""
        size = self.config.rollout.samples_per_prompt
        chosen = batch_indices(len(self.problems), step, self.config.rollout.prompts_per_step, self.config.run.seed)
        problems = [self.problems[i] for i in chosen]
        requests = [self.request(problem, step, sample) for problem in problems for sample in range(size)]
        gold = {problem.index: problem.answer for problem in problems}
        samples: dict[int, list[Sample]] = {problem.index: [] for problem in problems}
        waiting = [problem.index for problem in problems]
        async for sample in self.scored(requests, gold):
            samples[sample.trajectory.prompt_index].append(sample)
            while waiting and len(samples[waiting[0]]) == size:
                index = waiting.pop(0)
                in_order = sorted(samples[index], key=lambda s: s.trajectory.sample_index)
                yield Group(step=step, prompt_index=index, samples=tuple(in_order))

    async def scored(self, requests: list[SampleRequest], gold: dict[int, str]) -> AsyncIterator[Sample]:
        """Samples of the requests, scored against `gold` by prompt index, as they finish."""

        async def score(trajectory: Trajectory, put: Callable[[Sample], None]) -> None:
            text = answer_text(self.tokenizer, trajectory)
            verdict = await self.scorer.score(gold[trajectory.prompt_index], text, trajectory.stop_reason == STOP_ANSWER_CLOSED)
            put(
                Sample(
                    trajectory=trajectory,
                    reward=verdict.reward,
                    correct=verdict.correct,
                    answer_text=text,
                    timed_out=verdict.timed_out,
                )
            )

        async def score_all(put: Callable[[Sample], None]) -> None:
            async with asyncio.TaskGroup() as tasks:
                async for trajectory in self.trajectories(requests):
                    tasks.create_task(score(trajectory, put))

        async for sample in _as_put(score_all):
            yield sample

    async def trajectories(self, requests: list[SampleRequest]) -> AsyncIterator[Trajectory]:
        """Trajectories of the requests as they finish; a prompt's samples share an engine, and so its prefix cache."""
        prompts = list(dict.fromkeys(r.prompt_index for r in requests))
        engine_of = {prompt: i % len(self.engines) for i, prompt in enumerate(prompts)}
        shares: list[list[SampleRequest]] = [[] for _ in self.engines]
        for request in requests:
            shares[engine_of[request.prompt_index]].append(request)

        async def draw(engine: Any, share: list[SampleRequest], put: Callable[[Trajectory], None]) -> None:
            async for ref in engine.generate.options(num_returns="streaming").remote(share):
                put(await ref)

        async def draw_all(put: Callable[[Trajectory], None]) -> None:
            async with asyncio.TaskGroup() as tasks:
                for engine, share in zip(self.engines, shares, strict=True):
                    if share:
                        tasks.create_task(draw(engine, share, put))

        async for trajectory in _as_put(draw_all):
            yield trajectory

    def request(self, problem: Problem, step: int, sample: int) -> SampleRequest:
        """One training sample of a problem."""
        policy = self.config.policy
        assert policy.tau is not None  # filled in by configs.load
        return SampleRequest(
            prompt_ids=self.prompt_ids(problem),
            prompt_index=problem.index,
            sample_index=sample,
            mode=policy.mode,
            tau=policy.tau,
            sigma=0.0 if policy.mode is Mode.hard else self.sigma,
            seed=sample_seed(self.config.run.seed, step, problem.index, sample),
            max_cot_tokens=policy.max_cot_tokens,
            max_answer_tokens=policy.max_answer_tokens,
            answer_temperature=self.config.rollout.answer_temperature,
            record_full=policy.record is Record.full,
        )

    def prompt_ids(self, problem: Problem) -> NDArray[np.int32]:
        """[P] ids of `task.prompt` with the question in it, and the special tokens that the tokenizer adds."""
        return np.array(self.tokenizer.encode(render(self.config.task.prompt, problem.question)), dtype=np.int32)


def require_prompts_fit(config: Config, tokenizer: Any, problems: list[Problem], max_cot_tokens: int) -> None:
    """Raises InputError naming the longest prompt when it does not leave room for so long a CoT and the answer."""
    texts = [render(config.task.prompt, problem.question) for problem in problems]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    forced = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in (PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT))
    needed = lengths[longest] + max_cot_tokens + forced + config.policy.max_answer_tokens
    if needed > config.engine.max_model_len:
        raise InputError(
            f"task: the prompt of problem {problems[longest].index} has {lengths[longest]} tokens and needs {needed} with CoT "
            f"and answer, engine.max_model_len is {config.engine.max_model_len}; raise it, or filter the data"
        )


def answer_text(tokenizer: Any, trajectory: Trajectory) -> str:
    """What stands inside the forced box: the decoded answer, cut at its closing brace."""
    text = tokenizer.decode(trajectory.answer_ids.tolist(), skip_special_tokens=True)
    inside = to_the_closing_brace(text)
    return text if inside is None else inside


async def _as_put(fill: Callable[[Callable[[Any], None]], Awaitable[None]]) -> AsyncIterator[Any]:
    """What `fill(put)` puts, as it puts it, until it returns; its first error is raised after what came before it."""
    items: asyncio.Queue[Any] = asyncio.Queue()
    end = object()
    filling = asyncio.ensure_future(fill(items.put_nowait))
    filling.add_done_callback(lambda _: items.put_nowait(end))
    try:
        while (item := await items.get()) is not end:
            yield item
        try:
            await filling
        except ExceptionGroup as group:  # of a TaskGroup, which cancelled the other tasks
            raise group.exceptions[0] from None
    finally:
        filling.cancel()

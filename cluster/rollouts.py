"""From problems to scored groups: seeds, requests over all engines, scoring as samples finish, groups in data order."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError
from configs.schema import Config, Mode, Record
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, render
from rollout.reward import Scorer, to_the_closing_brace
from rollout.tasks import Problem
from rollout.trajectory import STOP_ANSWER_CLOSED, Group, Sample, SampleRequest, Trajectory, sample_seed


class Rollouts:
    """Draws groups with the given engines (Ray handles of RolloutEngine). sigma is the run's fixed noise scale."""

    def __init__(self, config: Config, engines: list[Any], tokenizer: Any, scorer: Scorer, sigma: float) -> None:
        self.config, self.engines, self.tokenizer, self.scorer, self.sigma = config, engines, tokenizer, scorer, sigma

    async def groups(self, step: int, problems: list[Problem]) -> AsyncIterator[Group]:
        """One group per problem, each as soon as it and all before it are scored: the order never depends on timing."""
        size = self.config.rollout.samples_per_prompt
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

        async def score(trajectory: Trajectory) -> Sample:
            text = answer_text(self.tokenizer, trajectory)
            verdict = await self.scorer.score(gold[trajectory.prompt_index], text, trajectory.stop_reason == STOP_ANSWER_CLOSED)
            return Sample(trajectory=trajectory, reward=verdict.reward, correct=verdict.correct, answer_text=text)

        async for sample in _mapped(self.trajectories(requests), score):
            yield sample

    async def trajectories(self, requests: list[SampleRequest]) -> AsyncIterator[Trajectory]:
        """Trajectories of the requests as they finish; a prompt's samples share an engine, and so its prefix cache."""
        prompts = list(dict.fromkeys(r.prompt_index for r in requests))
        engine_of = {prompt: i % len(self.engines) for i, prompt in enumerate(prompts)}
        shares: list[list[SampleRequest]] = [[] for _ in self.engines]
        for request in requests:
            shares[engine_of[request.prompt_index]].append(request)

        async def stream(engine: Any, share: list[SampleRequest]) -> AsyncIterator[Trajectory]:
            async for ref in engine.generate.options(num_returns="streaming").remote(share):
                yield await ref

        async for trajectory in _merged([stream(e, s) for e, s in zip(self.engines, shares, strict=True) if s]):
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
        return np.array(self.tokenizer.encode(render(self.config.task.prompt, problem.question)), dtype=np.int32)


def require_prompts_fit(config: Config, tokenizer: Any, problems: list[Problem]) -> None:
    """Raises InputError naming the longest prompt when it does not leave room for the CoT and the answer."""
    texts = [render(config.task.prompt, problem.question) for problem in problems]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    forced = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in (PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT))
    needed = lengths[longest] + config.policy.max_cot_tokens + forced + config.policy.max_answer_tokens
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


async def _mapped(items: AsyncIterator[Any], act: Callable[[Any], Any]) -> AsyncIterator[Any]:
    """`act` on each item in a task of its own; results as they finish, while items still come."""
    done: asyncio.Queue[Any] = asyncio.Queue()
    running: set[asyncio.Task[None]] = set()

    async def run(item: Any) -> None:
        try:
            done.put_nowait((await act(item), None))
        except Exception as error:
            done.put_nowait((None, error))

    async def feed() -> None:
        try:
            async for item in items:
                running.add(task := asyncio.create_task(run(item)))
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
            done.put_nowait((None, StopAsyncIteration()))
        except Exception as error:
            done.put_nowait((None, error))

    feeder = asyncio.create_task(feed())
    try:
        while True:
            result, error = await done.get()
            if isinstance(error, StopAsyncIteration):
                return
            if error is not None:
                raise error
            yield result
    finally:
        feeder.cancel()


async def _merged(streams: list[AsyncIterator[Any]]) -> AsyncIterator[Any]:
    """Items of several streams as they come; the first error ends all."""
    queue: asyncio.Queue[tuple[Any, BaseException | None]] = asyncio.Queue()

    async def pump(stream: AsyncIterator[Any]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((item, None))
            queue.put_nowait((None, StopAsyncIteration()))
        except Exception as error:
            queue.put_nowait((None, error))

    pumps = [asyncio.create_task(pump(stream)) for stream in streams]
    live = len(pumps)
    try:
        while live:
            item, error = await queue.get()
            if isinstance(error, StopAsyncIteration):
                live -= 1
            elif error is not None:
                raise error
            else:
                yield item
    finally:
        for task in pumps:
            task.cancel()

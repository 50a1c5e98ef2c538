"""All learner ranks as one: every call goes to all of them, in the same order, so that the collectives inside them meet."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray

from cluster.step_metrics import StepMetrics
from cluster.waits import Waiting, wait_all
from rollout.trajectory import Group


class Learners:
    """`ranks` are Ray handles of learner.worker.LearnerRank; `timeout_s` is the deadline of every call to them."""

    def __init__(self, ranks: list[Any], waiting: Waiting, timeout_s: float) -> None:
        self.ranks, self._waiting, self._timeout_s = ranks, waiting, timeout_s

    async def start(self, timeout_s: float) -> list[dict[str, Any]]:
        """Join the ranks into one process group and load the model; their reports."""
        host, port = (await wait_all(self._waiting, "start", "learner rank 0", timeout_s, [self.ranks[0].address.remote()]))[0]
        return await wait_all(self._waiting, "start", "learner ranks", timeout_s, self._send("start", host, port))

    async def call(self, method: str, *args: Any) -> list[Any]:
        """The method's result on every rank. Raises what a rank raised, RunError past the deadline."""
        return await self._results(method, self._send(method, *args))

    async def learn(self, step: int, groups: AsyncIterator[Group], meter: StepMetrics) -> dict[str, float]:
        """One optimiser step over the groups, each learned from while the next are still being drawn; the learner's metrics."""
        accumulating = self._send("begin_step", step)
        async for group in groups:
            meter.add_group(group)
            accumulating += self._send("accumulate", ray.put(group))
            if any(call.done() and call.exception() is not None for call in accumulating):
                break  # no need to draw the rest: the wait below raises it
        with meter.timed("time/wait_learner"):
            await self._results("accumulate", accumulating)
            return (await self.call("finish_step"))[0]

    def _send(self, method: str, *args: Any) -> list[asyncio.Future[Any]]:
        return [asyncio.ensure_future(getattr(rank, method).remote(*args)) for rank in self.ranks]

    async def _results(self, name: str, calls: list[asyncio.Future[Any]]) -> list[Any]:
        return await wait_all(self._waiting, name, "learner ranks", self._timeout_s, calls)

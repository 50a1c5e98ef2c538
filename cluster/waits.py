"""Every wait has a name and a deadline, and ends in an error of our own kind.

wait(waiting, "push", "learner ranks", 600, awaitable)
     |         what    for whom         deadline in seconds
     `- tells whoever looks: a run's `RunDir.waiting` (status.json), or `named` where there is no run
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ray.exceptions

from configs.errors import InputError, RunError

Waiting = Callable[[str, str, float], AbstractContextManager[None]]


@contextmanager
def named(name: str, for_whom: str, deadline_s: float) -> Iterator[None]:
    """Turns a TimeoutError of the body (Ray's and asyncio's are such) into a RunError that names the wait."""
    try:
        yield
    except TimeoutError as error:
        raise RunError(f"{name}: waited {deadline_s:g} s for {for_whom}, the deadline of this wait") from error


async def wait(waiting: Waiting, name: str, for_whom: str, deadline_s: float, awaitable: Awaitable[Any]) -> Any:
    """The awaitable's result. Raises RunError after the deadline or for a dead actor, and what an actor raised as it raised it."""
    with waiting(name, for_whom, deadline_s), actor_errors(f"{name}: {for_whom}"):
        async with asyncio.timeout(deadline_s):  # Python 3.11's wait_for forgets a Ctrl-C that comes with the result
            return await awaitable


async def wait_all(waiting: Waiting, name: str, for_whom: str, deadline_s: float, awaitables: list[Any]) -> list[Any]:
    """The results in order; the first error ends the wait."""
    results = asyncio.gather(*awaitables)
    results.add_done_callback(lambda done: done.cancelled() or done.exception())  # after Ctrl-C nobody asks for its error
    return list(await wait(waiting, name, for_whom, deadline_s, results))


async def each(waiting: Waiting, name: str, for_whom: str, deadline_s: float, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """The items (none of them None), each waited for with the same name and a deadline of its own."""
    while (item := await wait(waiting, name, for_whom, deadline_s, anext(items, None))) is not None:
        yield item


@contextmanager
def actor_errors(waiting_for: str) -> Iterator[None]:
    """Turn what Ray raises for an actor into the error that the actor raised, or into a RunError of one line."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        if isinstance(cause, InputError | RunError):
            raise cause from error
        raise RunError(f"{waiting_for}: {type(cause).__name__}: {first_line(cause)}") from error
    except ray.exceptions.RayActorError as error:
        raise RunError(f"{waiting_for}: an actor died: {first_line(error)}; --resume goes on from the last checkpoint") from error


def first_line(error: BaseException) -> str:
    """The first line of the error's message that says something, or its type where none does."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)

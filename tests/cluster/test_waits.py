"""Every wait ends: with its result, at its deadline by name, or with the error of what was waited for."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import ray

from cluster.rollouts import _as_put
from cluster.waits import actor_errors, each, named, wait, wait_all
from configs.errors import InputError, RunError


async def numbers(*pauses: float) -> AsyncIterator[int]:
    for number, pause in enumerate(pauses):
        await asyncio.sleep(pause)
        yield number


async def collect(items: AsyncIterator[Any]) -> list[Any]:
    return [item async for item in items]


def test_each_item_has_a_deadline_of_its_own() -> None:
    assert asyncio.run(collect(each(named, "rollout", "the next group", 0.2, numbers(0.1, 0.1, 0.1)))) == [0, 1, 2]
    with pytest.raises(RunError, match=r"rollout: waited 0.05 s for the next group"):
        asyncio.run(collect(each(named, "rollout", "the next group", 0.05, numbers(0.0, 60.0))))


def test_the_first_error_ends_a_wait_for_all() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def both() -> list[Any]:
        return await wait_all(named, "start", "engines", 30.0, [asyncio.sleep(60), fail()])

    with pytest.raises(ZeroDivisionError):
        asyncio.run(both())


def test_ctrl_c_is_heard_even_when_it_comes_with_the_result() -> None:
    async def main() -> None:
        result = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(wait(named, "rollout", "the next group", 30.0, result))
        await asyncio.sleep(0)
        result.set_result(1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


@pytest.mark.parametrize(
    ("cause", "expected", "says"),
    [
        (InputError("no such model"), InputError, "^no such model$"),
        (RunError("step 3: loss = nan"), RunError, "^step 3: loss = nan$"),
        (KeyError("x\ny"), RunError, r"^push: engines: KeyError: "),
    ],
)
def test_an_actors_error_arrives_as_the_actor_raised_it(cause: Exception, expected: type[Exception], says: str) -> None:
    with pytest.raises(expected, match=says), actor_errors("push: engines"):
        raise ray.exceptions.RayTaskError("f", "traceback", cause)


def test_what_is_put_comes_before_the_error_that_follows_it() -> None:
    async def fill(put: Any) -> None:
        async def one(number: int) -> None:
            await asyncio.sleep(0.01 * number)
            if number == 2:
                raise RunError("the third")
            put(number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(4):
                tasks.create_task(one(number))

    async def check() -> list[int]:
        seen = []
        with pytest.raises(RunError, match="the third"):
            async for item in _as_put(fill):
                seen.append(item)
        return seen

    assert asyncio.run(check()) == [0, 1]

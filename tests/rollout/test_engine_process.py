"""What is said of a dead engine process; that it is said in time is shown with a real one in tests/end_to_end/test_load.py."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from configs.errors import RunError
from rollout.engine_process import EngineProcess, last_words

VLLMS = "(EngineCore pid=99) ERROR 11-22 03:43:35 [core.py:1512] "
LOG = f"""
:actor_name:RolloutEngine
{VLLMS}an old line
{VLLMS}  File "core.py", line 676, in step
{VLLMS}    raise RuntimeError(
{VLLMS}           ^^^^^^^^^^^^
{VLLMS}RuntimeError: {"x" * 500}
(MainProcess pid={os.getpid()}) ERROR 11-22 03:43:35 [async_llm.py:906] see above for the root cause
tcmalloc: \xff
"""


def an_engine(exitcode: int | None, reader: Any) -> EngineProcess:
    manager = SimpleNamespace(processes=[SimpleNamespace(pid=17, exitcode=exitcode)])
    core = SimpleNamespace(resources=SimpleNamespace(engine_manager=manager))
    return EngineProcess(SimpleNamespace(engine_core=core, output_handler=reader), "engine-3")


def test_the_last_words_are_those_of_the_children_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert last_words() == ""
    os.write(2, LOG.encode("latin-1"))
    words = last_words()
    assert words.startswith('; last log lines: File "core.py", line 676, in step | raise RuntimeError( | RuntimeError: xxx')
    assert words.endswith("x | tcmalloc: \ufffd")
    assert len(words) < 300


@pytest.mark.parametrize(
    ("exitcode", "how"), [(None, "failed"), (-9, "was killed by signal 9"), (3, "ended with exit code 3")], ids=str
)
def test_an_error_names_the_engine_and_how_it_ended(exitcode: int | None, how: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(an_engine(exitcode, None).death()) == f"engine-3: vLLM's engine process 17 {how}"


def test_a_call_ends_when_it_is_answered_or_when_the_process_dies(capfd: pytest.CaptureFixture[str]) -> None:
    async def fails() -> None:
        raise ValueError("a reason of its own")

    async def calls() -> None:
        reader = asyncio.get_running_loop().create_future()
        engine = an_engine(-9, reader)
        assert await engine.answer(asyncio.sleep(0, "answer")) == "answer"
        with pytest.raises(ValueError, match="a reason of its own"):
            await engine.answer(fails())
        asyncio.get_running_loop().call_later(0.1, reader.set_result, None)
        failing, waiting = await asyncio.gather(
            engine.answer(fails()), engine.answer(asyncio.Event().wait()), return_exceptions=True
        )
        for error in (failing, waiting):
            assert isinstance(error, RunError) and "killed by signal 9" in str(error)

    asyncio.run(asyncio.wait_for(calls(), 20))

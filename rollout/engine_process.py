"""vLLM's engine process, EngineCore, as the actor that started it sees it: alive or dead, counting, and its last words.

vLLM answers a request to a dead process with EngineDeadError, but leaves unanswered every other call that was under way when it
died: a weight push or the fetching of a record would wait for ever. `EngineProcess.answer` ends with an error in either case.
"""

import asyncio
import os
import re
import stat
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from configs.errors import RunError
from rollout.plugin import CORE_METHOD, PLUGIN_ADVICE

DEATH_S = 1.0  # how long EngineCore takes at most to end after a call has failed because it will
LOG_LINES, LOG_LINE_CHARACTERS = 4, 200  # of the log, in an error message
LOG_TAIL_BYTES = 16384
VLLMS_MARK = re.compile(r"^\(\S+ pid=(\d+)\) [A-Z]+ \S+ \S+ \[\S+\] ?")  # before every line: process, level, time, place
RAYS_OWN = (":job_id:", ":actor_name:", ":task_name:")  # marks that Ray writes into the logs of its workers


class EngineProcess:
    """The EngineCore process behind a live vllm.v1.engine.async_llm.AsyncLLM."""

    def __init__(self, llm: Any, name: str) -> None:
        self._llm, self._name = llm, name
        self._process = llm.engine_core.resources.engine_manager.processes[0]  # data parallelism would have more
        self.pid: int = self._process.pid

    async def answer(self, call: Coroutine[Any, Any, Any]) -> Any:
        """What a call to vLLM returns. Raises RunError when EngineCore is dead, or dies in the meantime."""
        answer = asyncio.ensure_future(call)
        reader = self._llm.output_handler  # vLLM's task that reads EngineCore's messages; it ends when EngineCore does
        try:
            await asyncio.wait({answer, reader}, return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise self.death()
        except RunError:
            raise
        except Exception as error:  # EngineDeadError, or what a worker's death looks like before EngineCore follows it
            await asyncio.wait({reader}, timeout=DEATH_S)
            if reader.done():
                raise self.death() from error
            raise
        finally:
            answer.cancel()

    async def plugin(self) -> str:
        """What softrl's plugin says of itself in EngineCore's process. Raises RunError when it is not there.

        vLLM goes on without a plugin that it was kept from loading, and blocks of different thoughts would then be shared.
        """
        try:
            return str(await self.answer(self._llm.engine_core.call_utility_async(CORE_METHOD)))
        except RunError:
            raise
        except Exception as error:  # vLLM's answer to a method that EngineCore does not have
            raise RunError(f"{self._name}: vLLM's engine process runs without softrl's plugin; {PLUGIN_ADVICE}") from error

    def death(self) -> RunError:
        """The error of a dead EngineCore: how it ended, and the last lines of the log that it shares with this process."""
        code = self._process.exitcode
        how = "failed" if code is None else f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RunError(f"{self._name}: vLLM's engine process {self.pid} {how}{last_words()}")


def last_words() -> str:
    """What an error message says of the log that EngineCore shares with this process; empty where there is none."""
    lines = _last_log_lines()
    return f"; last log lines: {' | '.join(lines)}" if lines else ""


def _last_log_lines() -> list[str]:
    """The last lines that the children of this process wrote to standard error, shortened; none where that is no file."""
    log = Path("/proc/self/fd/2")
    try:
        if not stat.S_ISREG(log.stat().st_mode):
            return []
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = []
    for line in text.splitlines():
        mark = VLLMS_MARK.match(line)
        ours = mark is not None and int(mark[1]) == os.getpid()  # what this process says of the death is not its cause
        said = line[mark.end() if mark else 0 :].strip(" \t^")
        if said and not ours and not line.startswith(RAYS_OWN):
            lines.append(said[:LOG_LINE_CHARACTERS])
    return lines[-LOG_LINES:]


class EngineCounters:
    """Counts what vLLM's statistics say of every step, through a stat logger of vLLM's kind."""

    def __init__(self) -> None:
        self.preemptions = 0  # requests, each time one is preempted
        self.prefix_cache_hits = 0  # prompt tokens of new requests whose KV was there already
        self.generated = 0  # positions that vLLM counts as decoded

    def logger_factory(self) -> Any:
        """What AsyncLLM takes in `stat_loggers`."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        counters = self

        class Counter(StatLoggerBase):
            def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
                pass

            def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
                if iteration_stats is not None:
                    counters.preemptions += iteration_stats.num_preempted_reqs
                    counters.generated += iteration_stats.num_generation_tokens
                if scheduler_stats is not None:
                    counters.prefix_cache_hits += scheduler_stats.prefix_cache_stats.hits

            def log_engine_initialized(self) -> None:
                pass

        return Counter

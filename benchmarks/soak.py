"""Soak: thousands of requests from callers of every kind, and pushes in the middle, against one small engine.

    python -m benchmarks.soak [--requests 10000] [--seed 0] [--json FILE]    prints one JSON line; exit code 1 when a check fails

    callers    whole      take every trajectory
               cancelled  call off what they asked for, at some moment (ray.cancel)
               dropped    stop listening
               killed     are processes that die
    load       a KV cache for a third of what is asked for at once, prompts in parts: preemption all the time
    pushes     of the weights that are there already, every so often, requests in flight replayed from their records

Checked: every trajectory that a caller waited for came, once, and is the one asked for; at the end nothing is in flight, no slot is
held, no record waits; the memory of the engine's processes is what it was when a fifth of the requests had passed.
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from safetensors.torch import load_file

from cluster.placement import placed
from configs.schema import TAU_OF_MODE, Mode
from learner.push import EngineClient, LearnerSource, ParamMeta, SharedMemoryTrainer, SharedMemoryTrainerInfo
from rollout.trajectory import SampleRequest, Trajectory
from tests.end_to_end.conftest import tiny_config
from tests.tiny_model import make_tiny_llama

AT_ONCE = 48  # requests that callers wait for
CALL_SIZES = (1, 8)  # requests of one call, from and to
KINDS = {"whole": 0.7, "cancelled": 0.18, "dropped": 0.12}  # of callers; and every so often one is killed, which takes seconds
KILLED_EVERY, PUSH_EVERY = 200, 25  # calls
PROMPTS = [np.random.default_rng(i).integers(3, 40_000, 6 + 7 * i, dtype=np.int32) for i in range(8)]
MEMORY_SAMPLES = 10
MEMORY_GROWTH = 0.05  # of the resident memory after a fifth of the requests
DEADLINE_S = 600.0

SMALL = [
    "push.in_flight=recompute",
    "policy.max_cot_tokens=20",
    "policy.max_answer_tokens=6",
    "engine.max_model_len=128",
    "engine.max_num_seqs=32",
    "engine.max_num_batched_tokens=64",
    f"engine.kv_cache_gib={40 * 32 / 2**20}",  # 40 blocks of 32 tokens
]


@dataclass
class Tally:
    """What became of the calls, and of the requests of those who waited."""

    calls: dict[str, int]
    pushes: int = 0
    requests: int = 0
    received: int = 0
    lost: int = 0
    doubled: int = 0
    wrong: int = 0  # not what was asked for


class Soak:
    """Callers of one engine (Ray handle of RolloutEngine, started) and the pushes to it."""

    def __init__(self, engine: Any, report: dict[str, Any], model_dir: Path, seed: int) -> None:
        self.engine, self.report, self.chance = engine, report, random.Random(seed)
        self.sigma = 0.33 * float(report["rms_embedding"])
        self.tally = Tally(dict.fromkeys([*KINDS, "killed"], 0))
        self.calls = 0
        weights = load_file(model_dir / "model.safetensors")
        metas = [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
        self.client = EngineClient([engine], 1, DEADLINE_S)
        self.pusher = SharedMemoryTrainer.trainer_init(
            SharedMemoryTrainerInfo(rank=0), client=self.client, source=LearnerSource(metas, lambda: iter(weights.items()))
        )

    async def run(self, requests: int) -> dict[str, Any]:
        """Send the requests and wait for all callers; the figures of the JSON line."""
        room, callers = asyncio.Semaphore(AT_ONCE), set[asyncio.Task[None]]()
        begun, resident = time.monotonic(), list[float]()
        while self.tally.requests < requests:
            wanted = self._requests(min(self.chance.randint(*CALL_SIZES), requests - self.tally.requests))
            for _ in wanted:
                await room.acquire()
            kind = self.chance.choices(list(KINDS), list(KINDS.values()))[0]
            kind = "killed" if self.calls % KILLED_EVERY == 20 else kind
            self.tally.calls[kind] += 1
            callers.add(task := asyncio.create_task(self._call(kind, wanted, room)))
            task.add_done_callback(callers.discard)
            for failed in [t for t in callers if t.done() and t.exception() is not None]:
                failed.result()
            if self.calls % PUSH_EVERY == 0:
                await asyncio.to_thread(self._push)
            if self.tally.requests >= (len(resident) + 1) * requests / MEMORY_SAMPLES:
                resident.append(resident_mib(self.report["pid"]))
        await asyncio.gather(*callers)
        held = await self._held_at_rest()
        resident.append(resident_mib(self.report["pid"]))
        tally = vars(self.tally)
        growth = resident[-1] / resident[MEMORY_SAMPLES // 5 - 1] - 1
        leaked = held["in_flight"] + held["slots_used"] + held["records_untaken"]
        bad = self.tally.lost + self.tally.doubled + self.tally.wrong
        return {
            **tally,
            "seconds": round(time.monotonic() - begun, 1),
            **held,
            "resident_mib": [round(mib) for mib in resident],  # after each tenth of the requests, and at rest
            "memory_growth": round(growth, 4),
            "ok": not bad and not leaked and growth <= MEMORY_GROWTH,
        }

    # ------------------------------------------------------------------ callers

    def _requests(self, count: int) -> list[SampleRequest]:
        """One call's requests: of one prompt, as a group is, in random modes and lengths. The call's number is its prompt index."""
        prompt = self.chance.choice(PROMPTS)
        self.calls += 1
        self.tally.requests += count
        return [
            SampleRequest(
                prompt_ids=prompt, prompt_index=self.calls, sample_index=sample, mode=mode, tau=TAU_OF_MODE[mode],
                sigma=0.0 if mode is Mode.hard else self.sigma, seed=self.chance.getrandbits(63),
                max_cot_tokens=self.chance.randint(1, 20), max_answer_tokens=self.chance.randint(1, 6), answer_temperature=1.0,
                record_full=self.chance.random() < 0.1,
            )
            for sample in range(count)
            for mode in [self.chance.choice(list(Mode))]
        ]  # fmt: skip

    async def _call(self, kind: str, wanted: list[SampleRequest], room: asyncio.Semaphore) -> None:
        """A call, until nobody waits for it any more."""
        patience = self.chance.expovariate(1 / 0.2)
        try:
            if kind == "killed":
                await self._killed(wanted, patience)
                return
            stream = self.engine.generate.options(num_returns="streaming").remote(wanted)
            found: list[Trajectory] = []
            try:
                async with asyncio.timeout(DEADLINE_S if kind == "whole" else patience):
                    async for ref in stream:
                        found.append(await ref)
            except TimeoutError:
                if kind == "whole":
                    raise
                if kind == "cancelled":
                    ray.cancel(stream)
            self._count(wanted, found, waited=kind == "whole")
        finally:
            for _ in wanted:
                room.release()

    async def _killed(self, wanted: list[SampleRequest], patience: float) -> None:
        caller = ray.remote(Caller).options(num_cpus=0).remote()
        try:
            async with asyncio.timeout(1 + patience):
                await caller.call.remote(self.engine, wanted)
        except TimeoutError:
            pass
        finally:
            ray.kill(caller)

    def _count(self, wanted: list[SampleRequest], found: list[Trajectory], waited: bool) -> None:
        asked = {(r.prompt_index, r.sample_index): r for r in wanted}
        places = [(t.prompt_index, t.sample_index) for t in found]
        self.tally.received += len(found)
        self.tally.doubled += len(places) - len(set(places))
        self.tally.lost += len(asked.keys() - set(places)) if waited else 0
        for place, t in zip(places, found, strict=True):
            r = asked.get(place)
            right = r is not None and (t.mode, t.noise_seed) == (r.mode, r.seed) and t.cot_length <= r.max_cot_tokens
            self.tally.wrong += not right

    # ------------------------------------------------------------------ the engine

    def _push(self) -> None:
        self.tally.pushes += 1
        self.client.version = str(self.tally.pushes)
        self.pusher.send_weights()

    async def _held_at_rest(self) -> dict[str, int]:
        """The engine's statistics once nothing is in flight, or when that takes too long."""
        for _ in range(200):
            held: dict[str, int] = await self.engine.stats.remote()
            if not (held["in_flight"] or held["slots_used"] or held["records_untaken"]):
                break
            await asyncio.sleep(0.05)
        return held


class Caller:
    """A caller in a process of its own, which can die."""

    async def call(self, engine: Any, wanted: list[SampleRequest]) -> None:
        """Take every trajectory."""
        async for ref in engine.generate.options(num_returns="streaming").remote(wanted):
            await ref


def resident_mib(pid: int) -> float:
    """Resident memory of the engine's actor, of vLLM's engine process `pid` that it started, and of that one's workers."""
    actor = psutil.Process(pid).parent()
    assert actor is not None
    return sum(p.memory_info().rss for p in [actor, *actor.children(recursive=True)]) / 2**20


def soak(requests: int, seed: int = 0) -> dict[str, Any]:
    """Run it in the Ray cluster that this process is connected to; the figures of the JSON line."""
    with tempfile.TemporaryDirectory() as folder:
        model_dir = make_tiny_llama(Path(folder), hidden=128)
        config = tiny_config(model_dir, *SMALL)
        with placed(config, str(model_dir), with_learner=False) as cluster:
            report = ray.get(cluster.engines[0].start.remote(), timeout=DEADLINE_S)
            return asyncio.run(Soak(cluster.engines[0], report, model_dir, seed).run(requests))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    arguments = parser.parse_args()
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    figures = soak(arguments.requests, arguments.seed)
    print(json.dumps(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")
    raise SystemExit(0 if figures["ok"] else 1)


if __name__ == "__main__":
    main()

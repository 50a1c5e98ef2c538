"""An engine whose model is split over two ranks draws what an engine of one rank draws, and what the learner recomputes.

    whole    one rank, room for all
    split    two ranks, few requests at a time
    crowded  two ranks, more requests than the KV cache holds: preempted, and replayed from the record of each rank

Ranks add their parts of every layer, so logits differ by float32 rounding: what that does to trajectories is said in test_load.py.
"""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from cluster.placement import placed
from configs.errors import RunError
from configs.schema import TAU_OF_MODE, Mode
from rollout.reward import Scorer
from rollout.trajectory import Group, Sample, SampleRequest, Trajectory
from tests.end_to_end.conftest import Rig, problems, start, tiny_config

pytestmark = pytest.mark.slow

BLOCKS = 20  # of the KV cache of the engine of two ranks; a request takes up to five
FEW = 3  # requests that fit into it with all they generate
SPLIT = [
    "engine.tensor_parallel=2",
    "engine.max_num_seqs=16",
    "learner.lr=0",
    f"engine.kv_cache_gib={BLOCKS * 16 / 2**20}",  # each rank has one of the two key-value heads: 16 KiB a block
]
PROMPTS, SAMPLES = 4, 6
LOGPROB_GAP = 1e-4  # float32, log-probs down to -25
DEATH_S = 20  # until everyone has heard of a dead rank

Place = tuple[int, int]  # prompt, sample
Drawn = dict[Place, Trajectory]


@dataclass
class Engines:
    """A learner with an engine of two ranks, and an engine of one rank; all hold the same weights."""

    split: Rig
    whole: Any
    whole_report: dict[str, Any]

    def push(self, weights: dict[str, Any], version: int) -> None:
        for engine in (self.split.engine, self.whole):
            self.split.push_tensors(list(weights), weights, engine, version)

    def logprobs(self, engine: Any) -> np.ndarray:
        fixed = [self.split.rollouts.prompt_ids(problem) for problem in problems(4)]
        return np.concatenate(self.split.call(engine.token_logprobs.remote(fixed)))


@pytest.fixture(scope="module")
def engines(ray_cluster: None, tiny_llama: Path) -> Iterator[Engines]:
    with ExitStack() as stack:
        config = tiny_config(tiny_llama, *SPLIT)
        whole = stack.enter_context(placed(tiny_config(tiny_llama), str(tiny_llama), with_learner=False)).engines[0]
        starting = whole.start.remote()  # while the other does
        cluster, scorer = stack.enter_context(placed(config, str(tiny_llama))), stack.enter_context(Scorer(workers=1))
        rollouts, report = start(config, tiny_llama, cluster, scorer)
        rig = Rig(config, tiny_llama, cluster.engines[0], cluster.learners[0], report, rollouts)
        rig.call(rig.learner.connect.remote([rig.engine], [rollouts.prompt_ids(problem) for problem in problems(4)]))
        yield Engines(rig, whole, rig.call(starting))


def requests(rig: Rig) -> list[SampleRequest]:
    modes, found = list(Mode), []
    for problem in problems(PROMPTS):
        for sample in range(SAMPLES):
            request, mode = rig.rollouts.request(problem, 0, sample), modes[(problem.index + sample) % 3]
            sigma = 0.0 if mode is Mode.hard else request.sigma
            found.append(replace(request, mode=mode, tau=TAU_OF_MODE[mode], sigma=sigma, max_cot_tokens=24 + 8 * (sample % 3)))
    return found


def draw(rig: Rig, engine: Any, wanted: list[SampleRequest]) -> Drawn:
    found = [rig.call(ref) for ref in engine.generate.options(num_returns="streaming").remote(wanted)]
    return {(t.prompt_index, t.sample_index): t for t in found}


def preemptions(rig: Rig) -> int:
    return int(rig.call(rig.engine.stats.remote())["preemptions"])


@pytest.fixture(scope="module")
def drawn(engines: Engines) -> Callable[[str], Drawn]:
    """What was drawn under a condition, by its name; each is drawn once."""
    rig, wanted = engines.split, requests(engines.split)

    def drawn_as(condition: str) -> Drawn:
        if condition == "whole":
            return draw(rig, engines.whole, wanted)
        before = preemptions(rig)
        if condition == "split":
            parts = (wanted[i : i + FEW] for i in range(0, len(wanted), FEW))
            found = {place: t for part in parts for place, t in draw(rig, rig.engine, part).items()}
            assert preemptions(rig) == before
            return found
        found = draw(rig, rig.engine, wanted)
        assert preemptions(rig) > before
        return found

    return cache(drawn_as)


def learned(rig: Rig, trajectories: list[Trajectory]) -> dict[str, float]:
    """What the learner says of trajectories; its weights stay, as its learning rate is 0."""
    rig.call(rig.learner.begin_step.remote(0))
    for index in sorted({t.prompt_index for t in trajectories}):
        of_prompt = [t for t in trajectories if t.prompt_index == index]
        samples = [Sample(trajectory=t, reward=10.0 * (i % 3), correct=False, answer_text="") for i, t in enumerate(of_prompt)]
        rig.call(rig.learner.accumulate.remote(Group(step=0, prompt_index=index, samples=tuple(samples))))
    return rig.call(rig.learner.finish_step.remote())


def agreement(found: Drawn, expected: Drawn, mode: Mode) -> float:
    """The part of the trajectories of a mode that agree: of hard and fuzzy ones all tokens, of soft ones the first steps."""

    def agree(a: Trajectory, b: Trajectory) -> bool:
        if mode is Mode.soft:
            return np.array_equal(a.shadow_ids[:8], b.shadow_ids[:8])
        return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("shadow_ids", "prefill_ids", "answer_ids"))

    of_mode = [agree(t, expected[place]) for place, t in found.items() if t.mode is mode]
    return sum(of_mode) / len(of_mode)


def test_an_engine_of_two_ranks_reports_what_one_of_one_does(engines: Engines) -> None:
    split, whole = dict(engines.split.report), dict(engines.whole_report)
    assert split.pop("rms_embedding") == pytest.approx(whole.pop("rms_embedding"), rel=1e-12)
    for report in (split, whole):
        report.pop("engine"), report.pop("pid"), report.pop("threads")
    assert split == whole
    assert np.abs(engines.logprobs(engines.split.engine) - engines.logprobs(engines.whole)).max() < LOGPROB_GAP


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("condition", ["split", "crowded"])
def test_two_ranks_draw_what_one_draws(engines: Engines, drawn: Callable[[str], Drawn], condition: str, mode: Mode) -> None:
    rig = engines.split
    whole, found = ([t for t in drawn(name).values() if t.mode is mode] for name in ("whole", condition))
    assert agreement(drawn(condition), drawn("whole"), mode) >= 0.75
    bounds, metrics = learned(rig, whole), learned(rig, found)
    for key in ("learner/answer_logprob_gap_mean", "learner/mismatch_s_p99"):
        if key in bounds:
            assert metrics[key] <= 2 * bounds[key], key
    if mode is not Mode.hard:
        width, steps = len(rig.checkpoint_tensors()["model.norm.weight"]), sum(t.cot_length for t in found)
        assert metrics["learner/residual_mean"] == pytest.approx(1.0, abs=5 * (2 / (width * steps)) ** 0.5)


def test_a_push_reaches_both_ranks(engines: Engines) -> None:
    rig = engines.split
    weights, before = rig.checkpoint_tensors(), engines.logprobs(rig.engine)
    table = "model.embed_tokens.weight"
    engines.push({name: t.flip(0) if name == table else 1.5 * t if t.ndim == 2 else t for name, t in weights.items()}, 1)
    after = engines.logprobs(rig.engine)
    assert np.abs(after - before).max() > 0.1
    assert np.abs(after - engines.logprobs(engines.whole)).max() < LOGPROB_GAP
    rig.call(rig.learner.push.remote(2))
    assert rig.call(rig.learner.verify.remote(2)) < LOGPROB_GAP
    assert np.abs(engines.logprobs(rig.engine) - before).max() < LOGPROB_GAP


def test_every_rank_gives_back_its_slots(engines: Engines) -> None:
    rig = engines.split
    draw(rig, rig.engine, requests(rig)[:1])  # vLLM tells its workers of finished requests with the next batch
    first, second = rig.call(rig.engine._rpc.remote("softrl_stats"))
    assert first == second
    assert json.loads(first)["slots_used"] <= 1 and json.loads(first)["records_untaken"] == 0


def test_a_dead_rank_is_a_dead_engine(engines: Engines) -> None:
    """The last test: the engine of two ranks draws no more."""
    rig = engines.split
    tasks = Path(f"/proc/{rig.report['pid']}/task").iterdir()
    children = [pid for task in tasks for pid in (task / "children").read_text().split()]
    ranks = [pid for pid in children if Path(f"/proc/{pid}/comm").read_text().startswith("VLLM::Worker")]
    assert len(ranks) == 2
    stream = rig.engine.generate.options(num_returns="streaming").remote(requests(rig))
    os.kill(int(ranks[1]), signal.SIGKILL)
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        for ref in stream:
            ray.get(ref, timeout=DEATH_S)
    assert isinstance(caught.value.cause, RunError) and "\n" not in str(caught.value.cause)
    assert caught.match(f"vLLM's engine process {rig.report['pid']}")

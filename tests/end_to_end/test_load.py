"""Soft decoding under every condition that a busy engine meets is soft decoding in a calm one.

    calm         rig    the samples of a prompt one after the other: nothing to share, nobody waits
    siblings     rig    all at once: the samples of a prompt share its blocks
    kept         rig    the same through three pushes, each of which keeps their KV
    chunked      busy   prompts longer than a step's token budget, in parts among requests that decode
    preempted    busy   more requests than the KV cache holds, each replayed from its record, in parts too
    recomputed   busy   through three pushes, each of which makes their KV anew
    arriving     busy   each by itself at a random moment

Such a push brings the weights that are there already, so nothing may change: the learner finds every policy within the bounds of
the calm run. Trajectories are equal bit for bit where no batch differs (kept and siblings). Elsewhere the batch decides how float32
sums are grouped: a sampled token rarely falls the other way, but a soft input carries a difference of 1e-6 on to the next step,
where it is six times as large, so that only the first steps of soft trajectories can be compared.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from cluster.placement import placed
from configs.errors import RunError
from configs.schema import TAU_OF_MODE, Mode
from learner.push import EngineClient
from rollout.trajectory import Group, Sample, SampleRequest, Trajectory
from tests.end_to_end.conftest import DEADLINE_S, Rig, problems, tiny_config

pytestmark = pytest.mark.slow

QUESTION_FIRST = (  # prompts that share nothing with each other, each longer than a block
    "{question} Think about it step by step, write down every step on a line of its own, check what you have found with another "
    "method, and then give the answer, which is a whole number, in a box."
)
RIG = ["learner.lr=0", "push.in_flight=keep", f"task.prompt='{QUESTION_FIRST}'"]
BLOCK, BUDGET = 32, 24  # tokens
BUSY = [
    "push.in_flight=recompute",
    "engine.max_num_seqs=16",
    f"engine.max_num_batched_tokens={BUDGET}",
    f"engine.kv_cache_gib={20 * 32 / 2**20}",  # 20 blocks, of which a request takes up to five
]
PROMPTS, SAMPLES, PUSHES = 8, 8, 3
DEATH_S = 20  # until everyone has heard of a dead engine


@dataclass
class Busy:
    """An engine without a learner, too small for what is asked of it."""

    engine: Any
    report: dict[str, Any]


@pytest.fixture(scope="module")
def starting(ray_cluster: None, tiny_llama: Path) -> Iterator[tuple[Any, Any]]:
    """The busy engine and its report to come; it starts while `rig` does."""
    config = tiny_config(tiny_llama, *BUSY)
    with placed(config, str(tiny_llama), with_learner=False) as cluster:
        yield cluster.engines[0], cluster.engines[0].start.remote()


@pytest.fixture(scope="module")
def busy(starting: tuple[Any, Any], rig: Rig) -> Busy:
    engine, report = starting
    return Busy(engine, rig.call(report))


# Requests and what becomes of them

Place = tuple[int, int]  # prompt, sample
Drawn = dict[Place, Trajectory]


def requests(rig: Rig) -> list[SampleRequest]:
    """64 requests: eight samples of eight prompts, in all modes, of several lengths."""
    modes, found = list(Mode), []
    for problem in problems(PROMPTS):
        for sample in range(SAMPLES):
            request, mode = rig.rollouts.request(problem, 0, sample), modes[(problem.index + sample) % 3]
            sigma = 0.0 if mode is Mode.hard else request.sigma
            length = 16 + 8 * (sample % 4)
            found.append(replace(request, mode=mode, tau=TAU_OF_MODE[mode], sigma=sigma, max_cot_tokens=length))
    return found


def begin(engine: Any, wanted: list[SampleRequest]) -> Any:
    return engine.generate.options(num_returns="streaming").remote(wanted)


def gather(*streams: Any) -> Drawn:
    found = [ray.get(ref, timeout=DEADLINE_S) for stream in streams for ref in stream]
    by_place = {(t.prompt_index, t.sample_index): t for t in found}
    assert len(by_place) == len(found)
    return by_place


def stat(engine: Any, name: str) -> int:
    return ray.get(engine.stats.remote(), timeout=DEADLINE_S)[name]


def wait_for(engine: Any, generated: int) -> None:
    """Until the engine has decoded so many positions since its start."""
    while stat(engine, "generated") < generated:
        time.sleep(0.002)


def draw_through(engine: Any, wanted: list[SampleRequest], *pushes: Callable[[], Any]) -> Drawn:
    """Draw with the pushes at equal distances, the last before half of the positions are decoded."""
    begun, steps = stat(engine, "generated"), sum(r.max_cot_tokens for r in wanted)
    stream = begin(engine, wanted)
    for i, push in enumerate(pushes, start=1):
        wait_for(engine, begun + i * steps // (2 * len(pushes)))
        push()
    return gather(stream)


def drawn_through(found: Drawn) -> list[Trajectory]:
    """The trajectories that were being drawn when a push came. All say exactly where."""
    for t in found.values():
        assert t.weight_version_starts[0] == 0 and t.weight_version_starts[-1] < t.generated
        assert (np.diff(t.weight_version_starts) > 0).all() and (np.diff(t.weight_versions) > 0).all()
        assert len(t.weight_versions) == len(t.weight_version_starts)
    return [t for t in found.values() if len(t.weight_versions) > 1]


class Pushes:
    """Pushes of the learner's weights, or of other ones, each with a version of its own."""

    def __init__(self, rig: Rig, busy: Busy) -> None:
        self.rig, self.busy, self.version = rig, busy, 0
        self.weights = rig.checkpoint_tensors()
        noise = torch.Generator().manual_seed(0)
        self.others = {
            name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=noise) if tensor.ndim == 2 else tensor
            for name, tensor in self.weights.items()
        }

    def to_rig(self) -> None:
        self.version += 1
        self.rig.call(self.rig.learner.push.remote(self.version))

    def to_busy(self) -> None:
        self._send(self.weights, self.busy.engine)

    def others_to(self, engine: Any) -> None:
        self._send(self.others, engine)

    def _send(self, weights: dict[str, torch.Tensor], engine: Any) -> None:
        self.version += 1
        self.rig.push_tensors(list(weights), weights, engine, self.version)


@pytest.fixture(scope="module")
def pushes(rig: Rig, busy: Busy) -> Pushes:
    return Pushes(rig, busy)


class Conditions:
    """Draws the requests under a condition, and sees to it that it was met."""

    def __init__(self, rig: Rig, busy: Busy, pushes: Pushes) -> None:
        self.rig, self.busy, self.pushes, self.requests = rig.engine, busy.engine, pushes, requests(rig)

    def calm(self) -> Drawn:
        before = stat(self.rig, "prefix_cache_hits")
        by_sample = ([r for r in self.requests if r.sample_index == sample] for sample in range(SAMPLES))
        found = {place: t for wanted in by_sample for place, t in gather(begin(self.rig, wanted)).items()}
        assert stat(self.rig, "prefix_cache_hits") == before
        return found

    def siblings(self) -> Drawn:
        before = stat(self.rig, "prefix_cache_hits")
        found = gather(begin(self.rig, self.requests))
        assert stat(self.rig, "prefix_cache_hits") == before + BLOCK * PROMPTS * (SAMPLES - 1)
        return found

    def kept(self) -> Drawn:
        found = draw_through(self.rig, self.requests, *[self.pushes.to_rig] * PUSHES)
        assert stat(self.rig, "preemptions") == 0
        assert len(drawn_through(found)) > len(found) // 2
        return found

    def chunked(self) -> Drawn:
        before, found = stat(self.busy, "preemptions"), {}
        for prompt in range(0, PROMPTS, 2):
            wanted = [r for r in self.requests if r.prompt_index == prompt][:6]
            assert min(len(r.prompt_ids) for r in wanted) > 2 * BUDGET
            found |= gather(begin(self.busy, wanted))
        assert stat(self.busy, "preemptions") == before
        return found

    def preempted(self) -> Drawn:
        before = stat(self.busy, "preemptions")
        found = gather(begin(self.busy, self.requests))
        assert stat(self.busy, "preemptions") >= before + 10
        return found

    def recomputed(self) -> Drawn:
        before = stat(self.busy, "preemptions")
        found = draw_through(self.busy, [r for r in self.requests if r.sample_index < 6], *[self.pushes.to_busy] * PUSHES)
        assert len(drawn_through(found)) > 10
        assert stat(self.busy, "preemptions") > before + 10
        return found

    def arriving(self) -> Drawn:
        chance, streams = random.Random(0), []
        for request in chance.sample(self.requests, len(self.requests)):
            streams.append(begin(self.busy, [request]))
            time.sleep(chance.expovariate(1 / 0.02))
        return gather(*streams)


@pytest.fixture(scope="module")
def drawn(rig: Rig, busy: Busy, pushes: Pushes) -> Callable[[str], Drawn]:
    """What was drawn under a condition, by its name; each is drawn once."""
    conditions = Conditions(rig, busy, pushes)
    return cache(lambda name: getattr(conditions, name)())


@pytest.fixture(scope="module")
def calm_bounds(rig: Rig, drawn: Callable[[str], Drawn]) -> Callable[[Mode], dict[str, float]]:
    """What the learner says of the calm trajectories of a mode."""
    return cache(lambda mode: learned(rig, [t for t in drawn("calm").values() if t.mode is mode]))


def learned(rig: Rig, trajectories: list[Trajectory]) -> dict[str, float]:
    """What the learner says of trajectories; its weights stay, as its learning rate is 0."""
    rig.call(rig.learner.begin_step.remote(0))
    for index in sorted({t.prompt_index for t in trajectories}):
        of_prompt = [t for t in trajectories if t.prompt_index == index]
        samples = [Sample(trajectory=t, reward=10.0 * (i % 3), correct=False, answer_text="") for i, t in enumerate(of_prompt)]
        rig.call(rig.learner.accumulate.remote(Group(step=0, prompt_index=index, samples=tuple(samples))))
    return rig.call(rig.learner.finish_step.remote())


def same(a: Trajectory, b: Trajectory) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("shadow_ids", "prefill_ids", "answer_ids"))


def starts_alike(a: Trajectory, b: Trajectory) -> bool:
    return np.array_equal(a.shadow_ids[:8], b.shadow_ids[:8])


def equal_to_the_bit(a: Trajectory, b: Trajectory) -> bool:
    spans = ("weight_versions", "weight_version_starts")
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name not in spans)


# What holds


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("condition", ["siblings", "kept", "chunked", "preempted", "recomputed", "arriving"])
def test_a_loaded_engine_draws_what_a_calm_one_draws(
    rig: Rig, drawn: Callable[[str], Drawn], calm_bounds: Callable[[Mode], dict[str, float]], condition: str, mode: Mode
) -> None:
    calm, bounds, found = drawn("calm"), calm_bounds(mode), {p: t for p, t in drawn(condition).items() if t.mode is mode}
    metrics = learned(rig, list(found.values()))
    for key in ("learner/answer_logprob_gap_mean", "learner/mismatch_s_p99"):
        if key in bounds:
            assert metrics[key] <= 2 * bounds[key], key
    if mode is not Mode.hard:
        width = len(rig.checkpoint_tensors()["model.norm.weight"])
        steps = sum(t.cot_length for t in found.values())
        assert metrics["learner/residual_mean"] == pytest.approx(1.0, abs=5 * (2 / (width * steps)) ** 0.5)
    equal = sum(starts_alike(t, calm[place]) if mode is Mode.soft else same(t, calm[place]) for place, t in found.items())
    assert equal >= 0.75 * len(found)


def test_standing_still_for_a_push_changes_no_bit(drawn: Callable[[str], Drawn]) -> None:
    kept, siblings = drawn("kept"), drawn("siblings")
    assert all(equal_to_the_bit(kept[place], t) for place, t in siblings.items())


def test_keys_and_values_after_a_push_are_those_of_the_weights_that_push_in_flight_says(
    rig: Rig, busy: Busy, pushes: Pushes
) -> None:
    """From other weights to the learner's, in the middle of the CoT: what the answers are drawn with shows in their log-probs."""
    wanted = [r for r in requests(rig) if r.prompt_index < 2 and r.mode is not Mode.fuzzy]
    gaps = []
    for engine, push in ((rig.engine, pushes.to_rig), (busy.engine, pushes.to_busy)):
        pushes.others_to(engine)
        through = drawn_through(draw_through(engine, wanted, push))
        in_cot = [t for t in through if t.weight_version_starts[1] < t.cot_length]
        gaps.append(learned(rig, in_cot)["learner/answer_logprob_gap_mean"])
    kept, recomputed = gaps
    assert kept > 0.01
    assert recomputed < 1e-4


def test_prompts_are_shared_only_with_requests_of_the_same_weights(rig: Rig, pushes: Pushes, drawn: Callable[[str], Drawn]) -> None:
    calm = drawn("calm")
    siblings = [r for r in requests(rig) if r.prompt_index == 0]
    pushes.others_to(rig.engine)
    before = stat(rig.engine, "generated")
    first = begin(rig.engine, siblings[:4])
    wait_for(rig.engine, before + 20)
    pushes.to_rig()
    second = gather(begin(rig.engine, siblings[4:]))
    assert drawn_through(gather(first))  # so their prompt was in the cache when the others came
    assert {int(v) for t in second.values() for v in t.weight_versions} == {pushes.version}
    assert all(same(t, calm[place]) for place, t in second.items() if t.mode is not Mode.soft)
    assert learned(rig, list(second.values()))["learner/answer_logprob_gap_mean"] < 1e-4


def test_a_request_whose_logits_are_not_finite_ends_alone(
    rig: Rig, busy: Busy, calm_bounds: Callable[[Mode], dict[str, float]]
) -> None:
    """Nor do its keys and values, which are not finite either, harm who gets its memory next."""
    wanted = requests(rig)
    ill = next(i for i, r in enumerate(wanted) if r.mode is Mode.soft and r.prompt_index == 1)
    stream = begin(busy.engine, [replace(r, sigma=3e38) if i == ill else r for i, r in enumerate(wanted)])
    found: Drawn = {}
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        for ref in stream:
            trajectory = ray.get(ref, timeout=DEADLINE_S)
            found[trajectory.prompt_index, trajectory.sample_index] = trajectory
    where = f"engine-0: prompt 1, sample {wanted[ill].sample_index}: the model's logits are not finite at CoT step 1,"
    assert str(caught.value.cause).startswith(where)
    assert found.keys() == {(r.prompt_index, r.sample_index) for r in wanted if r is not wanted[ill]}
    bound = 2 * max(calm_bounds(mode)["learner/answer_logprob_gap_mean"] for mode in Mode)
    assert learned(rig, list(found.values()))["learner/answer_logprob_gap_mean"] <= bound


def test_nothing_is_left_behind(rig: Rig, busy: Busy) -> None:
    for engine in (rig.engine, busy.engine):
        gather(begin(engine, requests(rig)[:1]))  # vLLM tells its workers of finished requests with the next batch
        held = ray.get(engine.stats.remote(), timeout=DEADLINE_S)
        assert (held["in_flight"], held["records_untaken"]) == (0, 0) and held["slots_used"] <= 1


def test_everyone_hears_of_a_dead_engine_process(rig: Rig, busy: Busy) -> None:
    """The last test: the busy engine draws no more."""
    engine, pid = busy.engine, busy.report["pid"]
    begun = stat(engine, "generated")
    stream = begin(engine, requests(rig))
    wait_for(engine, begun + 50)
    os.kill(pid, signal.SIGSTOP)  # whatever is asked of it now is under way when it dies
    asked = [engine.token_logprobs.remote([np.arange(9, dtype=np.int32)]), engine.stats.remote()]
    asked += [engine.start_weight_update.remote()]
    time.sleep(1)
    os.kill(pid, signal.SIGKILL)
    died = time.monotonic()
    asked += [engine.stats.remote(), begin(engine, requests(rig)[:1])]
    told = rf"engine-0: vLLM's engine process {pid} was killed by signal 9"
    for call in (stream, *asked):
        with pytest.raises(ray.exceptions.RayTaskError) as caught:
            for ref in call if isinstance(call, ray.ObjectRefGenerator) else [call]:
                ray.get(ref, timeout=DEATH_S)
        assert isinstance(caught.value.cause, RunError) and "\n" not in str(caught.value.cause)
        assert caught.match(told)
    with pytest.raises(RunError, match=f"push: start_weight_update failed on an engine: {told}"):
        EngineClient([engine], 1, DEATH_S).start_weight_update()
    assert time.monotonic() - died < DEATH_S

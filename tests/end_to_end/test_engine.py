"""The real engine against the real learner, on a tiny random Llama in float32."""

from dataclasses import replace

import numpy as np
import pytest
import ray
import torch

from configs.errors import InputError, RunError
from configs.schema import Mode
from kernels.soft_embedding import rebuild
from rollout.trajectory import Group, Sample, SampleRequest, Trajectory
from tests.end_to_end.conftest import Rig, problems

pytestmark = pytest.mark.slow


def requests(rig: Rig, mode: Mode = Mode.soft, tau: float = 0.5, prompts: int = 8, samples: int = 12) -> list[SampleRequest]:
    drawn = [rig.rollouts.request(problem, 0, sample) for problem in problems(prompts) for sample in range(samples)]
    return [replace(r, mode=mode, tau=tau, sigma=0.0 if mode is Mode.hard else r.sigma) for r in drawn]


def greedy(request: SampleRequest, mode: Mode, tau: float) -> SampleRequest:
    return replace(request, mode=mode, tau=tau, sigma=0.0, answer_temperature=0.0)


def learn(rig: Rig, trajectories: list[Trajectory], step: int = 0) -> dict[str, float]:
    """One optimiser step with made-up rewards, which differ within every group."""
    rig.call(rig.learner.begin_step.remote(step))
    for index in sorted({t.prompt_index for t in trajectories}):
        of_prompt = [t for t in trajectories if t.prompt_index == index]
        samples = [Sample(trajectory=t, reward=10.0 * (i % 3), correct=False, answer_text="") for i, t in enumerate(of_prompt)]
        rig.call(rig.learner.accumulate.remote(Group(step=step, prompt_index=index, samples=tuple(samples))))
    return rig.call(rig.learner.finish_step.remote())


def same(a: Trajectory, b: Trajectory) -> bool:
    arrays = ("shadow_ids", "support_ids", "support_offsets", "answer_ids")
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)


def test_engine_reports_the_adapter_it_runs(rig: Rig) -> None:
    assert rig.report["adapter"] == "v1"
    assert rig.report["dtype"] == "float32"
    assert rig.report["tied"]


def test_learner_recomputes_the_policy_that_the_engine_sampled(rig: Rig) -> None:
    metrics = learn(rig, rig.draw(requests(rig)))
    assert metrics["learner/mismatch_s_p99"] < 0.05
    assert metrics["learner/residual_mean"] == pytest.approx(1.0, abs=0.005)
    assert metrics["learner/grad_norm"] > 0
    rig.call(rig.learner.push.remote(1))


def test_engine_answer_logprobs_are_the_learners(rig: Rig) -> None:
    metrics = learn(rig, rig.draw(requests(rig, prompts=2)))
    assert metrics["learner/answer_logprob_gap_mean"] < 1e-4
    rig.call(rig.learner.push.remote(2))


def test_without_noise_a_fuzzy_thought_is_the_greedy_one(rig: Rig) -> None:
    base = requests(rig, samples=1)
    fuzzy = rig.draw([greedy(r, Mode.fuzzy, 1e-4) for r in base])
    hard = rig.draw([greedy(r, Mode.hard, 0.0) for r in base])
    whole = 0
    for f, h in zip(fuzzy, hard, strict=True):
        mixed = np.flatnonzero(np.diff(f.support_offsets) > 1)  # the two top logits are nearly equal: a mixture of two tokens
        alike = mixed[0] + 1 if len(mixed) else f.cot_length
        assert np.array_equal(f.shadow_ids[:alike], h.shadow_ids[:alike])
        if not len(mixed):
            whole += 1
            assert np.array_equal(f.answer_ids, h.answer_ids)
    assert whole >= len(base) // 2


def test_modes_share_a_batch_without_noticing(rig: Rig) -> None:
    base = requests(rig, samples=3, prompts=6)
    kinds = [(Mode.soft, 0.5), (Mode.hard, 1.0), (Mode.fuzzy, 1e-4)]
    mixed = [
        replace(r, mode=m, tau=tau, sigma=0.0 if m is Mode.hard else r.sigma, max_cot_tokens=20 + 7 * (i % 4))
        for i, r in enumerate(base)
        for m, tau in [kinds[i % 3]]
    ]
    together = rig.draw(mixed)
    apart = [t for mode, _ in kinds for t in rig.draw([r for r in mixed if r.mode is mode])]
    apart.sort(key=lambda t: (t.prompt_index, t.sample_index))
    assert [t.cot_length for t in together] == [r.max_cot_tokens for r in mixed]
    # The batch decides how float32 sums are grouped, so a rare near tie may fall the other way; a shared state never would.
    assert sum(same(a, b) for a, b in zip(together, apart, strict=True)) >= len(mixed) - 1


def test_same_request_gives_the_same_trajectory(rig: Rig) -> None:
    first, second = rig.draw(requests(rig, prompts=3)), rig.draw(requests(rig, prompts=3))
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    assert all(np.array_equal(a.support_probs, b.support_probs) for a, b in zip(first, second, strict=True))


def test_full_record_is_what_the_compact_one_rebuilds(rig: Rig) -> None:
    weights = rig.checkpoint_tensors()
    rig.push_tensors(list(weights), weights)
    trajectory = rig.draw([replace(requests(rig, samples=1, prompts=1)[0], record_full=True)])[0]
    steps = trajectory.cot_length
    rows = rebuild(
        torch.tensor(trajectory.support_ids),
        torch.tensor(trajectory.support_probs),
        torch.tensor(trajectory.support_offsets),
        weights["model.embed_tokens.weight"],
        torch.full((steps,), trajectory.sigma),
        torch.full((steps,), trajectory.noise_seed),
        len(trajectory.prompt_ids) + torch.arange(steps),
        torch.float32,
    )
    assert trajectory.soft_embeddings is not None
    assert np.array_equal(rows.numpy(), trajectory.soft_embeddings.view(np.float32))


def test_a_push_moves_the_engine_to_the_learners_weights(rig: Rig) -> None:
    fixed = [rig.rollouts.prompt_ids(problem) for problem in problems(4)]
    before = np.concatenate(rig.call(rig.engine.token_logprobs.remote(fixed)))
    learn(rig, rig.draw(requests(rig, prompts=2)))
    rig.call(rig.learner.push.remote(3))
    after = np.concatenate(rig.call(rig.engine.token_logprobs.remote(fixed)))
    assert rig.call(rig.learner.verify.remote(3)) <= 1e-4
    assert np.abs(after - before).max() > 1e-4


def test_a_push_that_lost_a_tensor_is_refused_and_changes_nothing(rig: Rig) -> None:
    fixed = [rig.rollouts.prompt_ids(problem) for problem in problems(2)]
    before = np.concatenate(rig.call(rig.engine.token_logprobs.remote(fixed)))
    weights = rig.checkpoint_tensors()
    lost = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(RunError, match=f"missing tensors \\['{lost}'\\]"):
        rig.push_tensors(list(weights), {name: tensor for name, tensor in weights.items() if name != lost})
    assert np.array_equal(np.concatenate(rig.call(rig.engine.token_logprobs.remote(fixed))), before)


def test_a_push_that_swapped_two_tensors_is_caught(rig: Rig) -> None:
    weights = rig.checkpoint_tensors()
    one, other = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    rig.push_tensors(list(weights), weights | {one: weights[other], other: weights[one]})
    with pytest.raises(RunError, match="weight version 4 is wrong in engine 0"):
        rig.call(rig.learner.verify.remote(4))
    rig.call(rig.learner.push.remote(5))
    assert rig.call(rig.learner.verify.remote(5)) <= 1e-4


def test_a_push_of_which_one_bit_came_out_otherwise_is_caught(rig: Rig) -> None:
    """By too little for the log-probs of fixed tokens to show it."""
    weights = rig.call(rig.learner.__ray_call__.remote(lambda rank: dict(rank.learner.full_tensors(torch.float32))))
    name = "model.layers.1.input_layernorm.weight"
    flipped = weights[name].view(torch.int32).bitwise_xor(1).view(torch.float32)
    rig.push_tensors(list(weights), weights | {name: flipped})
    with pytest.raises(RunError, match=f"weight version 6 is wrong in engine 0: {name} is not the learner's \\(1 of "):
        rig.call(rig.learner.verify.remote(6))
    rig.push_tensors(list(weights), weights)
    assert rig.call(rig.learner.verify.remote(6)) <= 1e-4


def test_prompt_that_does_not_fit_is_named(rig: Rig) -> None:
    long = replace(requests(rig, samples=1, prompts=1)[0], prompt_ids=np.zeros(150, dtype=np.int32))
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        rig.draw([long])
    assert isinstance(caught.value.cause, InputError)
    assert "prompt 0 has 150 tokens" in str(caught.value.cause)


def test_nothing_is_left_behind(rig: Rig) -> None:
    rig.draw(requests(rig, prompts=1, samples=2))
    stats = rig.call(rig.engine.stats.remote())
    assert stats["in_flight"] == 0
    assert stats["records_untaken"] == 0
    assert stats["slots_used"] <= 2  # vLLM tells its workers of finished requests with the next batch

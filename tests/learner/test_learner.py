"""One learner, step by step: what moves the weights, what must not, and how faults are named."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from configs.errors import InputError, RunError
from configs.schema import Config, Mode
from learner.learner import Learner
from rollout.trajectory import Group
from tests.learner.tiny import load_model, mixed_group, relative, tiny_config

SOFT = [Mode.soft, Mode.fuzzy, Mode.soft]


def start(folder: Path, config: Config | None = None) -> Learner:
    return Learner(config or tiny_config(), folder, 0, 1, torch.device("cpu"))


def train(learner: Learner, *groups: Group, step: int = 0) -> dict[str, float]:
    learner.begin_step(step)
    for group in groups:
        learner.accumulate(group)
    return learner.finish_step()


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in learner.full_tensors(torch.float32)}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(before[name], after[name]) for name in before)


def rewarded(group: Group, *rewards: float) -> Group:
    samples = tuple(replace(s, reward=r) for s, r in zip(group.samples, rewards, strict=True))
    return replace(group, samples=samples)


def test_a_step_makes_good_samples_likelier(tied_dir: Path) -> None:
    group = rewarded(mixed_group(load_model(tied_dir), [Mode.hard] * 4), 100.0, 0.0, 0.0, 0.0)
    learner = start(tied_dir, tiny_config(lr=1e-3))
    sequence = [group.samples[0].trajectory.input_ids()]
    before = learner.token_logprobs(sequence)[0].sum()
    for step in range(3):
        train(learner, group, step=step)
    assert learner.token_logprobs(sequence)[0].sum() > before + 1.0


def test_learning_rate_zero_changes_nothing(tied_dir: Path) -> None:
    learner = start(tied_dir, tiny_config(lr=0.0, weight_decay=0.1))
    group = mixed_group(load_model(tied_dir), [*SOFT, Mode.hard])
    before = weights(learner)
    logprobs = learner.token_logprobs([np.arange(9)])[0]
    metrics = [train(learner, group, step=step) for step in range(3)]
    assert not moved(before, weights(learner))
    assert np.array_equal(logprobs, learner.token_logprobs([np.arange(9)])[0])
    assert metrics[0]["learner/loss"] == metrics[2]["learner/loss"] and metrics[0]["learner/grad_norm"] > 0


def test_weights_in_and_weights_out_are_the_checkpoint_s(tied_dir: Path, untied_dir: Path) -> None:
    for folder in (tied_dir, untied_dir):
        stored, learner = load_file(folder / "model.safetensors"), start(folder)
        found = weights(learner)
        assert found.keys() == stored.keys() and not moved(stored, found)
        assert learner.tensor_shapes() == [(name, tensor.shape) for name, tensor in found.items()]
        assert all(tensor.dtype == torch.bfloat16 for _, tensor in learner.full_tensors(torch.bfloat16))


def test_token_logprobs_are_those_of_transformers(tied_dir: Path) -> None:
    sequences = [np.array([5, 9, 33, 2, 71], np.int32), np.array([1, 2], np.int32)]
    model, found = load_model(tied_dir), start(tied_dir).token_logprobs(sequences)
    for ids, logprobs in zip(sequences, found, strict=True):
        tokens = torch.from_numpy(ids).long()
        expected = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        np.testing.assert_allclose(logprobs, expected.detach().numpy(), atol=1e-5)


def test_forward_only_uses_do_not_leave_old_weights_behind(tied_dir: Path) -> None:
    """A forward without backward leaves FSDP's root unit unsharded unless told otherwise: the next step would go unseen."""
    model = load_model(tied_dir)
    learner = start(tied_dir, tiny_config(lr=1e-2))
    ids = [np.arange(12)]
    learner.token_logprobs(ids)
    flat = rewarded(mixed_group(model, SOFT), 10.0, 10.0, 10.0)
    train(learner, mixed_group(model, SOFT), flat)  # ends with a forward-only group
    stepped = load_model(tied_dir)
    stepped.load_state_dict(weights(learner), strict=False)
    tokens = torch.arange(12)
    expected = stepped(tokens[None]).logits[0, :-1].log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
    np.testing.assert_allclose(learner.token_logprobs(ids)[0], expected.detach().numpy(), atol=1e-5)


def test_equal_rewards_move_nothing_but_are_measured(tied_dir: Path) -> None:
    learner = start(tied_dir)
    before = weights(learner)
    metrics = train(learner, rewarded(mixed_group(load_model(tied_dir), SOFT), 10.0, 10.0, 10.0))
    assert not moved(before, weights(learner))
    assert metrics["learner/grad_norm"] == 0.0 and metrics["learner/loss"] == 0.0
    assert metrics["learner/residual_mean"] == pytest.approx(1.0, abs=0.3) and metrics["learner/tokens"] > 0


def test_groups_add_up_in_any_order(tied_dir: Path) -> None:
    model = load_model(tied_dir)
    groups = [mixed_group(model, SOFT, prompt, seed) for seed, prompt in enumerate([(3, 1, 4), (1, 5), (9, 2, 6)])]

    def gradients(order: list[Group]) -> list[Tensor]:
        learner = start(tied_dir)
        learner.begin_step(0)
        for group in order:
            learner.accumulate(group)
        return [parameter.grad.full_tensor() for parameter in learner.policy.parameters()]

    pairs = zip(gradients(groups), gradients(groups[::-1]), strict=True)
    assert max(relative(a, b) for a, b in pairs) < 1e-5


def test_metrics_of_a_step(tied_dir: Path) -> None:
    learner = start(tied_dir, tiny_config(lr=1e-3, warmup_steps=2))
    group = mixed_group(load_model(tied_dir), [*SOFT, Mode.hard])
    first, second = train(learner, group), train(learner, group, step=1)
    assert (first["learner/lr"], second["learner/lr"]) == (5e-4, 1e-3)
    assert first["learner/tokens"] == sum(sample.trajectory.generated for sample in group.samples)
    assert first["learner/loss"] == pytest.approx(first["learner/loss_cot"] + first["learner/loss_answer"], rel=1e-5)
    assert first["learner/mismatch_s_p99"] < 1e-2 < second["learner/mismatch_s_mean"]  # the second time the group is stale
    assert first["learner/answer_logprob_gap_mean"] < 1e-5 < second["learner/answer_logprob_gap_mean"]
    assert first["learner/clipped"] == 1.0 and first["learner/grad_norm"] > 1.0
    assert first["learner/cot_grad_hidden"] > first["learner/answer_grad_hidden"] > 0
    assert all(isinstance(value, float) and math.isfinite(value) for value in first.values())
    assert {"learner/tokens_per_s", "learner/residual_mean", "learner/residual_max", "learner/cot_entropy_mean"} <= first.keys()


def test_a_hard_run_has_no_residual(tied_dir: Path) -> None:
    metrics = train(start(tied_dir), mixed_group(load_model(tied_dir), [Mode.hard] * 3))
    assert not any("residual" in key or "mismatch" in key for key in metrics)
    assert metrics["learner/cot_entropy_mean"] > 0


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_bad_reward_is_named(tied_dir: Path, reward: float) -> None:
    group = rewarded(mixed_group(load_model(tied_dir), SOFT, seed=4), 0.0, reward, 1.0)
    learner = start(tied_dir)
    learner.begin_step(7)
    with pytest.raises(RunError, match=r"step 7, prompt 4, sample 1: the reward is (nan|inf)"):
        learner.accumulate(replace(group, step=7))


def with_trajectory(group: Group, index: int, **changes: Any) -> Group:
    samples = list(group.samples)
    samples[index] = replace(samples[index], trajectory=replace(samples[index].trajectory, **changes))
    return replace(group, samples=tuple(samples))


def test_a_record_that_is_not_finite_is_named(tied_dir: Path) -> None:
    learner, good = start(tied_dir), mixed_group(load_model(tied_dir), SOFT, seed=4)
    probs = good.samples[2].trajectory.support_probs.copy()
    probs[-1] = math.nan
    learner.begin_step(7)
    with pytest.raises(RunError, match="step 7, prompt 4, sample 2: the recorded probabilities are not finite"):
        learner.accumulate(replace(with_trajectory(good, 2, support_probs=probs), step=7))


def test_a_loss_that_is_not_finite_is_named_and_changes_nothing(tied_dir: Path) -> None:
    learner, group = start(tied_dir), mixed_group(load_model(tied_dir), SOFT, seed=4)
    before = weights(learner)
    # sigma so small that |h~ - mean|^2 / sigma^2 overflows
    tiny_sigma = with_trajectory(group, 1, sigma=1e-30)
    learner.begin_step(7)
    learner.accumulate(replace(tiny_sigma, step=7))
    with pytest.raises(RunError, match=r"step 7, prompt 4, sample 1: a soft CoT step has log-probability (-inf|nan)"):
        learner.finish_step()
    assert not moved(before, weights(learner)) and learner.step == 0
    assert math.isfinite(train(learner, group, step=8)["learner/loss"])  # and the learner is still good


def test_a_gradient_that_is_not_finite_changes_nothing(tied_dir: Path) -> None:
    learner = start(tied_dir)
    group = rewarded(mixed_group(load_model(tied_dir), SOFT), 1e36, 0.0, 0.0)
    before = weights(learner)
    with pytest.raises(RunError, match=r"step 3: the gradient norm is (inf|nan)"):
        train(learner, group, step=3)
    assert not moved(before, weights(learner))


def test_rollouts_of_another_model_are_refused(tied_dir: Path) -> None:
    group = mixed_group(load_model(tied_dir), SOFT)
    learner = start(tied_dir)
    learner.begin_step(0)
    with pytest.raises(InputError, match=r"prompt 0, sample 1: token ids reach .*97 tokens"):
        learner.accumulate(with_trajectory(group, 1, answer_ids=np.array([97], np.int32), answer_logprobs=np.zeros(1, np.float32)))


def test_the_process_group_must_be_the_one_named(tied_dir: Path) -> None:
    with pytest.raises(RunError, match="rank 0 of 2"):
        Learner(tiny_config(), tied_dir, 0, 2, torch.device("cpu"))

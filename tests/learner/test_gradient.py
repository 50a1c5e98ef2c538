"""The gradient of the loss equals float64 autograd of the paper's formula, on one rank and on two; two ranks are one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from configs.schema import Advantage, Config, Dtype, Mode, Support
from learner.batch import TokenSteps, pack
from learner.learner import Learner
from learner.losses import policy_terms
from rollout.trajectory import Group
from tests.learner import two_ranks
from tests.learner.tiny import load_model, mixed_group, naive_gradients, relative, roll_out, tiny_config

MODES = [Mode.soft, Mode.hard, Mode.soft, Mode.fuzzy, Mode.soft]
TOLERANCE = 1e-5


def groups_of(folder: Path, modes: list[Mode] | None = None) -> list[Group]:
    model = load_model(folder)
    return [mixed_group(model, modes or MODES, prompt, seed) for seed, prompt in enumerate([(3, 14, 15, 9), (2, 7, 1)])]


def learner_gradients(config: Config, folder: Path, groups: list[Group]) -> tuple[Learner, dict[str, torch.Tensor]]:
    learner = Learner(config, folder, 0, 1, torch.device("cpu"))
    learner.begin_step(0)
    for group in groups:
        learner.accumulate(group)
    learner.flush()
    return learner, {name: p.grad.full_tensor().clone() for name, p in learner.policy.model.named_parameters()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in expected)


def config_for_two_prompts(**learner: Any) -> Config:
    config = tiny_config(**learner)
    config.rollout.prompts_per_step = 2
    return config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("support", list(Support))
def test_one_rank(tied_dir: Path, untied_dir: Path, tied: bool, support: Support) -> None:
    folder = tied_dir if tied else untied_dir
    config = config_for_two_prompts()
    config.policy.support = support
    groups = groups_of(folder)
    _, found = learner_gradients(config, folder, groups)
    assert worst(found, naive_gradients(folder, groups, support)) < TOLERANCE


@pytest.mark.parametrize(("mode", "bound"), [(Mode.hard, 0.04), (Mode.fuzzy, 0.04), (Mode.soft, 0.2)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("support", list(Support))
def test_bf16_compute_is_off_by_no_more_than_its_layers_round(
    tied_dir: Path, untied_dir: Path, tied: bool, support: Support, mode: Mode, bound: float
) -> None:
    """Of each parameter, against float64 through the same bf16 weights and inputs; the errors seen are half the bounds.

    The kernels' own part is 2e-3 at most (tests/kernels). The rest comes from the decoder layers, which round to 2^-9 at every
    operation; where a mixture is soft, a hidden state's rounding moves its mean, which counts in sigmas (here 0.1).
    """
    folder = tied_dir if tied else untied_dir
    config = tiny_config(Dtype.bfloat16)
    config.rollout.prompts_per_step, config.policy.support = 2, support
    groups = groups_of(folder, [mode] * 3)
    _, found = learner_gradients(config, folder, groups)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert worst(found, naive_gradients(folder, groups, support, dtype=torch.bfloat16)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hard_tokens_at_a_temperature_are_exact_in_the_hidden_states_own_dtype(tied_dir: Path, dtype: torch.dtype) -> None:
    """A bf16 0.7, or a bf16 hidden state divided by it, would put 1e-3 into the log-probability."""
    model = load_model(tied_dir)
    samples = [(roll_out(model, (3, 14, 15, 9), mode=Mode.hard, seed=seed, tau=0.7), 0.5) for seed in range(4)]
    (batch,) = pack(samples, 256)
    hidden, head = (torch.randn(n, 64).to(dtype).requires_grad_() for n in (batch.rows, 97))
    terms = policy_terms(
        hidden, head, head, hidden.new_empty(0, 64), batch, support=Support.recorded, engine_dtype=dtype, cot_weight=1.0
    )
    found = torch.autograd.grad(terms.loss, [hidden, head])

    wide = [x.detach().double().requires_grad_() for x in (hidden, head)]

    def naive(steps: TokenSteps) -> torch.Tensor:
        logits = wide[0][steps.hidden_row] @ wide[1].T / steps.tau.double()[:, None]
        return logits.log_softmax(-1).gather(1, steps.target[:, None])[:, 0]

    assert relative(terms.hard_logprob, naive(batch.hard).detach()) < TOLERANCE
    loss = -(batch.hard.weight * naive(batch.hard)).sum() - (batch.answer.weight * naive(batch.answer)).sum()
    for mine, exact in zip(found, torch.autograd.grad(loss, wide), strict=True):
        rounding = relative(exact.to(dtype), exact)  # of what is returned; each of a row's two terms is rounded apart
        assert relative(mine, exact) < TOLERANCE + 2 * rounding


@pytest.mark.parametrize("cot_weight", [0.0, 0.25])
def test_cot_weight_scales_the_cot_term_alone(tied_dir: Path, cot_weight: float) -> None:
    groups = groups_of(tied_dir)
    _, found = learner_gradients(config_for_two_prompts(cot_weight=cot_weight), tied_dir, groups)
    assert worst(found, naive_gradients(tied_dir, groups, cot_weight=cot_weight)) < TOLERANCE


def test_the_estimator_of_the_config_is_used(tied_dir: Path) -> None:
    groups = groups_of(tied_dir)
    _, rloo = learner_gradients(config_for_two_prompts(), tied_dir, groups)
    _, grpo = learner_gradients(config_for_two_prompts(advantage=Advantage.grpo), tied_dir, groups)
    assert worst(grpo, rloo) > 0.5


@pytest.mark.slow
def test_two_ranks_are_one(tied_dir: Path, tmp_path: Path) -> None:
    # Three samples for two ranks, and micro-batches of 48 rows: some rank runs a filler.
    config, groups = config_for_two_prompts(micro_batch_tokens=48), groups_of(tied_dir, MODES[:3])
    mp.spawn(two_ranks.learn, (config, tied_dir, groups, tmp_path), nprocs=2)
    seen = torch.load(tmp_path / "seen.pt")
    assert worst(seen["gradients"], naive_gradients(tied_dir, groups)) < TOLERANCE

    learner, alone = learner_gradients(config, tied_dir, groups)
    assert worst(seen["gradients"], alone) < TOLERANCE
    metrics = learner.finish_step()
    for key in ("loss", "grad_norm", "residual_mean", "residual_max", "mismatch_s_p99", "cot_grad_hidden", "tokens", "lr"):
        assert seen["metrics"][f"learner/{key}"] == pytest.approx(metrics[f"learner/{key}"], rel=1e-3, abs=1e-4), key
    # A checkpoint of two ranks, read by one.
    reader = Learner(config, tied_dir, 0, 1, torch.device("cpu"))
    assert reader.load(tmp_path / "checkpoints" / "step_000001") == {"from": "two ranks"}
    assert reader.step == 1
    for name, tensor in reader.full_tensors(torch.float32):
        assert torch.equal(tensor, seen["weights"][name]), name

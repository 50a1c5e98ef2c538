"""The policy's numbers: packed == alone, compact == full, and the two truths that an on-policy batch must satisfy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    AutoModel,
    FalconH1Config,
    FalconH1ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from configs.errors import InputError
from configs.schema import Config, Dtype, Mode, Support
from learner.batch import Weighted, pack
from learner.losses import Terms
from learner.policy import Policy, build_policy, require_plain_inputs
from rollout.trajectory import Trajectory
from tests.learner.tiny import HIDDEN, load_model, mixed_group, naive_logprobs, relative, roll_out, tiny_config

CPU = torch.device("cpu")
ALL = [Mode.soft, Mode.hard, Mode.fuzzy, Mode.soft, Mode.hard]


def build(folder: Path, config: Config | None = None) -> Policy:
    return build_policy(folder, config or tiny_config(), CPU)


def weighted(model: Any, modes: list[Mode]) -> list[Weighted]:
    """Samples of two prompts, lengths mixed."""
    groups = [mixed_group(model, modes, prompt, seed) for seed, prompt in enumerate([(3, 14, 15, 9), (2, 7, 1)])]
    return [(s.trajectory, 0.1 * (i - 2)) for i, s in enumerate(s for g in groups for s in g.samples)]


def gradients(policy: Policy, samples: list[Weighted], limit: int) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    for batch in pack(samples, limit):
        policy(batch).loss.backward()
    return {name: parameter.grad.full_tensor() for name, parameter in policy.model.named_parameters()}


def by_sample(policy: Policy, samples: list[Weighted], limit: int) -> dict[tuple[int, int, str], torch.Tensor]:
    """(prompt, sample, what) -> log-probs."""
    found = {}
    for batch in pack(samples, limit):
        terms: Terms = policy(batch)
        steps = {"soft": (batch.soft, terms.soft_logprob), "hard": (batch.hard, terms.hard_logprob)}
        steps["answer"] = (batch.answer, terms.answer_logprob)
        for what, (columns, logprob) in steps.items():
            for i, key in enumerate(zip(batch.prompt_index, batch.sample_index, strict=True)):
                if (part := logprob[columns.sample == i]).numel():
                    found[(*key, what)] = part
    policy.reshard()
    return found


@pytest.mark.parametrize("support", list(Support))
def test_packed_is_each_sample_alone(tied_dir: Path, support: Support) -> None:
    config = tiny_config()
    config.policy.support = support
    policy, samples = build(tied_dir, config), weighted(load_model(tied_dir), ALL)
    together, apart = by_sample(policy, samples, 10_000), by_sample(policy, samples, 1)
    assert len(pack(samples, 10_000)) == 1 and len(pack(samples, 1)) == len(samples)
    assert together.keys() == apart.keys() and len(together) == 2 * len(samples)
    exact = load_model(tied_dir, torch.float64)
    for trajectory, _ in samples:
        cot, answer = naive_logprobs(exact, trajectory, support)
        for what, expected in (("hard" if trajectory.mode is Mode.hard else "soft", cot), ("answer", answer)):
            key = (trajectory.prompt_index, trajectory.sample_index, what)
            # A soft log-prob is a sum of n0 / 2 = 32 nats on average; a hard one a few.
            torch.testing.assert_close(together[key], apart[key], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(together[key].double(), expected.detach(), rtol=1e-5, atol=1e-4)


def test_packed_gradients_are_those_of_each_sample_alone(tied_dir: Path) -> None:
    policy, samples = build(tied_dir), weighted(load_model(tied_dir), ALL)
    together, apart = gradients(policy, samples, 10_000), gradients(policy, samples, 1)
    assert max(relative(together[name], apart[name]) for name in apart) < 1e-5


def on_policy(model: Any, mode: Mode, count: int = 24, sigma: float = 0.1, full: bool = False) -> list[Trajectory]:
    return [
        roll_out(model, (3, 14, 15, i), mode=mode, seed=i, cot=12, answer=1, sigma=sigma, sample_index=i, full=full)
        for i in range(count)
    ]


def measure(policy: Policy, trajectories: list[Trajectory]) -> tuple[torch.Tensor, torch.Tensor]:
    """(residual, mismatch) of every step."""
    with torch.no_grad():
        terms = [policy(batch) for batch in pack([(t, 1.0) for t in trajectories], 256)]
    policy.reshard()
    return torch.cat([t.residual for t in terms]), torch.cat([t.mismatch for t in terms])


@pytest.mark.parametrize("mode", [Mode.soft, Mode.fuzzy])
def test_on_policy_residual_is_one_and_mismatch_is_nothing(tied_dir: Path, mode: Mode) -> None:
    residual, mismatch = measure(build(tied_dir), on_policy(load_model(tied_dir), mode))
    spread = (2 / HIDDEN) ** 0.5  # of one step
    assert float(residual.mean()) == pytest.approx(1.0, abs=4 * spread / len(residual) ** 0.5)
    assert float(residual.std()) == pytest.approx(spread, rel=0.2)
    assert float(mismatch.max()) < 1e-2 and float(mismatch.mean()) < 1e-3


def test_residual_and_mismatch_expose_what_is_not_on_policy(tied_dir: Path, untied_dir: Path) -> None:
    trajectories = on_policy(load_model(tied_dir), Mode.soft, count=6)
    policy = build(tied_dir)
    wrong_tau = [replace(t, tau=1.0) for t in trajectories]
    # One step late: each mixture is judged by the hidden state of the step after it.
    late = [
        replace(
            t,
            support_ids=np.concatenate([t.support_ids[t.support_offsets[1] :], t.support_ids[: t.support_offsets[1]]]),
            support_probs=np.concatenate([t.support_probs[t.support_offsets[1] :], t.support_probs[: t.support_offsets[1]]]),
            support_offsets=np.concatenate([[0], np.cumsum(np.roll(np.diff(t.support_offsets), -1))]),
        )
        for t in trajectories
    ]
    for wrong, judge in ((wrong_tau, policy), (late, policy), (trajectories, build(untied_dir))):
        residual, mismatch = measure(judge, wrong)
        assert float(residual.mean()) > 1.1 and float(mismatch.mean()) > 0.5


@pytest.mark.parametrize("engine", list(Dtype))
@pytest.mark.parametrize("learner", list(Dtype))
def test_compact_records_rebuild_the_very_inputs(tied_dir: Path, learner: Dtype, engine: Dtype) -> None:
    model = load_model(tied_dir, torch.bfloat16 if engine is Dtype.bfloat16 else torch.float32)
    full = on_policy(model, Mode.soft, count=4, full=True)
    config = tiny_config(learner)
    config.engine.dtype = engine
    policy = build(tied_dir, config)
    compact = [replace(t, soft_embeddings=None) for t in full]
    assert pack([(t, 1.0) for t in full], 256)[0].soft.recorded is not None
    assert all(torch.equal(a, b) for a, b in zip(measure(policy, full), measure(policy, compact), strict=True))


def test_bf16_compute_keeps_float32_masters_and_the_residual(tied_dir: Path) -> None:
    policy = build(tied_dir, tiny_config(Dtype.bfloat16))
    residual, mismatch = measure(policy, on_policy(load_model(tied_dir, torch.bfloat16), Mode.soft))
    assert float(residual.mean()) == pytest.approx(1.0, abs=0.05)
    assert 0 < float(mismatch.mean()) < 1.0
    for name, gradient in gradients(policy, weighted(load_model(tied_dir), ALL), 64).items():
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all(), name
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters())


def test_activation_checkpointing_changes_nothing(tied_dir: Path) -> None:
    samples = weighted(load_model(tied_dir), ALL)
    plain = gradients(build(tied_dir), samples, 64)
    policy = build(tied_dir, tiny_config(activation_checkpointing=True))
    assert policy.model.model.layers[0].gradient_checkpointing and policy.model.training
    checkpointed = gradients(policy, samples, 64)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


@pytest.mark.slow
def test_compiled_layers_change_nothing_but_rounding(tied_dir: Path) -> None:
    samples = weighted(load_model(tied_dir), ALL)
    plain = gradients(build(tied_dir), samples, 64)
    counters.clear()
    compiled = gradients(build(tied_dir, tiny_config(compile=True)), samples, 64)
    assert 0 < counters["stats"]["unique_graphs"] <= 6  # three pieces of a layer and of the first one, whatever the number of rows
    assert max(relative(compiled[name], plain[name]) for name in plain) < 1e-5


def test_tied_weights_stay_one_parameter(tied_dir: Path, untied_dir: Path) -> None:
    tied, untied = build(tied_dir), build(untied_dir)
    assert tied.tied and not untied.tied
    assert "lm_head.weight" not in dict(tied.model.named_parameters())
    assert "lm_head.weight" in dict(untied.model.named_parameters())


def test_rms_is_over_all_entries_of_the_embedding(tied_dir: Path) -> None:
    table = load_model(tied_dir).get_input_embeddings().weight.detach()
    assert build(tied_dir).rms_embedding == pytest.approx(float(table.double().square().mean().sqrt()), rel=1e-12)


def llama(**changes: Any) -> LlamaConfig:
    small = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaConfig(**small, **changes)


def test_models_whose_policy_we_cannot_state_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, reason: str) -> None:
        with pytest.raises(InputError, match=reason):
            build(folder)

    refused(tmp_path / "nothing", "check model.path")
    LlamaForCausalLM(llama(tie_word_embeddings=False)).model.save_pretrained(tmp_path / "headless")
    refused(tmp_path / "headless", "lm_head.weight")
    small = llama().to_dict()
    small.pop("model_type")
    MistralForCausalLM(MistralConfig(**small | {"sliding_window": 4})).save_pretrained(tmp_path / "sliding")
    refused(tmp_path / "sliding", "sliding")
    capped = LlamaForCausalLM(llama())
    capped.config.final_logit_softcapping = 30.0
    capped.save_pretrained(tmp_path / "capped")
    refused(tmp_path / "capped", "final_logit_softcapping")
    GemmaForCausalLM(GemmaConfig(**small | {"head_dim": 32})).save_pretrained(tmp_path / "gemma")
    refused(tmp_path / "gemma", "GemmaForCausalLM scales or shifts the rows of its embedding")


def test_a_body_that_scales_the_embeddings_of_ids_alone_is_refused(tmp_path: Path) -> None:
    config = FalconH1Config(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
        head_dim=32, mamba_d_ssm=32, mamba_n_heads=1, mamba_d_head=32, mamba_d_state=8, embedding_multiplier=2.0,
    )  # fmt: skip
    model = FalconH1ForCausalLM(config)
    with pytest.raises(InputError, match="FalconH1ForCausalLM scales or shifts"):
        require_plain_inputs(model, model.model.layers[0], tmp_path)
    model.model.embedding_multiplier = 1.0
    require_plain_inputs(model, model.model.layers[0], tmp_path)


def test_a_body_that_scales_rows_and_ids_alike_is_a_model_like_any_other(tmp_path: Path) -> None:
    small = llama().to_dict()
    small.pop("model_type")
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**small | {"embedding_multiplier": 12.0})).eval()
    model.save_pretrained(tmp_path)
    assert_speaks_alike(tmp_path, model)


def test_qwen2_is_a_model_like_any_other(tmp_path: Path) -> None:
    small = llama().to_dict()
    small.pop("model_type")
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**small)).eval()
    model.save_pretrained(tmp_path)
    assert_speaks_alike(tmp_path, model)


def assert_speaks_alike(folder: Path, model: Any) -> None:
    """The policy of a folder has the log-probs of the transformers model that was saved there."""
    ids = torch.arange(8)
    with torch.no_grad():
        expected = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        torch.testing.assert_close(build(folder).next_token_logprobs(ids), expected, rtol=0, atol=1e-5)


def test_dropout_of_the_checkpoint_is_switched_off(tmp_path: Path) -> None:
    LlamaForCausalLM(llama(attention_dropout=0.5)).save_pretrained(tmp_path)
    policy = build(tmp_path)
    ids = torch.arange(8)
    with torch.no_grad():
        first, second = policy.next_token_logprobs(ids), policy.next_token_logprobs(ids)
    assert torch.equal(first, second)
    assert AutoModel.from_pretrained(tmp_path).layers[0].self_attn.attention_dropout == 0.5

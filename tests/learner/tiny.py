"""A tiny random Llama, trajectories that it really generated, and the paper's loss written naively in float64."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from configs.schema import Config, Dtype, Mode, Support
from kernels.noise import STREAM_ANSWER, STREAM_COT, uniform_rows
from kernels.soft_embedding import rebuild, select_support
from rollout.trajectory import STOP_ANSWER_LENGTH, Group, Sample, Trajectory

VOCAB = 97
HIDDEN = 64
PREFILL = np.array([7, 8], np.int32)
TAU = {Mode.hard: 1.0, Mode.soft: 0.25, Mode.fuzzy: 1e-4}  # soft: so that the support leaves out part of so small a vocabulary


def save_tiny_model(folder: Path, tied: bool = True, seed: int = 0) -> Path:
    """A 2-layer Llama with grouped-query attention, wide enough weights for peaked distributions, saved in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, attn_implementation="sdpa").eval()


def tiny_config(dtype: Dtype = Dtype.float32, **learner: Any) -> Config:
    """One prompt a step unless told; learner and engine in `dtype`; `learner` keys on top."""
    config = Config()
    config.model.dtype = config.engine.dtype = config.learner.dtype = dtype
    config.policy.support = Support.recorded
    config.rollout.prompts_per_step = 1
    config.run.steps = 10
    config.learner.warmup_steps = 0
    config.learner.micro_batch_tokens = 64
    for key, value in learner.items():
        assert hasattr(config.learner, key)
        setattr(config.learner, key, value)
    return config


@torch.no_grad()
def roll_out(
    model: Any,
    prompt: Sequence[int],
    *,
    mode: Mode,
    seed: int,
    cot: int = 6,
    answer: int = 3,
    tau: float | None = None,
    sigma: float = 0.1,
    sample_index: int = 0,
    prompt_index: int = 0,
    full: bool = False,
) -> Trajectory:
    """One trajectory by the plainest loop there is: the whole sequence again at every step. The model stands for the engine."""
    table = model.get_input_embeddings().weight
    tau = tau if tau is not None else TAU[mode]
    rows = [table[torch.tensor(list(prompt))]]
    shadow, support, noisy_rows, dropped, logprobs, answers = [], [], [], [], [], []
    for step in range(cot):
        logits = _next_logits(model, rows)
        position = torch.tensor([len(prompt) + step])
        if mode is Mode.hard:
            token = _sample(logits / tau, seed, position, STREAM_COT)
            rows.append(table[token][None])
        else:
            found = select_support(logits[None], torch.tensor([tau]))
            token = int(found.top_ids[0])
            noisy = rebuild(
                found.ids, found.probs, found.offsets, table, torch.tensor([sigma]), torch.tensor([seed]), position, table.dtype
            )
            support.append((found.ids.numpy(), found.probs.numpy()))
            dropped.append(float(found.dropped_mass[0]))
            noisy_rows.append(noisy)
            rows.append(noisy)
        shadow.append(token)
    rows.append(table[torch.from_numpy(PREFILL).long()])
    for step in range(answer):
        logits = _next_logits(model, rows)
        position = torch.tensor([len(prompt) + cot + len(PREFILL) + step])
        answers.append(_sample(logits, seed, position, STREAM_ANSWER))
        logprobs.append(float(logits.log_softmax(-1)[answers[-1]]))
        rows.append(table[answers[-1]][None])
    counts = [len(ids) for ids, _ in support] if support else [0] * cot
    return Trajectory(
        prompt_ids=np.array(prompt, np.int32),
        prompt_index=prompt_index,
        sample_index=sample_index,
        mode=mode,
        tau=tau,
        sigma=0.0 if mode is Mode.hard else sigma,
        noise_seed=seed,
        shadow_ids=np.array(shadow, np.int32),
        support_ids=np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in support)]),
        support_probs=np.concatenate([np.empty(0, np.float32), *(probs for _, probs in support)]),
        support_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        dropped_mass=np.array(dropped or [0.0] * cot, np.float32),
        soft_embeddings=torch.cat(noisy_rows).contiguous().view(torch.uint8).numpy() if full and noisy_rows else None,
        prefill_ids=PREFILL,
        answer_ids=np.array(answers, np.int32),
        answer_logprobs=np.array(logprobs, np.float32),
        stop_reason=STOP_ANSWER_LENGTH,
        phrase_found=False,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )


def _next_logits(model: Any, rows: list[Tensor]) -> Tensor:
    hidden = model.base_model(inputs_embeds=torch.cat(rows)[None]).last_hidden_state[0, -1]
    return hidden.float() @ model.get_output_embeddings().weight.float().T


def _sample(logits: Tensor, seed: int, position: Tensor, stream: int) -> int:
    cumulative = logits.double().softmax(-1).cumsum(-1)
    uniform = uniform_rows(torch.tensor([seed]), position, stream).double()
    return min(int(torch.searchsorted(cumulative, uniform)), len(logits) - 1)


def mixed_group(model: Any, modes: Sequence[Mode], prompt: Sequence[int] = (3, 14, 15, 9), seed: int = 0) -> Group:
    """A group with samples of different lengths, one per entry of `modes`, and rewards that differ."""
    samples = []
    for index, mode in enumerate(modes):
        trajectory = roll_out(
            model,
            prompt,
            mode=mode,
            seed=1000 * seed + index,
            cot=3 + 2 * index,
            answer=1 + index % 3,
            sample_index=index,
            prompt_index=seed,
        )
        reward = (0.0, 10.0, 100.0)[(index + seed) % 3]
        samples.append(Sample(trajectory=trajectory, reward=reward, correct=reward == 100.0, answer_text=""))
    return Group(step=0, prompt_index=seed, samples=tuple(samples))


def naive_logprobs(
    model: Any, trajectory: Trajectory, support: Support = Support.recorded, engine: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """(log pi [C] of the CoT steps, log pi [A] of the answer): the sample alone, plain autograd, in the model's dtype.

    h~ is what an engine of dtype `engine` fed back.
    """
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    prompt, cot, prefill = len(trajectory.prompt_ids), trajectory.cot_length, len(trajectory.prefill_ids)
    inputs = table[torch.from_numpy(trajectory.input_ids()).long()]
    if trajectory.mode is not Mode.hard:
        noisy = _noisy(table, trajectory, engine)
        inputs = torch.cat([inputs[:prompt], noisy.to(inputs.dtype), inputs[prompt + cot :]])
    hidden = model.base_model(inputs_embeds=inputs[None]).last_hidden_state[0]
    logits = hidden @ head.T
    cot_logits = logits[prompt - 1 : prompt - 1 + cot] / trajectory.tau
    first_answer = prompt + cot + prefill - 1
    answer_logits = logits[first_answer : first_answer + len(trajectory.answer_ids)]
    answer = answer_logits.log_softmax(-1).gather(1, torch.from_numpy(trajectory.answer_ids).long()[:, None])[:, 0]
    if trajectory.mode is Mode.hard:
        return cot_logits.log_softmax(-1).gather(1, torch.from_numpy(trajectory.shadow_ids).long()[:, None])[:, 0], answer
    if support is Support.recorded:
        inside = torch.zeros_like(cot_logits, dtype=torch.bool)
        for t in range(cot):
            ids = trajectory.support_ids[trajectory.support_offsets[t] : trajectory.support_offsets[t + 1]]
            inside[t, torch.from_numpy(ids).long()] = True
        cot_logits = cot_logits.masked_fill(~inside, -torch.inf)
    mean = cot_logits.softmax(-1) @ table
    sigma = float(np.float32(trajectory.sigma))
    return -(noisy.to(mean.dtype) - mean).square().sum(-1) / (2 * sigma**2), answer


def _noisy(table: Tensor, trajectory: Trajectory, dtype: torch.dtype) -> Tensor:
    """h~ [C, n0] in `dtype`, as data."""
    steps = torch.arange(trajectory.cot_length)
    return rebuild(
        torch.from_numpy(trajectory.support_ids),
        torch.from_numpy(trajectory.support_probs),
        torch.from_numpy(trajectory.support_offsets),
        table.detach().float(),
        torch.full((len(steps),), trajectory.sigma),
        torch.full((len(steps),), trajectory.noise_seed),
        len(trajectory.prompt_ids) + steps,
        dtype,
    )


def naive_gradients(
    folder: Path,
    groups: Sequence[Group],
    support: Support = Support.recorded,
    cot_weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Float64 autograd of the paper's loss: RLOO, 1 / (B G), every sample alone. Parameter name -> gradient.

    Weights and soft inputs are first rounded to `dtype`, as a learner and an engine of that dtype see them.
    """
    model = load_model(folder, torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).double()
    # transformers computes rotary angles in float32 and some norms upcast to float32; both stand in the learner as well.
    for group in groups:
        rewards = [sample.reward for sample in group.samples]
        for index, sample in enumerate(group.samples):
            others = rewards[:index] + rewards[index + 1 :]
            advantage = sample.reward - sum(others) / len(others)
            cot, answer = naive_logprobs(model, sample.trajectory, support, dtype)
            loss = -advantage / (len(groups) * len(rewards)) * (cot_weight * cot.sum() + answer.sum())
            loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())

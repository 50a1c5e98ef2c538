"""`softrl bench learner`: what one optimiser step costs, with soft tokens and with hard ones, and where its time goes.

    one process, no Ray     soft, hard, soft, hard, ...   forward, backward, clip, AdamW on the same prompts and lengths
    then, once for each     the step in parts             batch | inputs | transformer | log-probabilities | optimiser

Model, batch, lengths and micro-batches are the recipe's, the prompts those of its task; what is generated is random, with supports
as large and as alike as measured ones (cluster/bench_logprobs.py). A speed is generated tokens (CoT, forced prefill, answer) per
second. Soft over hard is the median of the rounds' ratios: the two stand side by side in time, so a machine that slows down slows
down both. The learning rate is 0: every step starts from the same weights, and AdamW works as much as ever.
"""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from cluster.bench_kernels import processor
from cluster.bench_logprobs import TAU, make_supports
from cluster.live import make_table
from configs.schema import Config, Mode
from kernels.segments import segment_softmax
from learner.batch import Weighted, pack
from learner.learner import Learner
from learner.memory import allocated_bytes, peak_bytes
from learner.optimiser import clip_gradients
from rollout.models import load_tokenizer, resolve_model
from rollout.prompt import PREFILL_AT_LIMIT, render
from rollout.tasks import load_task
from rollout.trajectory import STOP_ANSWER_LENGTH, Group, Sample, Trajectory

MODES = (Mode.soft, Mode.hard)
PARTS = ("batch", "inputs", "transformer", "logprobs", "optimiser")
SMALLEST_LOG_PROBABILITY = -13.8  # of a support's token before it is renormalised: ln 1e-6


def bench_learner(config: Config, *, rounds: int = 3) -> dict[str, Any]:
    """Tokens per second, peak memory and parts of a step of the recipe, soft and hard.

    Raises InputError for a model or a task that does not load, RunError where peak memory cannot be read.
    """
    config = replace(config, learner=replace(config.learner, ranks=1, lr=0.0))
    torch.set_num_threads(config.learner.threads or len(os.sched_getaffinity(0)))
    prompts = make_prompts(config)
    prefill = load_tokenizer(config.model.path).encode(PREFILL_AT_LIMIT, add_special_tokens=False)
    with one_rank() as device:
        learner = Learner(config, resolve_model(config.model.path), 0, 1, device)
        resting = allocated_bytes(device)
        sigma, vocabulary = config.policy.gamma * learner.rms_embedding(), len(learner.policy.head)
        groups = {mode: make_groups(config, mode, prompts, prefill, vocabulary, sigma) for mode in MODES}
        # The peak is that of the first step: what it frees, a process does not always give back.
        peaks = {mode: peak_bytes(device, partial(run_step, learner, groups[mode])) for mode in MODES}
        seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        for _ in range(rounds):
            for mode in MODES:
                seconds[mode].append(_seconds(device, partial(run_step, learner, groups[mode])))
        parts = {mode: time_parts(learner, groups[mode]) for mode in MODES}
    tokens = sum(sample.trajectory.generated for group in groups[Mode.soft] for sample in group.samples)
    speeds = {str(mode): [tokens / s for s in seconds[mode]] for mode in MODES}
    return {
        "soft_over_hard": median(s / h for s, h in zip(speeds["soft"], speeds["hard"], strict=True)),
        "tokens_per_s": {name: median(values) for name, values in speeds.items()},
        "rounds": speeds,
        "parts_seconds": {str(mode): parts[mode] for mode in MODES},
        "peak_bytes": {str(mode): peaks[mode] for mode in MODES},
        "resting_bytes": resting,
        "device": f"{processor()}, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(),
        "model": config.model.path,
        "dtype": str(config.learner.dtype),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        | {"python": platform.python_version()},
        "batch": {
            "prompts": len(prompts),
            "samples": config.rollout.samples_per_prompt,
            "tokens": tokens,
            "micro_batch_tokens": learner.micro_batch_tokens,
            "activation_checkpointing": config.learner.activation_checkpointing,
            "compile": config.learner.compile,
        },
        "lengths": {
            "prompt": max(map(len, prompts)),
            "cot": config.policy.max_cot_tokens,
            "prefill": len(prefill),
            "answer": config.policy.max_answer_tokens,
        },
    }


def print_learner(figures: dict[str, Any], console: Console | None = None) -> None:
    """The figures as tables."""
    console = console or Console()
    batch, lengths = figures["batch"], figures["lengths"]
    console.print(
        f"one step of {figures['model']} ({figures['dtype']}): {batch['prompts']} prompts of {lengths['prompt']} tokens x "
        f"{batch['samples']} samples of {lengths['cot']} CoT + {lengths['prefill']} forced + {lengths['answer']} answer tokens, "
        f"micro-batches of {batch['micro_batch_tokens']}, on {figures['device']}",
        highlight=False,
        soft_wrap=True,
    )
    speeds = [
        [
            f"{name} tokens",
            f"{figures['tokens_per_s'][name]:,.0f}",
            "  ".join(f"{x:,.0f}" for x in figures["rounds"][name]),
            f"{figures['peak_bytes'][name] / 2**30:.2f}",
        ]
        for name in ("soft", "hard")
    ]
    console.print(make_table("", ["", "tokens/s", "rounds", "peak GiB"], speeds))
    parts = [[name, *(f"{figures['parts_seconds'][name][part]:.3f}" for part in PARTS)] for name in ("soft", "hard")]
    console.print(make_table("", ["seconds in", *PARTS], parts))
    console.print(
        f"soft over hard {figures['soft_over_hard']:.3f} (median of the rounds' ratios); "
        f"{figures['resting_bytes'] / 2**30:.2f} GiB at rest",
        highlight=False,
    )


# The batch


def make_prompts(config: Config) -> list[list[int]]:
    """The prompts of the first problems of the recipe's task, one step of them."""
    tokenizer = load_tokenizer(config.model.path)
    problems = load_task(config.task.train)[: config.rollout.prompts_per_step]
    return [tokenizer.encode(render(config.task.prompt, problem.question)) for problem in problems]


def make_groups(
    config: Config, mode: Mode, prompts: list[list[int]], prefill: list[int], vocabulary: int, sigma: float
) -> list[Group]:
    """A step's groups: every sample as long as the recipe allows, random tokens and supports, rewards that differ."""
    g = torch.Generator().manual_seed(0)
    groups = []
    for index, prompt in enumerate(prompts):
        samples = []
        for i in range(config.rollout.samples_per_prompt):
            trajectory = _trajectory(config, mode, prompt, prefill, sigma, vocabulary, (index, i), g)
            samples.append(Sample(trajectory=trajectory, reward=(100.0, 10.0, 0.0)[i % 3], correct=i % 3 == 0, answer_text=""))
        groups.append(Group(step=0, prompt_index=index, samples=tuple(samples)))
    return groups


def _trajectory(
    config: Config,
    mode: Mode,
    prompt: list[int],
    prefill: list[int],
    sigma: float,
    vocabulary: int,
    place: tuple[int, int],
    g: torch.Generator,
) -> Trajectory:
    cot, answer = config.policy.max_cot_tokens, config.policy.max_answer_tokens
    ids, offsets = make_supports(cot, vocabulary, g)
    logits = SMALLEST_LOG_PROBABILITY * torch.rand(len(ids), generator=g)
    probs = segment_softmax(logits, torch.ones(cot), offsets)
    shadow, said = (torch.randint(0, vocabulary, (n,), generator=g).int().numpy() for n in (cot, answer))
    soft = mode is not Mode.hard
    return Trajectory(
        prompt_ids=np.array(prompt, np.int32),
        prompt_index=place[0],
        sample_index=place[1],
        mode=mode,
        tau=TAU if soft else 1.0,
        sigma=sigma if soft else 0.0,
        noise_seed=place[0] * 1_000_003 + place[1],
        shadow_ids=shadow,
        support_ids=ids.numpy() if soft else np.empty(0, np.int32),
        support_probs=probs.numpy() if soft else np.empty(0, np.float32),
        support_offsets=offsets.numpy() if soft else np.zeros(cot + 1, np.int64),
        dropped_mass=np.zeros(cot, np.float32),
        soft_embeddings=None,
        prefill_ids=np.array(prefill, np.int32),
        answer_ids=said,
        answer_logprobs=np.zeros(answer, np.float32),
        stop_reason=STOP_ANSWER_LENGTH,
        phrase_found=False,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )


# The step


def run_step(learner: Learner, groups: list[Group]) -> dict[str, float]:
    """What a run does with a batch; the step's metrics."""
    learner.begin_step(0)
    for group in groups:
        learner.accumulate(group)
    return learner.finish_step()


def time_parts(learner: Learner, groups: list[Group]) -> dict[str, float]:
    """Seconds of each of PARTS in one step, taken apart by hooks: `inputs` gathers the weights, embeds tokens and rebuilds h~,
    `logprobs` are the kernels' forward and backward, `transformer` all that lies between."""
    policy, seconds = learner.policy, dict.fromkeys(PARTS, 0.0)
    last = time.perf_counter()

    def mark(part: str) -> None:
        nonlocal last
        if learner.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[part], last = seconds[part] + now - last, now

    def body_done(_module: Any, _arguments: Any, output: Any) -> None:
        mark("transformer")
        output.last_hidden_state.register_hook(lambda _gradient: mark("logprobs"))

    body: Any = policy.model.base_model
    hooks = [
        body.register_forward_pre_hook(lambda *_: mark("inputs")),
        body.register_forward_hook(body_done),
        policy.register_forward_hook(lambda *_: mark("logprobs")),
    ]
    learner.begin_step(0)
    for batch in pack(_weighted(groups), learner.micro_batch_tokens):
        on_device = batch.to(learner.device)
        mark("batch")
        policy(on_device).loss.backward()
        mark("transformer")
    clip_gradients(policy, learner.config.learner.clip)
    learner.optimiser.step()
    learner.optimiser.zero_grad(set_to_none=True)
    mark("optimiser")
    for hook in hooks:
        hook.remove()
    return seconds


def _weighted(groups: list[Group]) -> list[Weighted]:
    """Every sample with some weight: time does not depend on which."""
    return [(sample.trajectory, 0.01 * (1 + i % 3)) for group in groups for i, sample in enumerate(group.samples)]


# The process


@contextmanager
def one_rank() -> Iterator[torch.device]:
    """A process group of this process alone, on its GPU if it has one."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun

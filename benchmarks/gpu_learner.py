"""gpu_check's learner step: a model of Llama-3.1-8B's shape with few layers, the product's own policy, loss and optimiser.

    random weights, L layers --Policy--> packed batch of soft (or hard) trajectories --> forward, backward, clip, AdamW
    seconds at two L --a straight line--> 32 layers                  apart: inputs, transformer, log-probabilities, optimiser

One process without FSDP: weights, gradients and moments are all bf16, where a run keeps float32 masters and moves them between
ranks. No activation checkpointing.
"""

import importlib.metadata
import time
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.gpu_plan import Scale, Setting, relative
from benchmarks.gpu_timing import Figures, free_memory, measure_peaks, peak_bytes, seconds_of
from cluster.bench_logprobs import TAU, make_supports
from configs.schema import Config, Dtype, Mode, Support
from kernels.segments import segment_softmax
from kernels.soft_embedding import rms
from learner import attention
from learner.batch import PackedBatch, pack
from learner.losses import Terms
from learner.optimiser import build_optimiser, clip_gradients
from learner.policy import Policy
from rollout.trajectory import STOP_ANSWER_LENGTH, Trajectory

LAYERS = 32  # of Llama-3.1-8B
STEPS = 3  # timed, after one that warms up
PARTS = ("inputs", "transformer", "logprobs", "optimiser")
FORMS = {"soft": (Mode.soft, Support.recorded), "soft dense": (Mode.soft, Support.full), "hard": (Mode.hard, Support.recorded)}
PROMPT, COT, PREFILL, ANSWER, GROUP = 96, 128, 6, 32, 32  # tokens, and samples of a prompt
SMALLEST_LOG_PROBABILITY = -13.8  # of a support's token before it is renormalised: ln 1e-6


def time_learner(setting: Setting) -> Figures:
    """Seconds, tokens per second, parts and peak memory of a step, soft, soft over the whole vocabulary, and hard."""
    peaks = measure_peaks(setting)
    found: dict[str, dict[str, Figures]] = {form: {} for form in FORMS}
    parameters: dict[str, int] = {}
    for layers in setting.scale.layers:
        policy = make_policy(setting, layers)
        parameters[str(layers)] = sum(parameter.numel() for parameter in policy.parameters())
        optimiser = build_optimiser(policy, make_config())
        for form, (mode, support) in FORMS.items():
            policy.support = support
            batch = make_batch(setting.scale, mode, policy.rms_embedding).to(setting.device)
            found[form][str(layers)] = _measured(setting, policy, optimiser, batch)
        del policy, optimiser
        free_memory(setting)
    figures: Figures = {form: by_layers | {"at_32_layers": extrapolated(by_layers)} for form, by_layers in found.items()}
    for form in FORMS:
        figures[form]["seconds_over_hard_at_32_layers"] = (
            figures[form]["at_32_layers"]["seconds"] / figures["hard"]["at_32_layers"]["seconds"]
        )
    few, many = (str(layers) for layers in setting.scale.layers)
    per_layer = (parameters[many] - parameters[few]) / (int(many) - int(few))
    seconds = (found["soft"][many]["parts"]["transformer"] - found["soft"][few]["parts"]["transformer"]) / (int(many) - int(few))
    rows = found["soft"][few]["rows"]
    return figures | {
        "parameters": parameters,
        "shape": "Llama-3.1-8B: hidden 4096, MLP 14336, 32 + 8 heads, V = 128,256, untied" if setting.on_gpu else "tiny",
        "layer_flops_per_s": 6.0 * per_layer * rows / max(seconds, 1e-9),  # without attention's own products
        "bf16_flops_per_s": peaks.flops_per_s,
        "attention": compare_attention(setting, make_batch(setting.scale, Mode.soft, 1.0).to(setting.device)),
        "extrapolation": f"a straight line through {few} and {many} layers, to {LAYERS}; all else is measured",
    }


def extrapolated(by_layers: dict[str, Figures]) -> Figures:
    """Seconds, tokens per second and parts at LAYERS, on the line through the two that were measured."""
    (few, less), (many, more) = ((int(layers), figures) for layers, figures in by_layers.items())

    def line(a: float, b: float) -> float:
        return a + (b - a) * (LAYERS - few) / (many - few)

    parts = {part: line(less["parts"][part], more["parts"][part]) for part in PARTS}
    seconds = line(less["seconds"], more["seconds"])
    tokens = less["generated_tokens"]
    return {"seconds": seconds, "generated_tokens_per_s": tokens / seconds, "rows_per_s": less["rows"] / seconds, "parts": parts}


def _measured(setting: Setting, policy: Policy, optimiser: torch.optim.Optimizer, batch: PackedBatch) -> Figures:
    step = Step(setting, policy, optimiser, batch)
    peak = peak_bytes(step.run, setting)  # the first step, which also compiles
    timed = [step.run() for _ in range(STEPS if setting.on_gpu else 1)]
    seconds = median(sum(parts.values()) for parts in timed)
    return {
        "seconds": seconds,
        "parts": {part: median(parts[part] for parts in timed) for part in PARTS},
        "rows": batch.rows,
        "generated_tokens": batch.generated,
        "generated_tokens_per_s": batch.generated / seconds,
        "peak_bytes_above_weights_and_moments": peak,
        "loss": step.loss,
    }


def compare_attention(setting: Setting, batch: PackedBatch) -> Figures:
    """One layer's attention, forward and backward: seconds padded and, where flash-attn is installed, as lists; how far apart."""
    heads, width = setting.scale.heads, setting.scale.width // setting.scale.heads[0]
    shapes = [(1, count, batch.rows, width) for count in (heads[0], heads[1], heads[1])]
    inputs = [torch.randn(shape, device=setting.device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = heads[0] // heads[1], True  # type: ignore[assignment]

    def outcome(lists: bool) -> list[Tensor]:
        with mock.patch.object(attention, "_takes_lists", lambda _: lists):
            query, key, value = inputs
            output, _ = attention.packed_attention(layer, query, key, value, None, segments=batch.segments, scaling=width**-0.5)
        return [output, *torch.autograd.grad(output.square().sum(), inputs)]

    figures: Figures = {"padded_seconds": seconds_of(lambda: outcome(False), setting), "flash_attn": None}
    if setting.on_gpu and attention.flash_attn_varlen_func is not None:
        figures["flash_attn"] = importlib.metadata.version("flash-attn")
        figures["lists_seconds"] = seconds_of(lambda: outcome(True), setting)
        pairs = zip(outcome(True), outcome(False), strict=True)
        figures["relative_difference"] = max(relative(mine, theirs.double()) for mine, theirs in pairs)
    return figures


# The step


class Step:
    """One optimiser step on one micro-batch, taken apart by hooks as it runs."""

    def __init__(self, setting: Setting, policy: Policy, optimiser: torch.optim.Optimizer, batch: PackedBatch) -> None:
        self.setting, self.policy, self.optimiser, self.batch = setting, policy, optimiser, batch
        self.loss = float("nan")

    def run(self) -> dict[str, float]:
        """Seconds of each of PARTS. `inputs` embeds tokens and rebuilds h~, `logprobs` are the kernels forward and backward."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        body: Any = self.policy.model
        body = body.base_model
        hooks = [
            body.register_forward_pre_hook(lambda *_: self._mark("inputs")),
            body.register_forward_hook(self._body_done),
            self.policy.register_forward_hook(lambda *_: self._mark("logprobs")),
        ]
        self._synchronize()
        self.last = time.perf_counter()
        terms: Terms = self.policy(self.batch)
        terms.loss.backward()
        self._mark("transformer")
        clip_gradients(self.policy, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._mark("optimiser")
        for hook in hooks:
            hook.remove()
        self.loss = float(terms.loss.detach())
        return self.seconds

    def _body_done(self, _module: Any, _arguments: Any, output: Any) -> None:
        self._mark("transformer")
        output.last_hidden_state.register_hook(lambda _gradient: self._mark("logprobs"))

    def _mark(self, part: str) -> None:
        """The time since the last mark belongs to `part`."""
        self._synchronize()
        now = time.perf_counter()
        self.seconds[part], self.last = self.seconds[part] + now - self.last, now

    def _synchronize(self) -> None:
        if self.setting.on_gpu:
            torch.cuda.synchronize()


# The model and the batch


def make_config() -> Config:
    """The product's defaults in bf16; a learning rate of 0, at which AdamW works as much as ever and the weights stay."""
    config = Config()
    config.model.dtype = config.engine.dtype = config.learner.dtype = Dtype.bfloat16
    config.learner.lr = 0.0
    return config


def make_policy(setting: Setting, layers: int) -> Policy:
    """A Llama with random bf16 weights on the device."""
    s = setting.scale
    llama = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.width,
        intermediate_size=s.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=s.heads[0],
        num_key_value_heads=s.heads[1],
        head_dim=s.width // s.heads[0],
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        use_cache=False,
    )
    with setting.device:
        model = AutoModelForCausalLM.from_config(llama, dtype=torch.bfloat16, attn_implementation=attention.NAME)
    model.train()
    return Policy(model, make_config(), rms(model.get_input_embeddings().weight.detach()))


def make_batch(scale: Scale, mode: Mode, rms_embedding: float) -> PackedBatch:
    """As many groups as fit `learner_rows`, at least one sample, with supports as large as measured ones."""
    g = torch.Generator().manual_seed(0)
    sample_rows = COT + PREFILL + ANSWER - 1
    samples = max(1, min(GROUP, (scale.learner_rows - PROMPT) // sample_rows))
    prompts = max(1, scale.learner_rows // (PROMPT + samples * sample_rows))
    cot = COT if scale.learner_rows >= PROMPT + sample_rows else 8
    weighted = [
        (_trajectory(scale, mode, rms_embedding, (prompt, sample), cot, g), (0.01, -0.01)[sample % 2])
        for prompt in range(prompts)
        for sample in range(samples)
    ]
    (batch,) = pack(weighted, 2 * scale.learner_rows)
    return batch


def _trajectory(scale: Scale, mode: Mode, rms_embedding: float, place: tuple[int, int], cot: int, g: torch.Generator) -> Trajectory:
    def tokens(count: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return torch.randint(0, scale.vocabulary, (count,), generator=g).int().numpy()

    ids, offsets = make_supports(cot, scale.vocabulary, g)
    probs: Tensor = segment_softmax(SMALLEST_LOG_PROBABILITY * torch.rand(len(ids), generator=g), torch.ones(cot), offsets)
    soft = mode is not Mode.hard
    return Trajectory(
        prompt_ids=np.arange(PROMPT, dtype=np.int32) + place[0],
        prompt_index=place[0],
        sample_index=place[1],
        mode=mode,
        tau=TAU if soft else 1.0,
        sigma=0.33 * rms_embedding if soft else 0.0,
        noise_seed=place[0] * 1_000_003 + place[1],
        shadow_ids=tokens(cot),
        support_ids=ids.numpy() if soft else np.empty(0, np.int32),
        support_probs=probs.numpy() if soft else np.empty(0, np.float32),
        support_offsets=offsets.numpy() if soft else np.zeros(cot + 1, np.int64),
        dropped_mass=np.zeros(cot, np.float32),
        soft_embeddings=None,
        prefill_ids=tokens(PREFILL),
        answer_ids=tokens(ANSWER),
        answer_logprobs=np.zeros(ANSWER, np.float32),
        stop_reason=STOP_ANSWER_LENGTH,
        phrase_found=False,
        weight_versions=np.array([0]),
        weight_version_starts=np.array([0]),
    )

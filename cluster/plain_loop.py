"""The baseline: soft-token generation as the paper had it, a plain PyTorch loop over transformers with a KV cache.

    prompts, left-padded --> model --> p = softmax(logits / tau) --> p @ E over the whole vocabulary, + sigma * randn --.
                               ^------------------------- L times, then forced prefill, then answer tokens ------------'

All sequences advance together until all are done, as such loops do. What a training loop would have to do as well (look for the
stop phrase, keep a record for the learner) is left out, so its speed here is the most that one could hope for.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from configs.schema import Dtype


@dataclass(frozen=True, slots=True)
class PlainLoopSpeed:
    """How long each timed round took; `device` is a GPU's name or "cpu", `threads` those of torch."""

    positions: int  # decoded in each round: sequences x (CoT + forced prefill + answer)
    seconds: list[float]  # of each round, prompts included
    device: str
    threads: int

    @property
    def tokens_per_s(self) -> list[float]:
        """Decoded positions per second of each round, in order."""
        return [self.positions / seconds for seconds in self.seconds]


def time_plain_loop(
    model_dir: str,
    prompts: list[list[int]],
    prefill: list[int],
    *,
    tau: float,
    sigma: float,
    cot_tokens: int,
    answer_tokens: int,
    rounds: int,
    threads: int,
    dtype: Dtype = Dtype.bfloat16,
) -> PlainLoopSpeed:
    """Load the model and time `rounds` batches after a short one that warms up."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).to(device).eval()
    generator = torch.Generator(device).manual_seed(0)

    def batch(steps: int) -> float:
        begun = time.perf_counter()
        shadow, answer = generate(model, prompts, prefill, tau, sigma, steps, answer_tokens, generator)
        answer.cpu()  # waits for the device
        assert shadow.shape == (len(prompts), steps) and answer.shape == (len(prompts), answer_tokens)
        return time.perf_counter() - begun

    batch(2)
    seconds = [batch(cot_tokens) for _ in range(rounds)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return PlainLoopSpeed(len(prompts) * (cot_tokens + len(prefill) + answer_tokens), seconds, name, torch.get_num_threads())


@torch.inference_mode()
def generate(
    model: Any,
    prompts: list[list[int]],
    prefill: list[int],
    tau: float,
    sigma: float,
    cot_tokens: int,
    answer_tokens: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Shadow ids [R, L] and sampled answer ids [R, A] of R prompts: L soft steps, the forced ids, A ordinary tokens."""
    embedding = model.get_input_embeddings().weight  # [V, n0]
    ids, mask = left_padded(prompts, embedding.device)
    cache = DynamicCache()

    def forward(inputs: Tensor) -> Tensor:
        """Logits [R, V] after `inputs` [R, t, n0], whose columns the mask already has."""
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -inputs.shape[1] :]
        output = model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def longer(columns: int) -> Tensor:
        return torch.cat([mask, mask.new_ones(len(prompts), columns)], dim=1)

    logits = forward(embedding[ids])
    shadow = []
    for _ in range(cot_tokens):
        p = torch.softmax(logits.float() / tau, dim=-1)
        mean = p.to(embedding.dtype) @ embedding
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        shadow.append(p.argmax(dim=-1))
        mask = longer(1)
        logits = forward((mean + sigma * noise)[:, None])
    mask = longer(len(prefill))
    forced = torch.tensor(prefill, device=embedding.device).expand(len(prompts), -1)
    logits = forward(embedding[forced])
    answer = []
    for step in range(answer_tokens):
        answer.append(torch.multinomial(torch.softmax(logits.float(), dim=-1), 1, generator=generator))
        if step < answer_tokens - 1:
            mask = longer(1)
            logits = forward(embedding[answer[-1]])
    return torch.stack(shadow, dim=1), torch.cat(answer, dim=1)


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and mask [R, longest]; a prompt's last token stands in the last column, and what is before its first is masked."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask

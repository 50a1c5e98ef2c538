"""The baseline is itself right: padding changes nothing, and cold noiseless soft tokens are greedy ones."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cluster.plain_loop import generate

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14]]
PREFILL = [3, 4]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.3, tie_word_embeddings=False)).eval()


def run(model: LlamaForCausalLM, prompts: list[list[int]], tau: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    return generate(model, prompts, PREFILL, tau, sigma, 6, 3, torch.Generator().manual_seed(1))


def test_a_padded_batch_thinks_what_each_prompt_thinks_alone(model: LlamaForCausalLM) -> None:
    together, _ = run(model, PROMPTS, tau=0.5, sigma=0.0)
    alone = [run(model, [prompt], tau=0.5, sigma=0.0)[0][0] for prompt in PROMPTS]
    assert torch.equal(together, torch.stack(alone))


def test_without_noise_and_warmth_soft_tokens_are_greedy_tokens(model: LlamaForCausalLM) -> None:
    shadow, _ = run(model, PROMPTS, tau=1e-4, sigma=0.0)
    for row, prompt in zip(shadow, PROMPTS, strict=True):
        ids = torch.tensor([prompt])
        for _ in range(shadow.shape[1]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        assert row.tolist() == ids[0, len(prompt) :].tolist()


def test_noise_changes_what_is_thought_and_answers_are_drawn(model: LlamaForCausalLM) -> None:
    shadow, answer = run(model, PROMPTS, tau=0.5, sigma=1.0)
    assert shadow.shape == (3, 6) and answer.shape == (3, 3)
    assert not torch.equal(shadow, run(model, PROMPTS, tau=0.5, sigma=0.0)[0])

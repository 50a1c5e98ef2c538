"""Tiny random models with SmolLM2's tokenizer and full vocabulary: small enough for a test, real enough for vLLM to serve."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rollout.models import SMOLLM2, resolve_model

HEAD_DIM = 32  # the smallest that vLLM's CPU attention takes
EMBEDDING_STD = 0.05  # small beside what the layers add, or a tied head would only ever repeat its input
LOGIT_STD = 4.0  # over a vocabulary of 49,152: a few nats of entropy, as a trained model has


def make_tiny_llama(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the checkpoint and its tokenizer into `folder` and return it. The same arguments give the same bytes."""
    model = LlamaForCausalLM(LlamaConfig(head_dim=HEAD_DIM, **_shape(layers, hidden, tied)))
    return _write(model, folder, seed, dtype)


def make_tiny_qwen2(folder: Path, *, layers: int = 2, hidden: int = 128, tied: bool = True, seed: int = 0) -> Path:
    """As `make_tiny_llama`: a Qwen2.5, whose queries, keys and values have biases."""
    model = Qwen2ForCausalLM(Qwen2Config(**_shape(layers, hidden, tied)))
    return _write(model, folder, seed, torch.float32)


def _shape(layers: int, hidden: int, tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": 49152,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": max(1, hidden // HEAD_DIM // 2),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }


def _write(model: Any, folder: Path, seed: int, dtype: torch.dtype) -> Path:
    hidden = model.config.hidden_size
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):  # a tied head is not listed twice
            if "embed_tokens" in name or "lm_head" in name:
                weight.normal_(0.0, EMBEDDING_STD, generator=random)
            elif weight.ndim == 2:  # keeps activations near RMS 1, with attention that is not flat
                weight.normal_(0.0, 1.5 / weight.shape[1] ** 0.5, generator=random)
            elif name.endswith("bias"):
                weight.normal_(0.0, 0.5, generator=random)
        model.model.norm.weight.fill_(LOGIT_STD / (EMBEDDING_STD * hidden**0.5))
    model.to(dtype).save_pretrained(folder)
    source = resolve_model(SMOLLM2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder

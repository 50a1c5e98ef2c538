"""Which adapter takes a worker's model runner, and what soft decoding can't be mixed with."""

import importlib
from typing import Any

import torch

from configs.errors import InputError
from rollout.soft_decoding import SoftDecoder

# By the module of vLLM's base class. vLLM imports a runner only where it is used (V2 needs Triton), and so is its adapter.
ADAPTERS = {"vllm.v1.worker.gpu_model_runner": "v1", "vllm.v1.worker.gpu.model_runner": "v2"}


def attach(runner: Any, decoder: SoftDecoder) -> str:
    """Turn a live model runner into a soft-decoding one; returns the name of the adapter.

    Raises InputError for a runner that no adapter knows.
    """
    for base in type(runner).__mro__:
        if base.__module__ in ADAPTERS:
            name = ADAPTERS[base.__module__]
            importlib.import_module(f"rollout.adapter_{name}").attach(runner, decoder)
            return name
    found = f"{type(runner).__module__}.{type(runner).__name__}"
    raise InputError(f"vLLM runs the model in {found}, expected a runner derived from one of {', '.join(ADAPTERS)}")


def require_compatible(vllm_config: Any) -> None:
    """Raises InputError naming the first vLLM option, as on its command line, that soft decoding can't be mixed with."""
    parallel = vllm_config.parallel_config
    mixed_with = [
        ("--speculative-config", vllm_config.speculative_config is not None, "drafts are ids, soft tokens are not"),
        ("--enable-lora", vllm_config.lora_config is not None, "adapters may change the embedding and the LM head"),
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size > 1, "soft tokens are made in its last stage, not the first"),
        ("--enable-batch-sharded-sampling", bool(parallel.enable_batch_sharded_sampling), "every rank has to see every request"),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, "prompts are split over GPUs"),
    ]
    for option, on, reason in mixed_with:
        if on:
            raise InputError(f"vLLM runs with {option}, which soft decoding can't be mixed with ({reason}); leave it out")
    model = vllm_config.model_config
    if not model.enable_prompt_embeds:
        raise InputError("vLLM runs without --enable-prompt-embeds, whose buffer takes the soft tokens; add it")
    if vllm_config.device_config.device_type == "cuda" and model.head_dtype != torch.float32:
        wanted = """--hf-overrides '{"head_dtype": "float32"}'"""
        raise InputError(f"vLLM rounds logits to {model.head_dtype}, soft tokens need all of float32; add {wanted}")

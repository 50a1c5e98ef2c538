"""Which adapter takes a worker's model runner, and what soft decoding can't be mixed with."""

import importlib
from typing import Any

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
        ("--tensor-parallel-size", parallel.tensor_parallel_size > 1, "the embedding that soft tokens mix is split over GPUs"),
        ("--prefill-context-parallel-size", parallel.prefill_context_parallel_size > 1, "prompts are split over GPUs"),
    ]
    for option, on, reason in mixed_with:
        if on:
            raise InputError(f"vLLM runs with {option}, which soft decoding can't be mixed with ({reason}); leave it out")
    if not vllm_config.model_config.enable_prompt_embeds:
        raise InputError("vLLM runs without --enable-prompt-embeds, whose buffer takes the soft tokens; add it")

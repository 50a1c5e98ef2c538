"""What a vLLM engine process is started with: its arguments, its environment, the ids that end a text."""

import json
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.schema import Config, PushBackend
from rollout.plugin import SHM_BACKEND


def engine_args(config: Config, model_dir: str) -> Any:
    """The vllm.AsyncEngineArgs of an engine that can decode soft tokens."""
    import torch
    from vllm import AsyncEngineArgs
    from vllm.config import WeightTransferConfig

    engine = config.engine
    on_gpu = torch.cuda.is_available()
    backend = config.push.backend.resolved(on_gpu)
    kv_cache_gib = engine.kv_cache_gib if engine.kv_cache_gib is not None or on_gpu else 2.0
    return AsyncEngineArgs(
        model=model_dir,
        dtype=str(engine.dtype),
        tensor_parallel_size=engine.tensor_parallel,
        # In a placement group vLLM would have Ray place each rank, but this actor holds the GPUs or cores of all of them.
        distributed_executor_backend="mp" if engine.tensor_parallel > 1 else None,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        max_model_len=engine.max_model_len,
        enforce_eager=engine.enforce_eager or not on_gpu,
        kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        # A GPU adds logits up in float32 anyway: vLLM is asked not to round them. (A CPU would need a second head for it.)
        hf_overrides={"head_dtype": "float32"} if on_gpu else {},
        enable_prompt_embeds=True,  # gives `inputs_embeds`, the rows that soft decoding writes over
        enable_prefix_caching=True,
        block_size=None if on_gpu else 32,  # vLLM's 128 on a CPU is longer than many prompts, and only whole blocks are shared
        worker_extension_cls="rollout.worker_extension.SoftWorkerExtension",
        weight_transfer_config=WeightTransferConfig(backend=SHM_BACKEND if backend is PushBackend.shm else str(backend)),
        generation_config="vllm",  # a checkpoint's own sampling defaults must not leak in
        seed=config.run.seed % 2**32,  # numpy takes no more
        use_tqdm_on_load=False,
    )


def engine_environment(cores: list[int] | None, ranks: int = 1) -> dict[str, str]:
    """Environment of an engine process. `cores` are the CPU cores for its arithmetic; None where a GPU does it.

    vLLM on a CPU reserves a core for its front end unless told which cores to bind, which halves the compute of a small machine.
    Ranks share no core, and have equally many: how a sum is cut into threads decides its last bits, and all must draw the same
    tokens. Raises InputError when there is none for some of them.
    """
    common = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}  # where tracebacks go: engine_process.py
    if cores is None:
        return common
    each = len(cores) // ranks
    if not each:
        raise InputError(
            f"engine.tensor_parallel = {ranks}: every rank takes a core of its own, an engine has {len(cores)} here; lower it or "
            "engine.count, or raise engine.threads where that is set"
        )
    bind = "|".join(",".join(map(str, cores[rank * each : (rank + 1) * each])) for rank in range(ranks))
    return common | {"VLLM_CPU_OMP_THREADS_BIND": bind, "OMP_NUM_THREADS": str(each), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def require_splits(model_dir: str, ranks: int) -> None:
    """Raises InputError unless vLLM can split the model over the ranks of an engine: whole attention heads and equal parts of every
    MLP for each, and of key-value heads either several for each or one for several (vllm/model_executor/models/llama.py)."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    if not heads:
        return  # named otherwise: vLLM knows
    kv_heads, width = config.get("num_key_value_heads") or heads, config.get("intermediate_size") or 0
    possible = [n for n in range(1, heads + 1) if not (heads % n or width % n or max(kv_heads, n) % min(kv_heads, n))]
    if ranks not in possible:
        raise InputError(
            f"engine.tensor_parallel = {ranks}: expected one of {', '.join(map(str, possible))}: {model_dir} has {heads} attention "
            f"heads, {kv_heads} key-value heads, intermediate_size {width}"
        )


def eos_ids(model_dir: str, tokenizer: Any) -> list[int]:
    """All ids that end a text: the tokenizer's and the checkpoint's. Raises InputError when there is none."""
    from transformers import GenerationConfig

    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        extra = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids += [extra] if isinstance(extra, int) else list(extra or [])
    except OSError:
        pass  # a checkpoint may come without generation_config.json
    if not ids:
        raise InputError(f"{model_dir}: neither tokenizer nor generation_config.json names an end-of-sequence token")
    return list(dict.fromkeys(ids))

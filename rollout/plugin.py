"""What vLLM loads in every one of its processes through the `vllm.general_plugins` entry point.

It registers the shared-memory weight transfer, and changes three things in vLLM:

- The KV blocks of a softrl request's chain of thought get a prefix-cache key of their own: vLLM keys a block by its token ids, and
  two soft histories with equal shadow ids have different keys and values. Prompt blocks keep vLLM's key, so the samples of a group
  share their prompt.
- Blocks are zeroed before they are used again. A request whose logits are not finite leaves NaN in its blocks, and attention over
  the unwritten rest of a block is 0 * NaN: whoever got its blocks next failed with it.
- A server whose --additional-config says so decodes soft tokens for its clients (rollout/serving.py). It is off by default.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from configs.errors import InputError
from configs.versions import TESTED_VLLM

EXTRA_ARG = "softrl"  # the key of a request's options in SamplingParams.extra_args
SHM_BACKEND = "softrl_shm"
CORE_METHOD = "softrl_plugin"  # what EngineCore is asked for proof that the plugin ran in its process
PLUGIN_ADVICE = f"unset VLLM_PLUGINS or add {EXTRA_ARG}, and see `softrl doctor`"


def register() -> None:
    """Idempotent; vLLM may call it several times. Raises RuntimeError on a vLLM that softrl was not tested with."""
    import vllm

    if vllm.__version__.split("+")[0] not in TESTED_VLLM:
        raise RuntimeError(f"vllm {vllm.__version__}: softrl is tested with {', '.join(TESTED_VLLM)}; install one of those")
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if SHM_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHM_BACKEND, "rollout.weight_transfer", "SharedMemoryWeightTransferEngine")
    _patch_block_hash()
    _zero_reused_blocks()
    _serve_soft_tokens()
    _answer_from_engine_core()


def plugins_that_leave_it_out() -> str | None:
    """VLLM_PLUGINS where it keeps vLLM from loading this plugin, which vLLM says nothing of; else None."""
    allowed = os.environ.get("VLLM_PLUGINS")
    return None if allowed is None or EXTRA_ARG in allowed.split(",") else allowed


def require_plugin_allowed() -> None:
    """Raises InputError where VLLM_PLUGINS keeps vLLM from loading this plugin."""
    if (allowed := plugins_that_leave_it_out()) is not None:
        raise InputError(f"VLLM_PLUGINS={allowed} keeps vLLM from loading softrl's plugin; unset it or add {EXTRA_ARG}")


def plugin_ran() -> bool:
    """Whether the changes are made in this process."""
    from vllm.v1.core import kv_cache_utils

    return hasattr(kv_cache_utils.generate_block_hash_extra_keys, "__wrapped__")


def _answer_from_engine_core() -> None:
    """Give EngineCore CORE_METHOD, in the process that runs it and in those that may fork into it: they have imported it."""
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None:
        setattr(core.EngineCore, CORE_METHOD, lambda self: f"vllm {core.VLLM_VERSION}")


def _serve_soft_tokens() -> None:
    """Wrap what makes vLLM's config (vllm/engine/arg_utils.py), and what readies a worker of any platform and executor."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if not hasattr(EngineArgs.create_engine_config, "__wrapped__"):
        EngineArgs.create_engine_config = served(EngineArgs.create_engine_config)
    WorkerWrapperBase.compile_or_warm_up_model = attached_after_warm_up


def served(original: Callable[..., Any]) -> Callable[..., Any]:
    """`original`, which vLLM calls in its front end before it starts the engine, with softrl's part of the config checked."""

    @functools.wraps(original)
    def create_engine_config(*args: Any, **kwargs: Any) -> Any:
        from rollout import serving  # it needs torch and vLLM, which has only begun to load

        config = original(*args, **kwargs)
        serving.configure(config)
        serving.open_front_end()
        return config

    return create_engine_config


def attached_after_warm_up(wrapper: Any) -> Any:
    """For vLLM's WorkerWrapperBase: the worker's own warm-up, and then, as in the engine actor, soft decoding if it is served."""
    from rollout import serving

    times = wrapper.worker.compile_or_warm_up_model()
    serving.attach_served(wrapper.worker)
    return times


def _zero_reused_blocks() -> None:
    """Have vLLM zero KV blocks as it does for models whose state is read before it is whole (v1/kv_cache_interface.py)."""
    from vllm.v1.kv_cache_interface import KVCacheConfig

    KVCacheConfig.needs_kv_cache_zeroing = property(lambda self: True)


def _patch_block_hash() -> None:
    """Wrap vllm/v1/core/kv_cache_utils.py:generate_block_hash_extra_keys wherever it has been imported by name."""
    from vllm.v1.core import block_pool, kv_cache_utils

    name = "generate_block_hash_extra_keys"
    original = getattr(kv_cache_utils, name)
    if hasattr(original, "__wrapped__"):
        return
    wrapped = private_thoughts(original)
    for module in (kv_cache_utils, block_pool, sys.modules.get("vllm.v1.simple_kv_offload.manager")):
        if module is not None:
            setattr(module, name, wrapped)


def private_thoughts(original: Callable[..., tuple[tuple[Any, ...] | None, int]]) -> Callable[..., Any]:
    """`original`, with the request's own id as one more key for every block that reaches past a softrl prompt."""

    @functools.wraps(original)
    def keys(request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int) -> tuple[tuple[Any, ...] | None, int]:
        extra, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        params = request.sampling_params
        if end_token_idx > request.num_prompt_tokens and params is not None and EXTRA_ARG in (params.extra_args or {}):
            extra = (*(extra or ()), (EXTRA_ARG, request.request_id))
        return extra, next_mm_idx

    return keys

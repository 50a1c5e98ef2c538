"""What soft decoding is not mixed with is refused by name, before anything of vLLM is touched."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import LoRAConfig, ParallelConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from configs.errors import InputError
from rollout.adapters import attach, require_compatible
from tests.rollout.slow_decoding import STOP_IDS, Toy


def vllm_config(**fields: Any) -> Any:
    usual: dict[str, Any] = {
        "model_config": SimpleNamespace(enable_prompt_embeds=True, head_dtype=torch.bfloat16),
        "device_config": SimpleNamespace(device_type="cpu"),
        "parallel_config": ParallelConfig(),
        "speculative_config": None,
        "lora_config": None,
    }
    return SimpleNamespace(**usual | fields)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plain_engine_is_taken(ranks: int) -> None:
    require_compatible(vllm_config(parallel_config=ParallelConfig(tensor_parallel_size=ranks)))


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"speculative_config": SimpleNamespace(method="ngram")}, "with --speculative-config"),
        ({"lora_config": LoRAConfig()}, "with --enable-lora"),
        ({"parallel_config": ParallelConfig(pipeline_parallel_size=2)}, "with --pipeline-parallel-size"),
        ({"parallel_config": ParallelConfig(enable_batch_sharded_sampling=True)}, "with --enable-batch-sharded-sampling"),
        ({"parallel_config": SimpleNamespace(**vars(ParallelConfig()) | {"prefill_context_parallel_size": 2})}, "context-parallel"),
        ({"model_config": SimpleNamespace(enable_prompt_embeds=False)}, "without --enable-prompt-embeds"),
        ({"device_config": SimpleNamespace(device_type="cuda")}, "need all of float32; add --hf-overrides"),
    ],
)
def test_what_cannot_be_mixed_with_soft_decoding_is_named(fields: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=f"vLLM r.*{names}"):
        require_compatible(vllm_config(**fields))


def test_a_runner_that_no_adapter_knows_is_left_as_it_is() -> None:
    decoder = Toy(torch.float32).decoder(slots=1, stop_id=STOP_IDS[0])
    runner = SimpleNamespace()
    with pytest.raises(
        InputError, match=r"types\.SimpleNamespace, expected .* vllm\.v1\.worker\.gpu_model_runner, vllm\.v1\.worker"
    ):
        attach(runner, decoder)
    assert vars(runner) == {}


def test_a_platforms_own_runner_is_taken_by_the_adapter_of_its_base() -> None:
    class PlatformRunner(GPUModelRunner):
        def __init__(self) -> None:
            pass

    runner = PlatformRunner()
    assert attach(runner, Toy(torch.float32).decoder(slots=1, stop_id=STOP_IDS[0])) == "v1"
    assert isinstance(runner, PlatformRunner) and type(runner).__name__ == "SoftPlatformRunner"

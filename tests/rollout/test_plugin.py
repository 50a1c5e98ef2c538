"""The plugin in the real vLLM: prompts are shared, thoughts are not, and a vLLM nobody tested is refused."""

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import vllm
from vllm import SamplingParams
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request
from vllm.v1.worker.worker_base import WorkerWrapperBase

from rollout.plugin import EXTRA_ARG, SHM_BACKEND, private_thoughts, register

NAME = "generate_block_hash_extra_keys"
BLOCK = 4
OPTIONS = {EXTRA_ARG: {"mode": "soft"}}


@pytest.fixture(autouse=True)
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM as it is before any plugin, and again after the test whatever was patched."""
    original = inspect.unwrap(kv_cache_utils.generate_block_hash_extra_keys)
    for module in (kv_cache_utils, block_pool):
        monkeypatch.setattr(module, NAME, original)
    registry = {name: engine for name, engine in WeightTransferEngineFactory._registry.items() if name != SHM_BACKEND}
    monkeypatch.setattr(WeightTransferEngineFactory, "_registry", registry)
    monkeypatch.setattr(KVCacheConfig, "needs_kv_cache_zeroing", False)
    monkeypatch.setattr(EngineArgs, "create_engine_config", inspect.unwrap(EngineArgs.create_engine_config))
    monkeypatch.setattr(WorkerWrapperBase, "compile_or_warm_up_model", None, raising=False)
    init_none_hash(sha256)
    yield


def a_request(request_id: str, prompt: int, decoded: int, options: dict[str, Any] | None, **more: Any) -> Request:
    """A request of the same ids as every other, `decoded` of them after the prompt, and the hashes of its full blocks."""
    params = SamplingParams(max_tokens=100, extra_args=options)
    hasher = get_request_block_hasher(BLOCK, sha256)
    request = Request(request_id, list(range(prompt)), params, None, block_hasher=hasher, **more)
    for token in range(prompt, prompt + decoded):
        request.append_output_token_ids(token)
    return request


def shared(a: Request, b: Request) -> int:
    """How many leading blocks the prefix cache would share."""
    equal = [x == y for x, y in zip(a.block_hashes, b.block_hashes, strict=True)]
    assert equal == sorted(equal, reverse=True)
    return sum(equal)


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 12])
def test_siblings_share_the_blocks_of_their_prompt_and_no_thought(prompt: int) -> None:
    register()
    a, b = (a_request(name, prompt, decoded=13, options=OPTIONS) for name in "ab")
    assert len(a.block_hashes) == (prompt + 13) // BLOCK
    assert shared(a, b) == prompt // BLOCK
    again = a_request("a", prompt, decoded=13, options=OPTIONS)  # as after preemption: its own blocks are found
    assert shared(a, again) == len(a.block_hashes)


@pytest.mark.parametrize("options", [None, {}, {"other": 1}])
def test_ordinary_requests_share_as_without_the_plugin(options: dict[str, Any] | None) -> None:
    before = a_request("a", 7, decoded=13, options=options)
    register()
    after = a_request("b", 7, decoded=13, options=options)
    assert shared(before, after) == len(before.block_hashes) == 5
    assert shared(before, a_request("c", 7, decoded=13, options=OPTIONS)) == 1  # a soft one shares its prompt with them


def test_the_key_is_added_to_vllms_own_and_only_past_the_prompt() -> None:
    keys = private_thoughts(kv_cache_utils.generate_block_hash_extra_keys)
    salted = a_request("a", 8, decoded=8, options=OPTIONS, cache_salt="salt")
    assert keys(salted, 0, 4, 0) == ((("cache_salt", "salt"),), 0)
    assert keys(salted, 4, 8, 0) == (None, 0)
    assert keys(salted, 8, 12, 0) == (((EXTRA_ARG, "a"),), 0)
    assert keys(salted, 0, 9, 0) == ((("cache_salt", "salt"), (EXTRA_ARG, "a")), 0)


def test_blocks_are_zeroed_before_they_are_used_again() -> None:
    """What is done with it is vLLM's, and shown with NaN in a real engine by tests/end_to_end/test_load.py."""
    config = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[])
    assert not config.needs_kv_cache_zeroing
    register()
    assert config.needs_kv_cache_zeroing


def test_registering_again_changes_nothing() -> None:
    register()
    patched = kv_cache_utils.generate_block_hash_extra_keys
    engine = WeightTransferEngineFactory._registry[SHM_BACKEND]
    register()
    assert kv_cache_utils.generate_block_hash_extra_keys is block_pool.generate_block_hash_extra_keys is patched
    assert inspect.unwrap(patched) is patched.__wrapped__  # wrapped once
    assert WeightTransferEngineFactory._registry[SHM_BACKEND] is engine
    assert engine().__name__ == "SharedMemoryWeightTransferEngine"


@pytest.mark.parametrize("version", ["0.31.9", "0.32.1", "0.33.0rc1+cpu", "1.0"])
def test_an_untested_vllm_is_refused_and_left_alone(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError) as refused:
        register()
    assert str(refused.value) == f"vllm {version}: softrl is tested with 0.32.0; install one of those"
    assert SHM_BACKEND not in WeightTransferEngineFactory._registry
    assert not hasattr(kv_cache_utils.generate_block_hash_extra_keys, "__wrapped__")
    assert KVCacheConfig.needs_kv_cache_zeroing is False
    assert not hasattr(EngineArgs.create_engine_config, "__wrapped__") and WorkerWrapperBase.compile_or_warm_up_model is None


def test_a_local_build_of_a_tested_vllm_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.32.0+cpu")
    register()
    assert SHM_BACKEND in WeightTransferEngineFactory._registry

"""The engine actor and the real worker side, with vLLM between them left out: what is refused, and that nothing is left behind."""

import asyncio
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from vllm.config import ParallelConfig, VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker as VllmWorker

from configs.errors import InputError, RunError
from configs.load import load_config
from configs.schema import Config, Mode
from rollout.adapter_v1 import SoftModelRunner
from rollout.checksums import tensor_checksum
from rollout.engine import RolloutEngine
from rollout.models import SMOLLM2, resolve_model
from rollout.plugin import CORE_METHOD, SHM_BACKEND, register
from rollout.soft_decoding import DONE
from rollout.trajectory import SampleRequest
from rollout.weight_transfer import SharedMemoryInitInfo, SharedMemoryWeightTransferEngine
from rollout.wire import request_options
from rollout.worker_extension import SoftWorkerExtension

DEADLINE_S = 20
VOCABULARY = 49152  # SmolLM2's, whose tokenizer is used


def load_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    own = dict(model.named_parameters())
    for name, tensor in weights:
        getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)


SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}


def as_vllms(model: Any, **logits: float) -> nn.Module:
    """A transformers model under the names that vLLM's classes have; `logits` are what vLLM's LogitsProcessor would do."""
    model.embed_input_ids = model.get_input_embeddings()
    model.load_weights = partial(load_weights, model)
    model.logits_processor = SimpleNamespace(**{"scale": 1.0, "soft_cap": None} | logits)
    return model


def llama(**logits: float) -> nn.Module:
    return as_vllms(LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SMALL)), **logits)


def gemma() -> nn.Module:
    """Its embedding has a scale of its own: sqrt(d)."""
    return as_vllms(GemmaForCausalLM(GemmaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=32, **SMALL)))


def biased() -> nn.Module:
    model = llama()
    model.lm_head.bias = nn.Parameter(torch.zeros(VOCABULARY))
    return model


class Runner(GPUModelRunner):
    """What soft decoding is mixed into; its requests are never scheduled."""

    def __init__(self, model: nn.Module) -> None:
        self.get_model = lambda: model
        self.model_config = SimpleNamespace(get_vocab_size=lambda: VOCABULARY, enable_prompt_embeds=True)
        self.vllm_config = SimpleNamespace(
            model_config=self.model_config,
            device_config=SimpleNamespace(device_type="cpu"),
            parallel_config=ParallelConfig(),
            speculative_config=None,
            lora_config=None,
        )

    def _on_request_state_removed(self, req_id: str, req_state: Any) -> None:
        pass

    def reset_lora_state(self) -> None:
        pass


@cache
def vllm_config() -> VllmConfig:
    return VllmConfig()


class Worker(VllmWorker, SoftWorkerExtension):
    """As vLLM adds the extension to its own worker, whose weight updates are real."""

    def __init__(self, model: nn.Module) -> None:
        self.model_runner, self.rank = Runner(model), 0
        self.vllm_config, self._weight_update_active, self._weight_update_is_draft = vllm_config(), False, False
        record_metadata_for_reloading(model)  # as vLLM does when it has built a model
        configs = SimpleNamespace(parallel_config=None, model_config=None)
        transfer = WeightTransferConfig(backend=SHM_BACKEND)
        self.weight_transfer_engine = SharedMemoryWeightTransferEngine(transfer, configs, torch.device("cpu"), model)


class Vllm:
    """One worker behind the calls that RolloutEngine makes. A request is decoded whole when it is added; nobody hears of it."""

    def __init__(self, model: nn.Module) -> None:
        self.worker = Worker(model)
        self.decoded = asyncio.Event()
        process = SimpleNamespace(pid=1, exitcode=None)
        resources = SimpleNamespace(engine_manager=SimpleNamespace(processes=[process]))
        self.engine_core = SimpleNamespace(resources=resources, call_utility_async=self.call_utility_async)
        self.output_handler = asyncio.get_running_loop().create_future()  # never done: the process never dies

    @property
    def runner(self) -> SoftModelRunner:
        return self.worker.model_runner

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(self.worker, method)(*args)]

    async def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> Any:
        requests, decoder = self.runner.softrl, self.runner.softrl.decoder
        slots = torch.tensor([requests.admit(request_id, params, len(prompt["prompt_token_ids"]))])
        while decoder.phase[slots] != DONE:
            decoder.advance(slots, decoder.emitted_length[slots], torch.randn(1, VOCABULARY), torch.zeros(1, 32))
        self.runner._on_request_state_removed(request_id, None)
        self.decoded.set()
        return SimpleNamespace(request_id=request_id, get=asyncio.Event().wait, close=lambda: None)

    async def call_utility_async(self, method: str) -> Any:
        return getattr(EngineCore, method)(None)

    async def update_weight_version(self, version: str) -> None: ...

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self.worker.weight_transfer_engine.init_transfer_engine(SharedMemoryInitInfo(**request.init_info))

    async def start_weight_update(self) -> None:
        self.worker.start_weight_update()

    async def update_weights(self, request: Any) -> None:
        self.worker.update_weights(request.update_info)

    async def finish_weight_update(self, weight_version: str | None) -> None:
        self.worker.finish_weight_update()

    async def abort(self, request_id: str, internal: bool = False) -> None:
        """Too late: the request has left."""

    async def pause_generation(self, **_: Any) -> None: ...

    async def resume_generation(self) -> None: ...

    def shutdown(self) -> None: ...


@pytest.fixture(scope="module", autouse=True)
def plugin() -> None:
    register()  # as vLLM does in each of its processes


@pytest.fixture
def config() -> Config:
    recipe = Path(__file__).parents[2] / "configs" / "demo.yaml"
    return load_config(recipe, ["engine.max_num_seqs=4", "policy.max_cot_tokens=6", "policy.max_answer_tokens=3"])


def start(config: Config, model: nn.Module, monkeypatch: pytest.MonkeyPatch, model_dir: Path | None = None) -> RolloutEngine:
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda *_, **__: Vllm(model))
    return RolloutEngine(config, str(model_dir or resolve_model(SMOLLM2)))


def a_request(**fields: Any) -> SampleRequest:
    usual: dict[str, Any] = {
        "prompt_ids": np.arange(5, dtype=np.int32), "prompt_index": 8, "sample_index": 0, "mode": Mode.soft, "tau": 0.5,
        "sigma": 0.1, "seed": 3, "max_cot_tokens": 6, "max_answer_tokens": 3, "answer_temperature": 1.0,
    }  # fmt: skip
    return SampleRequest(**usual | fields)


def test_a_model_without_the_matrices_that_soft_decoding_needs_is_bad_input(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=1))
    with pytest.raises(InputError) as refused:
        asyncio.run(start(config, model, monkeypatch).start())
    assert str(refused.value) == (
        "model.path: smollm2-135m: GPT2LMHeadModel is not supported: vLLM's class has no input embedding at model.embed_tokens"
    )


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (gemma, r"GemmaForCausalLM is not supported: its inputs are not the rows of its embedding \(it scales or shifts them"),
        (biased, "LlamaForCausalLM is not supported: it has a bias in its LM head, soft decoding needs plain hidden @ head"),
        (partial(llama, scale=0.5), "it has logits scaled by 0.5"),
        (partial(llama, soft_cap=30.0), "it has logits capped at 30.0"),
    ],
)
def test_a_model_that_alters_what_its_matrices_give_is_bad_input(
    config: Config, monkeypatch: pytest.MonkeyPatch, model: Callable[[], nn.Module], says: str
) -> None:
    """A mixture of rows as they are would not be an input like its others, nor hidden @ head^T its logits."""
    with pytest.raises(InputError, match=rf"^model\.path: smollm2-135m: .*{says}"):
        asyncio.run(start(config, model(), monkeypatch).start())


def test_a_tokenizer_whose_bytes_cannot_be_told_is_bad_input(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(resolve_model(SMOLLM2))
    tokenizer.backend_tokenizer.decoder = None  # type: ignore[assignment]
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^model\.path: smollm2-135m: tokenizer decoder None: expected ByteLevel or ByteFallback"):
        asyncio.run(start(config, llama(), monkeypatch, tmp_path).start())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_cot_tokens": 7}, r"prompt 8 asks for max_cot_tokens = 7, .* policy\.max_cot_tokens = 6; raise it"),
        ({"max_answer_tokens": 4}, r"prompt 8 asks for max_answer_tokens = 4, .* policy\.max_answer_tokens = 3; raise it"),
        ({"tau": 0.0}, r"prompt 8, sample 0 asks for tau = 0\.0: expected a finite number of at least 1e-05 in soft mode"),
        ({"prompt_ids": np.zeros(250, dtype=np.int32)}, r"prompt 8 has 250 tokens and needs \d+ .* engine\.max_model_len is 256"),
    ],
)
def test_a_request_beyond_what_the_engine_was_started_for_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], says: str
) -> None:
    async def ask() -> None:
        engine = start(config, llama(), monkeypatch)
        await engine.start()
        assert engine._llm.runner.softrl.decoder.arena.dropped.shape == (2 * 4, 6)
        with pytest.raises(InputError, match=says):
            async for _ in engine.generate([a_request(), a_request(**fields)]):
                pass
        assert not engine._llm.decoded.is_set()

    asyncio.run(ask())


def test_a_record_that_nobody_will_fetch_is_dropped(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes away after vLLM has finished a request and before the engine actor has heard of it."""

    async def leave_early() -> None:
        engine = start(config, llama(), monkeypatch)
        await engine.start()
        drawing = asyncio.create_task(anext(engine.generate([a_request()])))
        await engine._llm.decoded.wait()
        await asyncio.sleep(0.01)
        assert engine._llm.runner.softrl.finished.keys() == {"0"}
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        while any((stats := await engine.stats()).values()):
            await asyncio.sleep(0.01)
        assert {"in_flight", "slots_used", "records_untaken"} <= stats.keys()
        await engine.stop()

    asyncio.run(asyncio.wait_for(leave_early(), DEADLINE_S))


@pytest.mark.parametrize("mode", [Mode.soft, Mode.hard])
def test_an_input_that_waits_during_a_push_is_made_of_the_new_weights(
    config: Config, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """As is every input before it that is replayed, and as the learner will rebuild it."""

    async def push() -> None:
        model = llama()
        engine = start(config, model, monkeypatch)
        await engine.start()
        worker = engine._llm.worker
        requests, decoder = engine._llm.runner.softrl, engine._llm.runner.softrl.decoder
        options = request_options(a_request(mode=mode, record_full=True), "0")
        with torch.inference_mode():  # as vLLM runs its steps; between them, where a push comes, the mode is off
            slot = requests.admit("a", SimpleNamespace(extra_args=options), 5)
            slots, logits = torch.tensor([slot]), torch.zeros(1, VOCABULARY)
            logits[0, decoder.stop_id] = 50.0  # hard: a true token whose id must not be shown is overlaid too
            for _ in range(3):
                decoder.advance(slots, decoder.emitted_length[slots], logits, torch.zeros(1, 32))
        before = decoder.next_input[slot].clone()
        embedding = model.get_input_embeddings().weight
        noise = 0.0 if mode is Mode.hard else before - embedding[decoder.stop_id]
        with torch.no_grad():
            embedding.mul_(3)
        worker.softrl_refresh()
        torch.testing.assert_close(decoder.next_input[slot], embedding[decoder.stop_id] + noise)
        assert not torch.equal(decoder.next_input[slot], before)
        if mode is not Mode.hard:
            recorded = torch.from_numpy(decoder.record(slot).soft_embeddings).view(torch.float32)
            assert torch.equal(recorded[-1], decoder.next_input[slot])  # what is fed, not what would have been
        await engine.stop()

    asyncio.run(asyncio.wait_for(push(), DEADLINE_S))


# --- vLLM goes on without a plugin


def test_an_engine_that_could_not_load_the_plugin_is_not_started(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "lora")
    monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda *_, **__: pytest.fail("it started"))
    with pytest.raises(InputError, match=r"^VLLM_PLUGINS=lora keeps vLLM from loading softrl's plugin; unset it or add softrl$"):
        asyncio.run(RolloutEngine(config, str(resolve_model(SMOLLM2))).start())


def test_an_engine_process_that_did_not_run_the_plugin_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(EngineCore, CORE_METHOD)
    with pytest.raises(RunError, match=r"^engine-0: vLLM's engine process runs without softrl's plugin; unset VLLM_PLUGINS"):
        asyncio.run(start(config, llama(), monkeypatch).start())


def test_a_worker_that_did_not_run_the_plugin_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.worker_extension.plugin_ran", lambda: False)
    with pytest.raises(RunError, match=r"^engine-0: vLLM's workers run without softrl's plugin; unset VLLM_PLUGINS"):
        asyncio.run(start(config, llama(), monkeypatch).start())


# --- pushes that some engine refuses


def same_weights(model: nn.Module, tensors: dict[str, Tensor]) -> bool:
    return all(torch.equal(weight, tensors[name]) for name, weight in model.named_parameters())


def test_an_abandoned_push_leaves_every_engine_whole_and_ready_for_the_next(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One engine has loaded it when another refuses: it says what it holds. A third has only begun."""

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)  # of a worker without an accelerator

    async def push() -> None:
        sent, models = {name: weight.detach().clone() for name, weight in llama().named_parameters()}, [llama() for _ in range(3)]
        old = [{name: weight.detach().clone() for name, weight in model.named_parameters()} for model in models]
        engines = [start(config, model, monkeypatch) for model in models]
        for engine, model in zip(engines, models, strict=True):
            monkeypatch.setattr(AsyncLLM, "from_engine_args", lambda *_, model=model, **__: Vllm(model))
            await engine.start()
            shapes = [list(tensor.shape) for tensor in sent.values()]
            await engine.init_weight_transfer_engine(
                {"names": list(sent), "dtype_names": ["float32"] * len(sent), "shapes": shapes}
            )
        save_file(sent, tmp_path / "weights")
        update = {"path": str(tmp_path / "weights"), "checksums": {name: tensor_checksum(tensor) for name, tensor in sent.items()}}
        for engine in engines:
            await engine.start_weight_update()
        await engines[0].update_weights(update)
        with pytest.raises(ValueError, match="weight push refused"):
            await engines[1].update_weights(update | {"checksums": {}})
        for engine in engines:
            await engine.abandon_weight_update("1")
        assert [engine.weight_version for engine in engines] == [1, 0, 0]
        assert same_weights(models[0], sent)
        assert all(same_weights(model, weights) for model, weights in zip(models[1:], old[1:], strict=True))
        for engine in engines:
            await engine.start_weight_update()
            await engine.update_weights(update)
            await engine.finish_weight_update("2")
        assert all(same_weights(model, sent) for model in models)
        assert [engine.weight_version for engine in engines] == [2, 2, 2]

    asyncio.run(asyncio.wait_for(push(), 3 * DEADLINE_S))


def test_an_update_that_is_abandoned_before_it_could_begin_does_not_begin_later(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def push() -> None:
        engine = start(config, llama(), monkeypatch)
        await engine.start()
        engine._none_in_flight.clear()  # as long as a request is decoded
        starting = asyncio.create_task(engine.start_weight_update())
        await asyncio.sleep(0)
        abandoning = asyncio.create_task(engine.abandon_weight_update("1"))
        await asyncio.sleep(0)
        engine._none_in_flight.set()
        await asyncio.gather(starting, abandoning)
        assert not engine._llm.worker._weight_update_active and engine._no_update.is_set()
        assert engine.weight_version == 0

    asyncio.run(asyncio.wait_for(push(), DEADLINE_S))

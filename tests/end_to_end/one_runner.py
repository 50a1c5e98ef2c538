"""What each process does in test_adapter_v2.py: decode the same requests with one of vLLM's two model runners.

    python -m tests.end_to_end.one_runner v1|v2|v2_kernels <model folder> <output folder>

V2's kernels are Triton's. Here its interpreter runs them, as what vLLM takes for a CPU backend of Triton. v2_kernels also decodes
as on a GPU: with softrl's own kernels and buffers of fixed size.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from configs.schema import Mode
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, STOP_PHRASE
from rollout.trajectory import SampleRequest
from rollout.wire import AttachSpec, request_options

BLOCK = 32  # tokens of a KV block, the fewest on a CPU
MODES = [(Mode.soft, 0.5), (Mode.hard, 1.0), (Mode.fuzzy, 1e-4), (Mode.soft, 0.5), (Mode.hard, 0.0), (Mode.soft, 1.0)]
MOST_COT, MOST_ANSWER = 12, 3
AT_ONCE = 3  # requests that fit into the KV cache with all they generate


def requests() -> list[SampleRequest]:
    """Prompts that end in the first block, thoughts that go on in the second."""
    random = np.random.default_rng(0)
    return [
        SampleRequest(
            prompt_ids=random.integers(100, 49000, BLOCK - 10 + 2 * (i % 4), dtype=np.int32),
            prompt_index=i,
            sample_index=0,
            mode=mode,
            tau=tau,
            sigma=0.0 if mode is Mode.hard else 0.0165,
            seed=1000 + i,
            max_cot_tokens=MOST_COT - i % 2,
            max_answer_tokens=MOST_ANSWER,
            answer_temperature=float(i % 2),
            record_full=i == 3,
        )
        for i, (mode, tau) in enumerate(MODES)
    ]


class Engine:
    """vLLM in this very process, whose steps can be taken one at a time."""

    def __init__(self, model_dir: str) -> None:
        from transformers import AutoTokenizer
        from vllm import LLM

        self.llm = LLM(
            model=model_dir,
            dtype="float32",
            enforce_eager=True,
            max_model_len=2 * BLOCK,
            max_num_seqs=len(MODES) + 1,
            max_num_batched_tokens=BLOCK,  # so that prompts, and what is prefilled after preemption, come in chunks
            block_size=BLOCK,
            num_gpu_blocks_override=2 * AT_ONCE + 1,  # one is vLLM's own
            kv_cache_memory_bytes=2**26,  # given, vLLM skips a warm-up on what happens to be in memory
            enable_prompt_embeds=True,
            worker_extension_cls="rollout.worker_extension.SoftWorkerExtension",
            generation_config="vllm",
            use_tqdm_on_load=False,
        )
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        prefills = tuple(tokenizer.encode(text, add_special_tokens=False) for text in (PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT))
        self.spec = AttachSpec(
            tokenizer=model_dir,
            stop_phrase=STOP_PHRASE,
            prefills=(prefills[0], prefills[1]),
            eos_ids=[tokenizer.eos_token_id],
            stop_id=tokenizer.eos_token_id,
            max_num_seqs=len(MODES) + 1,
            max_cot_tokens=MOST_COT,
            max_answer_tokens=MOST_ANSWER,
        )
        self.report = json.loads(self.llm.collective_rpc("softrl_attach", args=(self.spec.to_json(),))[0])
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.decoder = core.model_executor.driver_worker.worker.model_runner.softrl.decoder
        self.seen = {"preempted": 0, "repeated": 0, "replayed": 0}
        self._count(self.scheduler, "_preempt_request", "preempted", lambda *_, **__: 1)
        self._count(self.decoder, "replay", "replayed", lambda slot, first, last: last - first)
        self._count(
            self.decoder, "advance", "repeated", lambda slots, index, *_: int((index < self.decoder.emitted_length[slots]).sum())
        )

    def _count(self, target: Any, method: str, name: str, amount: Any) -> None:
        original = getattr(target, method)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen[name] += amount(*args, **kwargs)
            return original(*args, **kwargs)

        setattr(target, method, counted)

    def decode(self, case: str, drawn: list[SampleRequest], reset_at: Sequence[int]) -> bytes:
        """The records of requests that are given at once. When the scheduler knows so many outputs, caches are reset under them."""
        for request in drawn:
            record_id = str(request.prompt_index)
            most = request.max_cot_tokens + max(map(len, self.spec.prefills)) + request.max_answer_tokens
            options = request_options(request, record_id)
            self._add(f"{case}-{record_id}", request, max_tokens=most, stop_token_ids=[self.spec.stop_id], extra_args=options)
        resets = list(reset_at)
        while self.llm.llm_engine.has_unfinished_requests():
            known = max(request.num_output_tokens for request in self.scheduler.requests.values())
            if known in resets:
                resets.remove(known)
                self.llm.reset_prefix_cache(reset_running_requests=True)
            self.llm.llm_engine.step()
        return self.llm.collective_rpc("softrl_take", args=([str(request.prompt_index) for request in drawn],))[0]

    def plain_beside(self, request: SampleRequest) -> list[int]:
        """What vLLM's own sampler says, greedily, to the prompt of a softrl request that is decoded beside it."""
        self._add("plain", request, max_tokens=8)
        self._add("beside", request, max_tokens=10, extra_args=request_options(request, "beside"))
        outputs = {}
        while self.llm.llm_engine.has_unfinished_requests():
            outputs |= {output.request_id: output for output in self.llm.llm_engine.step() if output.finished}
        return list(outputs["plain"].outputs[0].token_ids)

    def _add(self, request_id: str, request: SampleRequest, **params: Any) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **params)
        self.llm.llm_engine.add_request(request_id, TokensPrompt(prompt_token_ids=request.prompt_ids.tolist()), sampling)


def cases() -> dict[str, list[tuple[list[SampleRequest], list[int]]]]:
    """Batches of requests, and the numbers of known outputs at which caches are reset."""
    drawn = requests()
    halves = drawn[:AT_ONCE], drawn[AT_ONCE:]
    return {
        "calm": [(half, []) for half in halves],
        "crowded": [(drawn, [])],
        "reset": [(half, [4, 5, 11, 17]) for half in halves],
        # Prefilled again in a chunk of BLOCK tokens and one of a single token, which looks like a step of decoding. When an output
        # under way was discarded, it is not the newest that was decoded.
        "tail": [([request], [BLOCK + 1 - len(request.prompt_ids)]) for request in drawn if request.mode is Mode.soft],
    }


def cases_of_kernels() -> dict[str, list[tuple[list[SampleRequest], list[int]]]]:
    """One of each mode, undisturbed and reset. In the interpreter a step takes a second."""
    drawn = [replace(request, record_full=request.mode is not Mode.hard) for request in requests()[:AT_ONCE]]
    return {"calm": [(drawn, [])], "reset": [(drawn, [4, 5, 11])]}


def main(runner: str, model_dir: str, out: Path) -> None:
    engine, seen = Engine(model_dir), {}
    if runner == "v2_kernels":
        decode_as_on_a_gpu(engine.decoder)
    for case, batches in (cases_of_kernels() if runner == "v2_kernels" else cases()).items():
        engine.seen |= dict.fromkeys(engine.seen, 0)
        for i, (batch, reset_at) in enumerate(batches):
            (out / f"{case}{i}.safetensors").write_bytes(engine.decode(case, batch, reset_at))
        seen[case] = dict(engine.seen)
    plain = engine.plain_beside(requests()[0])
    (out / "seen.json").write_text(json.dumps({"report": engine.report, "seen": seen, "plain": plain}))


def as_on_a_gpu() -> None:
    """V2 and asynchronous scheduling, which vLLM switches off on a CPU, with Triton's interpreter. Call before importing vllm."""
    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=SimpleNamespace(is_active=lambda: True))

    from vllm.platforms import current_platform

    check = current_platform.check_and_update_config

    def check_asynchronous(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    current_platform.check_and_update_config = check_asynchronous


def decode_as_on_a_gpu(decoder: Any) -> None:
    """Gives a decoder on the CPU the operations that it has on CUDA, and the kernel that replays."""
    from rollout import vocab_rows
    from rollout.row_ops import FixedOps
    from tests.rollout.test_triton_soft_decoding import rebuild_as_on_a_gpu

    decoder.ops = FixedOps(decoder.arena, decoder.embedding, len(decoder.phase), decoder.vocab_size)
    vocab_rows.rebuild = rebuild_as_on_a_gpu


if __name__ == "__main__":
    runner, model_dir, folder = sys.argv[1:]
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    if runner != "v1":
        as_on_a_gpu()
    main(runner, model_dir, Path(folder))

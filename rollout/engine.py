"""RolloutEngine: a Ray actor around vLLM's AsyncLLM that turns SampleRequests into Trajectories.

    requests --> AsyncLLM.generate (one vLLM request each) --> worker records --> Trajectory, yielded as each one finishes
    weights  --> pause, vLLM's weight-transfer calls, caches reset, version raised, resume

vLLM sees ordinary requests that carry softrl's options in `extra_args`; the worker extension does the soft decoding and keeps
the records, which are fetched in batches as requests finish.
"""

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import InputError, RunError
from configs.schema import Config, PushBackend
from rollout.plugin import SHM_BACKEND
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT, STOP_PHRASE
from rollout.record import SlotRecord
from rollout.soft_decoding import BAD_LOGITS, CLOSED, EOS, LENGTH
from rollout.trajectory import STOP_ANSWER_CLOSED, STOP_ANSWER_EOS, STOP_ANSWER_LENGTH, SampleRequest, Trajectory
from rollout.wire import AttachSpec, request_options, unpack_records

STOP_REASONS = {CLOSED: STOP_ANSWER_CLOSED, EOS: STOP_ANSWER_EOS, LENGTH: STOP_ANSWER_LENGTH}


class RolloutEngine:
    """One vLLM engine. Construct it in a Ray actor (or a script with a __main__ guard), then await `start`."""

    def __init__(self, config: Config, model_dir: str, name: str = "engine-0") -> None:
        self.config, self.model_dir, self.name = config, model_dir, name
        self.weight_version = 0
        self._record_ids = itertools.count()
        self._finished: asyncio.Queue[tuple[str, asyncio.Future[SlotRecord]]] = asyncio.Queue()
        self._in_flight = 0
        self._last_finished = 0.0
        self._submitting = asyncio.Lock()
        self._llm: Any = None
        self._collector: asyncio.Task[None] | None = None
        self._preemptions = 0

    async def start(self) -> dict[str, Any]:
        """Start vLLM and soft decoding in its workers; returns the first worker's report.

        Raises InputError for a model or tokenizer that soft decoding does not know, RunError when the workers differ.
        """
        from transformers import AutoTokenizer
        from vllm.v1.engine.async_llm import AsyncLLM

        self._llm = AsyncLLM.from_engine_args(self._engine_args(), stat_loggers=[_preemption_counter(self)])
        tokenizer = AutoTokenizer.from_pretrained(self.model_dir)
        eos = _eos_ids(self.model_dir, tokenizer)
        prefills = tuple(tokenizer.encode(text, add_special_tokens=False) for text in (PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT))
        self._prefills = [np.array(p, dtype=np.int32) for p in prefills]
        self._stop_id = eos[0]
        spec = AttachSpec(
            tokenizer=self.model_dir,
            stop_phrase=STOP_PHRASE,
            prefills=(prefills[0], prefills[1]),
            eos_ids=eos,
            stop_id=self._stop_id,
            max_num_seqs=self.config.engine.max_num_seqs,
            max_cot_tokens=self.config.policy.max_cot_tokens,
            max_answer_tokens=self.config.policy.max_answer_tokens,
        )
        reports = await self._llm.collective_rpc("softrl_attach", args=(spec.to_json(),))
        if not reports or len(set(reports)) > 1:
            raise RunError(f"{self.name}: workers report {reports}, expected the same soft-decoding adapter from each")
        report = json.loads(reports[0])
        if "error" in report:
            raise InputError(f"model.path: {self.config.model.path}: {report['error']}")
        self._collector = asyncio.create_task(self._collect())
        return {"engine": self.name, **report}

    # ------------------------------------------------------------------ rollouts

    async def generate(self, requests: list[SampleRequest]) -> AsyncIterator[Trajectory]:
        """Trajectories of the requests, each yielded as soon as it finishes; aborts the rest if the caller goes away.

        An idle engine is held until all requests are queued and starts with empty caches, so what it computes is a function of
        the requests alone and not of the moment at which each arrived. Raises InputError for a request that does not fit.
        """
        for request in requests:
            self._require_fits(request)
        tasks: list[asyncio.Task[Trajectory]] = []
        try:
            async with self._submitting:
                idle = self._in_flight == 0
                if idle:
                    await self._llm.pause_generation(mode="keep", clear_cache=True)
                try:
                    for request in requests:
                        tasks.append(asyncio.create_task(self._finish(request, *await self._submit(request))))
                finally:
                    if idle:
                        await self._llm.resume_generation()
            for finished in asyncio.as_completed(tasks):
                yield await finished
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # each aborts its own request

    async def _submit(self, request: SampleRequest) -> tuple[str, Any, int]:
        """Queue one request; returns its record id, vLLM's collector of its outputs, and the weight version that begins it."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        record_id = str(next(self._record_ids))
        params = SamplingParams(
            max_tokens=self._most_generated(request),
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=[self._stop_id],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_options(request, record_id),
        )
        prompt = TokensPrompt(prompt_token_ids=request.prompt_ids.tolist())
        collector = await self._llm.add_request(f"softrl-{record_id}", prompt, params)
        self._in_flight += 1
        return record_id, collector, self.weight_version

    async def _finish(self, request: SampleRequest, record_id: str, collector: Any, first_version: int) -> Trajectory:
        """Wait for vLLM to finish a request and fetch its record."""
        label = f"{self.name}: prompt {request.prompt_index}, sample {request.sample_index}"
        finished = False
        try:
            output = await self._output(collector, label)
            finished = True
            if output.outputs[0].finish_reason != "stop":
                raise RunError(f"{label}: vLLM ended it with {output.outputs[0].finish_reason!r}, expected 'stop'")
            record = await self._record(record_id)
        finally:
            self._in_flight -= 1
            if not finished:
                await self._llm.abort(collector.request_id, internal=True)
                self._record(record_id).cancel()  # vLLM may have finished it already: the worker then holds a record
            collector.close()
        if record.stop_code == BAD_LOGITS:
            raise RunError(
                f"{label}: the model's logits are not finite at CoT step {len(record.shadow_ids)}, answer token "
                f"{len(record.answer_ids)}, weight version {self.weight_version}; lower learner.lr"
            )
        return self._trajectory(request, record, first_version)

    async def _output(self, collector: Any, label: str) -> Any:
        """What vLLM says when the request is finished. Raises RunError when no request at all finishes for a whole deadline."""
        deadline_s = self.config.engine.request_timeout_s
        while True:
            try:
                async with asyncio.timeout(deadline_s):
                    output = await collector.get()
                self._last_finished = time.monotonic()
                return output
            except TimeoutError:
                if time.monotonic() - self._last_finished > deadline_s:
                    raise RunError(f"{label}: nothing finished within engine.request_timeout_s = {deadline_s:g}") from None

    def _most_generated(self, request: SampleRequest) -> int:
        return request.max_cot_tokens + max(map(len, self._prefills)) + request.max_answer_tokens

    def _require_fits(self, request: SampleRequest) -> None:
        for key in ("max_cot_tokens", "max_answer_tokens"):
            asked, most = getattr(request, key), getattr(self.config.policy, key)
            if asked > most:
                raise InputError(
                    f"{self.name}: prompt {request.prompt_index} asks for {key} = {asked}, the engine was started for "
                    f"policy.{key} = {most}; raise it, or ask for fewer"
                )
        needed, room = len(request.prompt_ids) + self._most_generated(request), self.config.engine.max_model_len
        if needed > room:
            raise InputError(
                f"{self.name}: prompt {request.prompt_index} has {len(request.prompt_ids)} tokens and needs {needed} with CoT and "
                f"answer, engine.max_model_len is {room}; raise it, or shorten the prompt"
            )

    def _record(self, record_id: str) -> asyncio.Future[SlotRecord]:
        """The worker's record of a request, once `_collect` has fetched it; cancelled, the record is fetched and dropped."""
        future: asyncio.Future[SlotRecord] = asyncio.get_running_loop().create_future()
        self._finished.put_nowait((record_id, future))
        return future

    async def _collect(self) -> None:
        """Fetch finished records in batches: whatever has queued up while the last fetch ran goes into the next."""
        while True:
            batch = [await self._finished.get()]
            while not self._finished.empty():
                batch.append(self._finished.get_nowait())
            try:
                blobs = await self._llm.collective_rpc("softrl_take", args=([record_id for record_id, _ in batch],))
                records: dict[str, Any] = unpack_records(blobs[0])
                error: Exception | None = None
            except Exception as failure:  # the waiting requests must hear of it, whatever it was
                records, error = {}, failure
            for record_id, future in batch:
                if future.done():
                    continue
                if record_id in records:
                    future.set_result(records[record_id])
                else:
                    future.set_exception(error or RunError(f"{self.name}: the worker has no finished record {record_id}"))

    def _trajectory(self, request: SampleRequest, record: SlotRecord, first_version: int) -> Trajectory:
        return Trajectory(
            prompt_ids=request.prompt_ids,
            prompt_index=request.prompt_index,
            sample_index=request.sample_index,
            mode=request.mode,
            tau=request.tau,
            sigma=request.sigma,
            noise_seed=request.seed,
            shadow_ids=record.shadow_ids,
            support_ids=record.support.ids,
            support_probs=record.support.probs,
            support_offsets=record.support.offsets,
            dropped_mass=record.dropped_mass,
            soft_embeddings=record.soft_embeddings,
            prefill_ids=self._prefills[record.prefill_kind],
            answer_ids=record.answer_ids,
            answer_logprobs=record.answer_logprobs,
            stop_reason=STOP_REASONS[record.stop_code],
            phrase_found=record.prefill_kind == 0,
            weight_version_first=first_version,
            weight_version_last=self.weight_version,
        )

    # ------------------------------------------------------------------ weights

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the transfer; `init_info` are the fields of the backend's own init info (learner/push.py)."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Let requests in flight finish, clear every cache made with the old weights, and open an update."""
        await self._llm.pause_generation(mode="wait", clear_cache=True)
        await self._llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load tensors of the open update; `update_info` are the fields of the backend's own update info."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update and resume; the version rises only now."""
        await self._llm.finish_weight_update(weight_version)
        await self._llm.collective_rpc("softrl_refresh")
        if weight_version is not None:
            self.weight_version = int(weight_version)
        await self._llm.resume_generation()

    async def abandon_weight_update(self) -> None:
        """Resume with the old weights after an update that was refused."""
        await self._llm.resume_generation()

    async def token_logprobs(self, sequences: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Log-probs [T-1] of tokens 1 .. T-1 of each sequence, by an ordinary vLLM prefill that bypasses the prefix cache."""
        return list(await asyncio.gather(*(self._score(ids) for ids in sequences)))

    async def _score(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1, detokenize=False)
        request_id = f"score-{next(self._record_ids)}"
        async for output in self._llm.generate(TokensPrompt(prompt_token_ids=ids.tolist()), params, request_id):
            rows = output.prompt_logprobs
        return np.array([row[int(token)].logprob for token, row in zip(ids[1:], rows[1:], strict=True)], dtype=np.float32)

    # ------------------------------------------------------------------ life

    async def stats(self) -> dict[str, int]:
        """Counters since the start, and what is held now: a leak shows as a number that does not return to 0."""
        reports = await self._llm.collective_rpc("softrl_stats")
        return {"preemptions": self._preemptions, "in_flight": self._in_flight, **json.loads(reports[0])}

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._collector is not None:
            self._collector.cancel()
        if self._llm is not None:
            self._llm.shutdown()

    def _engine_args(self) -> Any:
        import torch
        from vllm import AsyncEngineArgs
        from vllm.config import WeightTransferConfig

        engine = self.config.engine
        on_gpu = torch.cuda.is_available()
        backend = self.config.push.backend.resolved(on_gpu)
        kv_cache_gib = engine.kv_cache_gib if engine.kv_cache_gib is not None or on_gpu else 2.0
        return AsyncEngineArgs(
            model=self.model_dir,
            dtype=str(engine.dtype),
            tensor_parallel_size=engine.tensor_parallel,
            max_num_seqs=engine.max_num_seqs,
            max_model_len=engine.max_model_len,
            enforce_eager=engine.enforce_eager or not on_gpu,
            kv_cache_memory_bytes=None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
            enable_prompt_embeds=True,  # gives `inputs_embeds`, the rows that soft decoding writes over
            enable_prefix_caching=True,
            block_size=None if on_gpu else 32,  # vLLM's 128 on a CPU is longer than many prompts, and only whole blocks are shared
            worker_extension_cls="rollout.worker_extension.SoftWorkerExtension",
            weight_transfer_config=WeightTransferConfig(backend=SHM_BACKEND if backend is PushBackend.shm else str(backend)),
            generation_config="vllm",  # a checkpoint's own sampling defaults must not leak in
            seed=self.config.run.seed % 2**32,  # numpy takes no more
            use_tqdm_on_load=False,
        )


def engine_environment(cores: list[int] | None) -> dict[str, str]:
    """Environment of an engine process. `cores` are the CPU cores for its arithmetic; None where a GPU does it.

    vLLM on a CPU reserves a core for its front end unless told which cores to bind, which halves the compute of a small machine.
    """
    common = {"VLLM_NO_USAGE_STATS": "1"}
    if cores is None:
        # Soft decoding hooks the V1 model runner; vLLM's default on GPUs is V2.
        return common | {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    bind = ",".join(map(str, cores))
    return common | {"VLLM_CPU_OMP_THREADS_BIND": bind, "OMP_NUM_THREADS": str(len(cores)), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def _preemption_counter(engine: RolloutEngine) -> Any:
    """A vLLM stat logger that counts preempted requests on the engine object."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    class PreemptionCounter(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0) -> None:
            if iteration_stats is not None:
                engine._preemptions += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return PreemptionCounter


def _eos_ids(model_dir: str, tokenizer: Any) -> list[int]:
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

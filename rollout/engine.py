"""RolloutEngine: a Ray actor around vLLM's AsyncLLM that turns SampleRequests into Trajectories.

    requests --> AsyncLLM.add_request (one vLLM request each) --> worker records --> Trajectory, yielded as each one finishes
    weights  --> pause, vLLM's weight-transfer calls, version raised, resume

    push.in_flight   requests that are being decoded       their KV after the push     prompts in the prefix cache
    wait             finish before the push                -                           forgotten
    keep             stand still and go on                 stays: of the old weights   stay, for requests of before the push alone
    recompute        stand still and go on                 made anew, as after         forgotten
                                                           preemption

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
from configs.schema import Config, InFlight
from rollout.engine_args import engine_args
from rollout.engine_process import EngineCounters, EngineProcess, last_words
from rollout.plugin import PLUGIN_ADVICE, require_plugin_allowed
from rollout.record import SlotRecord
from rollout.soft_decoding import BAD_LOGITS, CLOSED, EOS, LENGTH
from rollout.trajectory import STOP_ANSWER_CLOSED, STOP_ANSWER_EOS, STOP_ANSWER_LENGTH, SampleRequest, Trajectory, impossible
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
        self._none_in_flight, self._no_update = asyncio.Event(), asyncio.Event()  # no weight update is open
        self._none_in_flight.set()
        self._no_update.set()
        self._updates = 0  # weight updates begun; see _submit
        self._last_finished = 0.0
        self._submitting, self._updating = asyncio.Lock(), asyncio.Lock()
        self._loaded = False  # the open weight update has loaded its weights
        self._llm: Any = None
        self._collector: asyncio.Task[None] | None = None
        self._counters = EngineCounters()
        self._report: dict[str, Any] | None = None  # of the start

    async def start(self) -> dict[str, Any]:
        """Start vLLM and soft decoding in its workers, unless they run already, for the run before; returns the first worker's
        report of that start, with the `pid` of vLLM's engine process.

        Raises InputError for a model or tokenizer that soft decoding does not know, RunError when the workers differ or vLLM fails.
        """
        if self._report is None:
            self._report = await self._start()
        return self._report

    async def _start(self) -> dict[str, Any]:
        from vllm.v1.engine.async_llm import AsyncLLM

        require_plugin_allowed()
        args = engine_args(self.config, self.model_dir)
        try:
            self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._counters.logger_factory()])
        except RuntimeError as error:  # what vLLM raises when its engine process does not come up
            raise RunError(f"{self.name}: vLLM did not start: {str(error).splitlines()[0]}{last_words()}") from error
        self._process = EngineProcess(self._llm, self.name)
        plugin = await self._process.plugin()
        self._spec = AttachSpec.of_model(
            self.model_dir,
            max_num_seqs=self.config.engine.max_num_seqs,
            max_cot_tokens=max(self.config.policy.max_cot_tokens, self.config.eval_cot_tokens),
            max_answer_tokens=self.config.policy.max_answer_tokens,
        )
        reports = await self._rpc("softrl_attach", self._spec.to_json())
        if not reports or len(set(reports)) > 1:
            raise RunError(f"{self.name}: workers report {reports}, expected the same soft-decoding adapter from each")
        report = json.loads(reports[0])
        if "error" in report:
            raise InputError(f"model.path: {self.config.model.path}: {report['error']}")
        if not report["plugin"]:
            raise RunError(f"{self.name}: vLLM's workers run without softrl's plugin; {PLUGIN_ADVICE}")
        await self._process.answer(self._llm.update_weight_version(str(self.weight_version)))
        self._collector = asyncio.create_task(self._collect())
        return {"engine": self.name, "pid": self._process.pid, **report, "plugin": plugin}

    # ------------------------------------------------------------------ rollouts

    async def generate(self, requests: list[SampleRequest]) -> AsyncIterator[Trajectory]:
        """Trajectories of the requests, each yielded as soon as it finishes; aborts the rest if the caller goes away.

        An idle engine is held until all requests are queued and starts with empty caches, so what it computes is a function of
        the requests alone and not of the moment at which each arrived.

        Raises InputError for a request that does not fit, before any is drawn. A request that fails ends alone: its RunError, the
        first if there are several, is raised after the trajectories of all others.
        """
        for request in requests:
            self._require_fits(request)
        tasks: list[asyncio.Task[Trajectory]] = []
        failures: list[RunError] = []
        try:
            async with self._submitting:
                await self._process.answer(self._update_over())
                idle = self._in_flight == 0
                try:
                    if idle:
                        await self._process.answer(self._llm.pause_generation(mode="keep", clear_cache=True))
                    for request in requests:
                        tasks.append(asyncio.create_task(self._finish(request, *await self._submit(request))))
                finally:
                    if idle:
                        await self._process.answer(self._llm.resume_generation())
            for finished in asyncio.as_completed(tasks):
                try:
                    trajectory = await finished
                except RunError as error:
                    failures.append(error)
                else:
                    yield trajectory
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # each aborts its own request
        if len(failures) > 1:
            raise RunError(f"{len(failures)} of {len(requests)} requests failed, the first: {failures[0]}")
        if failures:
            raise failures[0]

    async def _submit(self, request: SampleRequest) -> tuple[str, Any]:
        """Queue one request; returns its record id and vLLM's collector of its outputs.

        Its cache salt keeps what the prefix cache holds of its prompt to requests begun with the same weights: a push that keeps
        the KV of requests in flight keeps their prompts too.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        record_id = str(next(self._record_ids))
        params = SamplingParams(
            max_tokens=self._most_generated(request),
            temperature=0.0,
            ignore_eos=True,
            stop_token_ids=[self._spec.stop_id],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=request_options(request, record_id),
        )
        prompt = TokensPrompt(prompt_token_ids=request.prompt_ids.tolist(), cache_salt=str(self._updates))
        request_id = f"softrl-{record_id}"
        try:
            collector = await self._process.answer(self._llm.add_request(request_id, prompt, params))
        except BaseException:  # the caller may go away when vLLM has the request already
            await self._llm.abort(request_id)
            self._record(record_id).cancel()
            raise
        self._in_flight += 1
        self._none_in_flight.clear()
        return record_id, collector

    async def _finish(self, request: SampleRequest, record_id: str, collector: Any) -> Trajectory:
        """Wait for vLLM to finish a request and fetch its record."""
        label = f"{self.name}: prompt {request.prompt_index}, sample {request.sample_index}"
        finished = False
        try:
            output = (await self._process.answer(self._output(collector, label))).outputs[0]
            finished = True
            if output.finish_reason != "stop":
                raise RunError(f"{label}: vLLM ended it with {output.finish_reason!r}, expected 'stop'")
            record = await self._record(record_id)
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._none_in_flight.set()
            if not finished:
                await self._llm.abort(collector.request_id, internal=True)
                self._record(record_id).cancel()  # vLLM may have finished it already: the worker then holds a record
            collector.close()
        if record.stop_code == BAD_LOGITS:
            raise RunError(
                f"{label}: the model's logits are not finite at CoT step {len(record.shadow_ids)}, answer token "
                f"{len(record.answer_ids)}, weight version {output.weight_versions[-1].version}; lower learner.lr"
            )
        return self._trajectory(request, record, output.weight_versions)

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
        return self._spec.most_generated(request.max_cot_tokens, request.max_answer_tokens)

    def _require_fits(self, request: SampleRequest) -> None:
        policy = self.config.policy
        if found := impossible(request):  # a kernel would refuse it inside the model runner, and take everyone's requests along
            name, value, expected = found
            place = f"prompt {request.prompt_index}, sample {request.sample_index}"
            raise InputError(f"{self.name}: {place} asks for {name} = {value}: expected {expected}")
        longest_cot = max(policy.max_cot_tokens, self.config.eval_cot_tokens)
        for key, most in ("max_cot_tokens", longest_cot), ("max_answer_tokens", policy.max_answer_tokens):
            if (asked := getattr(request, key)) > most:
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
                blobs = await self._rpc("softrl_take", [record_id for record_id, _ in batch])
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

    def _trajectory(self, request: SampleRequest, record: SlotRecord, spans: list[Any]) -> Trajectory:
        """`spans` are vLLM's WeightVersionSpan; vLLM generates one token for every position that the record counts."""
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
            prefill_ids=np.array(self._spec.prefills[record.prefill_kind], dtype=np.int32),
            answer_ids=record.answer_ids,
            answer_logprobs=record.answer_logprobs,
            stop_reason=STOP_REASONS[record.stop_code],
            phrase_found=record.prefill_kind == 0,
            weight_versions=np.array([int(span.version) for span in spans], dtype=np.int64),
            weight_version_starts=np.array([span.start for span in spans], dtype=np.int64),
        )

    # ------------------------------------------------------------------ weights

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the transfer; `init_info` are the fields of the backend's own init info (learner/push.py)."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await self._process.answer(self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info)))

    async def start_weight_update(self) -> None:
        """Stand still as `push.in_flight` says and open an update; requests that come now wait until it is over."""
        in_flight = self.config.push.in_flight
        async with self._updating:
            async with self._submitting:
                self._no_update.clear()
                self._updates += 1
            if in_flight is InFlight.wait:
                # vLLM's own "wait" would not wait for requests that are preempted just now, or still queued.
                await self._process.answer(self._none_in_flight.wait())
            # "keep" is vLLM's word for requests that stand still; clear_cache=True has it preempt them all, so they lose their KV.
            mode = "wait" if in_flight is InFlight.wait else "keep"
            await self._process.answer(self._llm.pause_generation(mode=mode, clear_cache=in_flight is not InFlight.keep))
            await self._process.answer(self._llm.start_weight_update())

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load tensors of the open update; `update_info` are the fields of the backend's own update info."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        async with self._updating:
            await self._process.answer(self._llm.update_weights(WeightTransferUpdateRequest(update_info=update_info)))
            self._loaded = True

    async def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update and resume; the version rises only now."""
        async with self._updating:
            await self._process.answer(self._llm.finish_weight_update(weight_version))
            await self._resume(weight_version)

    async def abandon_weight_update(self, weight_version: str | None = None) -> None:
        """Close an update that this or another engine refused, however far it got here, and resume.

        An engine that has loaded the weights keeps them, under their version; any other goes on with its old ones.
        """
        async with self._updating:  # a start that still waits for requests in flight must not open an update after this
            try:
                await self._rpc("softrl_abandon_update")
                if self._loaded and weight_version is not None:
                    await self._process.answer(self._llm.update_weight_version(weight_version))
                await self._resume(weight_version if self._loaded else None)
            finally:
                self._no_update.set()  # of a dead engine its requests shall hear at once

    async def _resume(self, weight_version: str | None) -> None:
        await self._rpc("softrl_refresh")
        if weight_version is not None:
            self.weight_version = int(weight_version)
        self._loaded = False
        await self._process.answer(self._llm.resume_generation())
        self._no_update.set()

    async def _update_over(self) -> None:
        """Returns when no weight update is open. Raises RunError when that takes too long: the learner may have died in one."""
        deadline_s = self.config.push.timeout_s
        try:
            async with asyncio.timeout(deadline_s):
                await self._no_update.wait()
        except TimeoutError:
            raise RunError(f"{self.name}: a weight update is open for over push.timeout_s = {deadline_s:g}") from None

    async def weight_checksums(self, shapes: dict[str, list[int]]) -> list[dict[str, str]]:
        """Of each worker: the checksums (rollout.checksums) of those tensors of a checkpoint that it can read."""
        return list(await self._rpc("softrl_checksums", shapes))

    async def token_logprobs(self, sequences: list[NDArray[np.int32]]) -> list[NDArray[np.float32]]:
        """Log-probs [T-1] of tokens 1 .. T-1 of each sequence, by an ordinary vLLM prefill that bypasses the prefix cache."""
        return list(await asyncio.gather(*(self._process.answer(self._score(ids)) for ids in sequences)))

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
        reports = await self._rpc("softrl_stats")
        return {**vars(self._counters), "in_flight": self._in_flight, **json.loads(reports[0])}

    async def profile(self, on: bool) -> dict[str, dict[str, float]]:
        """Begin or end the timing of the first worker's steps; what StepProfile.stop says at its end."""
        reports = await self._rpc("softrl_profile", on)
        return dict(json.loads(reports[0]))

    async def stop(self) -> None:
        """End vLLM's processes."""
        if self._collector is not None:
            self._collector.cancel()
        if self._llm is not None:
            self._llm.shutdown()

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        """What a method of rollout.worker_extension returns on every worker."""
        return await self._process.answer(self._llm.collective_rpc(method, args=args))

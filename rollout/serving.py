"""Soft decoding behind vLLM's own OpenAI server: `softrl serve`, or `vllm serve` with {"softrl": {}} in its --additional-config.

    --additional-config --> configure: an AttachSpec, which travels in vLLM's config --> attach_served, in every worker
    vllm_xargs          --> soft_params: what the engine actor would send --> engine --> shadow, forced and answer text, as of any
                            \\-> HTTP 400, one line: what cannot be, and what to do           request: in one piece or as a stream

A request without softrl's options is vLLM's own, untouched. Requests beyond the engine's --max-num-seqs wait in vLLM's queue, soft
or not. rollout/plugin.py calls what stands here; without the key in --additional-config a soft request is refused, and that is all.

A request whose logits are not finite ends where it is, and its client is not told: it gets the text so far and finish_reason
"stop", because a worker of vLLM can end a request with a token alone. The server's log names the request and the position, but no
weight version, which vLLM keeps from its workers.
"""

import functools
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from configs.errors import InputError
from rollout.adapters import require_compatible
from rollout.client_options import soft_params, softrl_names
from rollout.plugin import EXTRA_ARG
from rollout.wire import AttachSpec

# A request's L and answer length at most, and unless it says otherwise: the paper's in evaluation (section 4.2).
LIMITS = {"max_cot_tokens": 512, "max_answer_tokens": 32}

logger = logging.getLogger("vllm.softrl")


# ---------------------------------------------------------------------- the server


def configure(vllm_config: Any) -> None:
    """Make the limits that --additional-config gives under EXTRA_ARG an AttachSpec, as JSON; without that key nothing is done.

    Raises InputError for limits, a model or options of vLLM that soft decoding can't be served with.
    """
    extra = vllm_config.additional_config
    if not isinstance(extra, dict) or EXTRA_ARG not in extra:
        return
    require_compatible(vllm_config)
    scheduler = vllm_config.scheduler_config
    unserved = [
        ("--scheduling-policy", scheduler.policy != "fcfs", "a request that is overtaken holds its slot, and any number may be"),
        ("--kv-transfer-config", vllm_config.kv_transfer_config is not None, "mixtures don't travel with their keys and values"),
        ("VLLM_USE_RUST_FRONTEND", envs.VLLM_USE_RUST_FRONTEND, "requests are checked in vLLM's Python front end"),
    ]
    for option, on, reason in unserved:
        if on:
            raise InputError(f"vLLM runs with {option}, which soft decoding can't be served with ({reason}); leave it out")
    limits = _limits(extra[EXTRA_ARG])
    spec = AttachSpec.of_model(vllm_config.model_config.tokenizer, max_num_seqs=scheduler.max_num_seqs, **limits)
    vllm_config.additional_config = {**extra, EXTRA_ARG: spec.to_json()}


def _limits(given: Any) -> dict[str, int]:
    where = f"--additional-config: {EXTRA_ARG}"
    if not isinstance(given, dict) or not given.keys() <= LIMITS.keys():
        raise InputError(f"{where} = {given!r}: expected an object with no other keys than {', '.join(LIMITS)}")
    for key, value in given.items():
        if type(value) is not int or value < 1:
            raise InputError(f"{where}.{key} = {value!r}: expected a whole number of at least 1")
    return LIMITS | given


def served_spec(vllm_config: Any) -> AttachSpec | None:
    """What `configure` left in vLLM's config; None for a server that decodes no soft tokens."""
    extra = vllm_config.additional_config
    return AttachSpec.from_json(extra[EXTRA_ARG]) if isinstance(extra, dict) and EXTRA_ARG in extra else None


def attach_served(worker: Any) -> None:
    """Attach the soft decoder to a live vLLM worker where the server asks for it, as the engine actor does."""
    from rollout.worker_extension import attach_decoder  # the front end needs none of it

    spec = served_spec(worker.vllm_config)
    if spec is not None:
        logger.info("softrl: soft decoding is on: %s", json.dumps(attach_decoder(worker.model_runner, spec)))


# ---------------------------------------------------------------------- its front end


def open_front_end() -> None:
    """Have vLLM's server look at softrl's options before it answers, so that a refusal is an HTTP 400 even of a stream."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.async_llm import AsyncLLM

    for target, method, wrap in (
        (AsyncLLM, "generate", _with_soft_params),
        (CompletionRequest, "to_beam_search_params", _without_soft_tokens),
        (ChatCompletionRequest, "to_beam_search_params", _without_soft_tokens),
    ):
        original = getattr(target, method)
        if not hasattr(original, "__wrapped__"):
            setattr(target, method, wrap(original))


def _with_soft_params(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    @functools.wraps(original)
    def generate(llm: Any, prompt: Any, sampling_params: SamplingParams, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        config = llm.vllm_config
        ours = soft_params(sampling_params, prompt, served_spec(config), config.model_config.max_model_len)
        return original(llm, prompt, ours, *args, **kwargs)

    return generate


def _without_soft_tokens(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(request: Any, *args: Any, **kwargs: Any) -> Any:
        if names := softrl_names(request.vllm_xargs or {}):
            raise VLLMValidationError(f"use_beam_search can't be used with {names[0]} (beams are made of tokens); leave it out")
        return original(request, *args, **kwargs)

    return to_beam_search_params

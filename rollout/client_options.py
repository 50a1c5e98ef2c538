"""What a client of a serving engine may ask for in `vllm_xargs`, and how it becomes a request for vLLM's engine.

    softrl_mode            hard, soft or fuzzy; the others only beside it
    softrl_tau             CoT temperature, 1e-5 to 1; unset: the paper's of the mode. 0 in hard mode is greedy
    softrl_gamma           noise, sigma = gamma RMS(E); unset: 0.33, as in training. 0 is greedy
    softrl_sigma           the same as a standard deviation
    softrl_max_cot_tokens  L; unset: the server's

Of OpenAI's own parameters `seed` is the noise's, `max_tokens` and `temperature` are the answer's, and `stop` ends the text as ever.
"""

import secrets
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from configs.schema import TAU_OF_MODE, Mode, PolicyConfig
from rollout.plugin import EXTRA_ARG
from rollout.trajectory import COLDEST_TAU, at_least_zero, tau_expected
from rollout.wire import AttachSpec

MODE, TAU, GAMMA, SIGMA, MAX_COT = OPTIONS = ("softrl_mode", "softrl_tau", "softrl_gamma", "softrl_sigma", "softrl_max_cot_tokens")

HOTTEST_TAU = 1.0  # above, most of the vocabulary is in every mixture, and a record of gigabytes

# What else of vLLM's SamplingParams a soft request may set: what is done with its text, and vLLM's own bookkeeping.
HONOURED = {
    *("max_tokens", "temperature", "seed", "stop", "extra_args"),
    *("include_stop_str_in_output", "skip_special_tokens", "spaces_between_special_tokens", "detokenize"),
    *("output_kind", "stream_interval", "output_text_buffer_length", "skip_clone"),
}
# Why it may set no other. One that vLLM adds is refused too: it would be ignored in silence.
REASONS = {
    name: reason
    for names, reason in {
        ("n",): "all samples would be drawn from one seed: send a request for each",
        ("top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"): (
            "tokens are drawn from the whole distribution, as in training; if the checkpoint's own defaults set it, start the "
            "server with --generation-config vllm"
        ),
        ("ignore_eos", "min_tokens", "stop_token_ids"): "the text ends with its answer, or at a string in stop",
        ("logprobs", "logprob_token_ids", "prompt_logprobs"): "a mixture of tokens has no log-probability of its own",
        ("structured_outputs", "allowed_token_ids", "bad_words", "logit_bias"): "a mixture of tokens follows no grammar",
    }.items()
    for name in names
}


@dataclass(frozen=True, slots=True)
class SoftOptions:
    """What a client says of its chain of thought."""

    mode: Mode
    tau: float
    noise: dict[str, float]  # {"gamma": ...} or {"sigma": ...}
    max_cot_tokens: int


def soft_params(params: SamplingParams, prompt: Any, spec: AttachSpec | None, max_model_len: int) -> SamplingParams:
    """The sampling parameters that vLLM's engine is given for a client's; the same object when it asks for nothing soft.

    `prompt` is what vLLM's renderer made of the request's; `spec` is None on a server that decodes no soft tokens.
    Raises VLLMValidationError, which is an HTTP 400, for what can't be done, in one line.
    """
    extra = params.extra_args or {}
    names = softrl_names(extra)
    if not names:
        return params
    if spec is None:
        raise VLLMValidationError(f"{names[0]}: this server decodes no soft tokens; start it with `softrl serve`")
    options = read_options(extra, spec.max_cot_tokens)
    require_honoured(params)
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        raise VLLMValidationError(f"{MODE}: the prompt is not made of tokens alone; send text or token ids")
    answer = _answer_length(params.max_tokens, len(prompt["prompt_token_ids"]), options.max_cot_tokens, spec, max_model_len)
    ours = params.clone()
    ours.max_tokens = spec.most_generated(options.max_cot_tokens, answer) + 1  # the stop id: see rollout/slots.py
    ours.temperature = 0.0  # of vLLM's sampler, whose tokens of this request nobody sees
    ours.ignore_eos = True
    ours.stop_token_ids = [spec.stop_id]
    ours.watermarking = False
    ours.extra_args = {name: value for name, value in extra.items() if name not in names}
    ours.extra_args[EXTRA_ARG] = {
        "mode": str(options.mode),
        "tau": options.tau,
        **options.noise,
        "seed": secrets.randbits(63) if params.seed is None else params.seed,
        "max_cot_tokens": options.max_cot_tokens,
        "max_answer_tokens": answer,
        "answer_temperature": params.temperature,
        "record_full": False,
    }
    return ours


def softrl_names(extra: dict[str, Any]) -> list[str]:
    """The keys that are softrl's, known or not; EXTRA_ARG itself is not a client's to set."""
    return [name for name in extra if name == EXTRA_ARG or name.startswith(f"{EXTRA_ARG}_")]


def read_options(extra: dict[str, Any], most_cot_tokens: int) -> SoftOptions:
    """Softrl's options among the extra arguments of a request. Raises VLLMValidationError for one that is unknown or impossible."""
    for name in softrl_names(extra):
        if name not in OPTIONS:
            near = get_close_matches(name, OPTIONS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(OPTIONS)}"
            raise VLLMValidationError(f"unknown option {name}: {hint}")
    if extra.get(MODE) not in list(Mode):
        raise VLLMValidationError(f"{MODE} = {extra.get(MODE)!r}: expected {', '.join(Mode)}")
    mode = Mode(extra[MODE])
    tau = _number(extra, TAU, TAU_OF_MODE[mode])
    if tau == 0 and mode is not Mode.hard:
        raise VLLMValidationError(f"{TAU} = 0: expected a number above 0 in {mode} mode; {GAMMA} = 0 makes it greedy")
    if tau_expected(mode, tau) or tau > HOTTEST_TAU:
        raise VLLMValidationError(f"{TAU} = {tau:g}: expected a number from {COLDEST_TAU:g} to {HOTTEST_TAU:g}, or 0 in hard mode")
    length = extra.get(MAX_COT, most_cot_tokens)
    if not isinstance(length, int) or not 1 <= length <= most_cot_tokens:
        raise VLLMValidationError(
            f"{MAX_COT} = {length!r}: expected a whole number from 1 to {most_cot_tokens}, for which the server was started "
            "(--max-cot-tokens)"
        )
    return SoftOptions(mode, tau, _noise(extra, mode), length)


def _noise(extra: dict[str, Any], mode: Mode) -> dict[str, float]:
    given = [name for name in (GAMMA, SIGMA) if name in extra]
    if len(given) == 2:
        raise VLLMValidationError(f"{GAMMA} and {SIGMA} both say how much noise there is; leave one out")
    if mode is Mode.hard:
        if given:
            raise VLLMValidationError(f"{given[0]}: there is no noise in hard mode; leave it out, or set {MODE} to soft or fuzzy")
        return {"sigma": 0.0}
    if SIGMA in extra:
        return {"sigma": _number(extra, SIGMA, 0.0)}
    return {"gamma": _number(extra, GAMMA, PolicyConfig.gamma)}


def require_honoured(params: SamplingParams) -> None:
    """Raises VLLMValidationError for the first sampling parameter that soft decoding would have to ignore."""
    neutral = SamplingParams()
    for name in params.__struct_fields__:
        if name not in HONOURED and getattr(params, name) != getattr(neutral, name):
            reason = REASONS.get(name, "soft decoding knows nothing of it")
            raise VLLMValidationError(f"{name} can't be used with {MODE} ({reason}); leave it out")
    if params.seed is not None and params.seed < 0:
        raise VLLMValidationError(f"seed = {params.seed}: expected a whole number from 0 to 2**63 - 1 with {MODE}")


def _answer_length(asked: int | None, prompt: int, cot: int, spec: AttachSpec, max_model_len: int) -> int:
    """In tokens; all three parts must fit. vLLM fills the model's length where a request says nothing: then it is the server's."""
    most = spec.max_answer_tokens
    answer = most if asked is None or prompt + asked >= max_model_len else asked
    if answer > most:
        raise VLLMValidationError(
            f"max_tokens = {answer}: with {MODE} this is the answer alone, for which the server was started with at most {most} "
            "(--max-answer-tokens); ask for fewer"
        )
    needed = prompt + spec.most_generated(cot, answer) + 1
    if needed > max_model_len:
        raise VLLMValidationError(
            f"the prompt has {prompt} tokens and needs {needed} with {MAX_COT} = {cot} and {answer} of the answer, but the model's "
            f"length is {max_model_len}; lower {MAX_COT} or shorten the prompt"
        )
    return answer


def _number(extra: dict[str, Any], name: str, default: float) -> float:
    value = extra.get(name, default)
    if not isinstance(value, int | float) or at_least_zero(value):
        raise VLLMValidationError(f"{name} = {value!r}: expected a finite number of at least 0")
    return float(value)

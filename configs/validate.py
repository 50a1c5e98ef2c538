"""Which values are possible. Types and names are already right here (`configs.load` and OmegaConf saw to them).

One table for single numbers, then the rules that tie keys together. Each rule says in its message what to do instead.
"""

import math
from collections.abc import Mapping
from difflib import get_close_matches
from os.path import normpath
from typing import Any, NoReturn

from configs.errors import InputError
from configs.schema import EVAL_SETTINGS, Config, Mode, PushBackend

PREFILL_TOKENS = 16  # room for "The final answer is: \boxed{" in any of the supported tokenizers (8 to 12 tokens)
LARGEST_FUZZY_TAU = 0.1  # the top of the paper's fuzzy ablation; above it the mixture is soft

POSITIVE_INTS = [  # 1, 2, 3, ...
    "run.steps",
    "policy.max_cot_tokens",
    "policy.max_answer_tokens",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "engine.count",
    "engine.tensor_parallel",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.max_model_len",
    "engine.threads",
    "learner.ranks",
    "learner.micro_batch_tokens",
    "learner.threads",
    "push.verify_every",
    "checkpoint.every",
    "checkpoint.keep",
    "eval.samples",
    "eval.problems",
    "eval.max_cot_tokens",
]
POSITIVE_NUMBERS = [
    "policy.tau",
    "rollout.answer_temperature",
    "engine.kv_cache_gib",
    "engine.start_timeout_s",
    "engine.request_timeout_s",
    "learner.clip",
    "learner.step_timeout_s",
    "push.timeout_s",
]
NOT_NEGATIVE = [
    "run.seed",
    "policy.gamma",
    "learner.lr",  # 0 is useful: nothing may drift then
    "learner.warmup_steps",
    "learner.weight_decay",
    "learner.cot_weight",
    "async.max_staleness",
    "eval.every",
]


class _Checker:
    """A config with the place each key was set, so that a message can name both."""

    def __init__(self, config: Config, origin: Mapping[str, str]) -> None:
        self.config, self.origin = config, origin

    def value(self, key: str) -> Any:
        section, name = key.split(".", 1)
        return getattr(getattr(self.config, "async_" if section == "async" else section), name)

    def fail(self, key: str, expected: str) -> NoReturn:
        where = self.origin.get(key, "default")
        raise InputError(f"{where}: {key} = {show(self.value(key))}: expected {expected}")


def validate(config: Config, origin: Mapping[str, str] | None = None) -> None:
    """Raise InputError for the first impossible value. `origin` maps dotted keys to where they were set ("demo.yaml:12")."""
    check = _Checker(config, origin or {})
    _numbers(check)
    _names(check)
    _policy(check)
    _sizes(check)


def _numbers(check: _Checker) -> None:
    for keys, possible, expected in (
        (POSITIVE_INTS, lambda x: x >= 1, "a whole number of at least 1"),
        (POSITIVE_NUMBERS, lambda x: x > 0 and math.isfinite(x), "a finite number above 0"),
        (NOT_NEGATIVE, lambda x: x >= 0 and math.isfinite(x), "a finite number of at least 0"),
    ):
        for key in keys:
            number = check.value(key)
            if number is not None and not possible(number):
                check.fail(key, expected)
    if check.config.run.seed >= 2**63:
        check.fail("run.seed", "a whole number below 2**63")


def _names(check: _Checker) -> None:
    config = check.config
    if config.run.name in ("", ".", "..") or set(config.run.name) & set("/\\\0\n"):
        check.fail("run.name", "the name of one folder, without slashes; set run.dir for where it lies")
    for key in ("run.dir", "model.path"):
        if not check.value(key).strip():
            check.fail(key, "a folder" if key == "run.dir" else "a model name, a hub id or a checkpoint folder")
    for key in ("task.train", "task.validation", "task.test"):
        _task(check, key)
    _held_out(check)
    if config.task.prompt != "paper" and "{question}" not in config.task.prompt:
        check.fail("task.prompt", "`paper`, or a template that contains {question}")
    settings = config.eval.settings
    for name in settings:
        if name not in EVAL_SETTINGS:
            near = get_close_matches(name, EVAL_SETTINGS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            check.fail("eval.settings", f"names out of {', '.join(EVAL_SETTINGS)}, found {name}{hint}")
    if not settings or len(set(settings)) < len(settings):
        check.fail("eval.settings", "at least one name, and none twice")


def _task(check: _Checker, key: str) -> None:
    value = check.value(key)
    if isinstance(value, str):
        if not value.strip():
            check.fail(key, "the name of a data set, such as gsm8k")
        return
    if not isinstance(value, dict):
        check.fail(key, "a name such as gsm8k, or {path: ..., question: ..., answer: ...}")
    required, known = ("path", "question", "answer"), ("path", "question", "answer", "split", "config")
    for name, item in value.items():
        if name not in known:
            near = get_close_matches(str(name), known, n=1)
            check.fail(key, f"only {', '.join(known)}, found {name}" + (f"; did you mean {near[0]}?" if near else ""))
        if not isinstance(item, str) or not item:
            check.fail(key, f"text for {name}")
    if missing := [name for name in required if name not in value]:
        check.fail(key, f"a value for {' and '.join(missing)} too: path, and the columns that hold question and answer")


def _held_out(check: _Checker) -> None:
    """A validation split is held out of its data set, so a set that names no split would train on it too."""
    train, validation = check.config.task.train, check.config.task.validation
    if not isinstance(train, dict) or not isinstance(validation, dict):
        return
    if normpath(train["path"]) == normpath(validation["path"]) and validation.get("split") == "validation" and "split" not in train:
        check.fail("task.train", "split: train too: without it the problems of task.validation are trained on")


def _policy(check: _Checker) -> None:
    policy, tau = check.config.policy, check.config.policy.tau
    if tau is None:
        check.fail("policy.tau", "a number: load_config fills it from the mode")
    if policy.mode == Mode.fuzzy and tau > LARGEST_FUZZY_TAU:
        check.fail("policy.tau", f"at most {LARGEST_FUZZY_TAU} in fuzzy mode; for a larger one set policy.mode=soft")
    if policy.mode != Mode.hard and policy.gamma == 0:
        check.fail("policy.gamma", f"a number above 0 in {policy.mode} mode: without noise the policy has no density")
    if check.config.rollout.samples_per_prompt < 2:
        estimator = check.config.learner.advantage
        check.fail("rollout.samples_per_prompt", f"at least 2: learner.advantage={estimator} compares the samples of a prompt")
    if check.config.async_.max_staleness != 0:
        check.fail("async.max_staleness", "0: only strictly on-policy training is implemented so far")


def _sizes(check: _Checker) -> None:
    config = check.config
    batch = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    generated = config.policy.max_cot_tokens + PREFILL_TOKENS + config.policy.max_answer_tokens
    parts = f"policy.max_cot_tokens {config.policy.max_cot_tokens} + forced prefill {PREFILL_TOKENS}"
    parts += f" + policy.max_answer_tokens {config.policy.max_answer_tokens}"
    if config.engine.max_model_len <= generated:
        check.fail("engine.max_model_len", f"more than {generated} ({parts}), and room for the prompt")
    evaluated = generated - config.policy.max_cot_tokens + config.eval_cot_tokens
    if config.engine.max_model_len <= evaluated:
        check.fail("engine.max_model_len", f"more than {evaluated}: eval.max_cot_tokens is {config.eval_cot_tokens}")
    if config.learner.micro_batch_tokens is not None and config.learner.micro_batch_tokens <= generated:
        check.fail("learner.micro_batch_tokens", f"more than {generated} ({parts}), and the prompt: one sample has to fit")
    for key in ("engine.count", "learner.ranks"):
        if check.value(key) > batch:
            check.fail(key, f"at most {batch} (prompts_per_step x samples_per_prompt): the rest would idle")
    tokens, requests = config.engine.max_num_batched_tokens, config.engine.max_num_seqs
    if tokens is not None and tokens < requests:
        check.fail("engine.max_num_batched_tokens", f"at least engine.max_num_seqs = {requests}: a token of each request a step")
    if config.push.backend == PushBackend.ipc:
        check.fail("push.backend", "auto, shm or nccl: a push through shared GPU memory is not built yet")


def show(value: Any) -> str:
    """A value for a one-line message: no line breaks, at most 60 characters."""
    text = "null" if value is None else " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."

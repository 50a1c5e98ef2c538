"""What a client may ask of a serving engine: what vLLM's engine is told, what is refused, and that a text is all there."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import ParallelConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.worker.worker_base import WorkerWrapperBase

from configs.errors import InputError
from configs.schema import Mode
from rollout import plugin, serving
from rollout.client_options import REASONS, soft_params
from rollout.models import SMOLLM2, resolve_model
from rollout.plugin import EXTRA_ARG
from rollout.prompt import PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT
from rollout.slots import SoftRequests, StepRows
from rollout.soft_decoding import DONE
from rollout.wire import AttachSpec, slot_request
from tests.rollout.slow_decoding import LONGEST, STOP_IDS, Toy, a_story

PROMPT = {"type": "token", "prompt_token_ids": list(range(100))}
LENGTH = 200  # of the model
SPEC = AttachSpec(
    tokenizer="t", stop_phrase="p", prefills=([1, 2], [3, 4, 5]), eos_ids=[9], stop_id=9, max_num_seqs=4, max_cot_tokens=64,
    max_answer_tokens=20,
)  # fmt: skip


@pytest.fixture
def as_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """vLLM as it is before any plugin, and again after the test whatever was patched."""
    for target, method in (
        (EngineArgs, "create_engine_config"),
        (AsyncLLM, "generate"),
        (CompletionRequest, "to_beam_search_params"),
        (ChatCompletionRequest, "to_beam_search_params"),
    ):
        monkeypatch.setattr(target, method, inspect.unwrap(getattr(target, method)))
    monkeypatch.setattr(WorkerWrapperBase, "compile_or_warm_up_model", None, raising=False)
    yield


def ask(prompt: Any = PROMPT, spec: AttachSpec | None = SPEC, xargs: dict[str, Any] | None = None, **params: Any) -> SamplingParams:
    """What the engine is told for a request, with softrl's options by their short names."""
    params = {"max_tokens": 16} | params
    names = {f"softrl_{name}": params.pop(name) for name in ("mode", "tau", "gamma", "sigma", "max_cot_tokens") if name in params}
    asked = SamplingParams.from_optional(**params, extra_args=names | (xargs or {}) or None)
    return soft_params(asked, prompt, spec, LENGTH)


def options(*args: Any, **params: Any) -> dict[str, Any]:
    extra = ask(*args, **params).extra_args
    assert extra is not None
    return extra[EXTRA_ARG]


# ---------------------------------------------------------------------- what the engine is told


@pytest.mark.parametrize("spec", [SPEC, None])
def test_a_request_without_our_options_is_left_alone(spec: AttachSpec | None) -> None:
    for asked in (SamplingParams(n=2, logprobs=3, top_p=0.5), SamplingParams(extra_args={"other": 1})):
        assert soft_params(asked, PROMPT, spec, LENGTH) is asked


def test_a_soft_request_is_what_the_engine_actor_would_send() -> None:
    ours = ask(mode="soft", tau=0.25, gamma=0.1, max_cot_tokens=7, seed=5, temperature=0.5, max_tokens=11, xargs={"other": 1})
    assert (ours.max_tokens, ours.temperature, ours.ignore_eos, ours.stop_token_ids) == (7 + 3 + 11 + 1, 0.0, True, [9])
    assert ours.extra_args is not None and ours.extra_args["other"] == 1
    said = ours.extra_args[EXTRA_ARG]
    assert json.loads(json.dumps(said)) == said
    slot = slot_request(said, prompt_length=100, rms_embedding=2.0)
    assert (slot.mode, slot.tau, slot.sigma, slot.seed) == (Mode.soft, 0.25, 0.2, 5)
    assert (slot.max_cot_tokens, slot.max_answer_tokens, slot.answer_temperature, slot.record_full) == (7, 11, 0.5, False)


@pytest.mark.parametrize(("mode", "tau"), [("hard", 1.0), ("soft", 0.5), ("fuzzy", 1e-4)])
def test_what_a_client_does_not_say_is_the_papers(mode: str, tau: float) -> None:
    said = options(mode=mode)
    assert (said["tau"], said["max_cot_tokens"], said["max_answer_tokens"], said["answer_temperature"]) == (tau, 64, 16, 1.0)
    assert said.get("gamma") == (None if mode == "hard" else 0.33) and said.get("sigma") == (0.0 if mode == "hard" else None)


def test_seeds_differ_unless_one_is_given() -> None:
    assert len({options(mode="soft")["seed"] for _ in range(20)}) == 20
    assert options(mode="soft", seed=2**63 - 1)["seed"] == 2**63 - 1


def test_where_nothing_says_how_long_the_answer_is_the_server_does() -> None:
    assert options(mode="hard", max_tokens=LENGTH - 100)["max_answer_tokens"] == 20  # the rest of the model's length, from vLLM
    assert options(mode="hard", max_tokens=None)["max_answer_tokens"] == 20
    assert options(mode="hard", max_tokens=3)["max_answer_tokens"] == 3


def test_what_is_done_with_the_text_is_the_clients_choice() -> None:
    ours = ask(mode="soft", stop=["so"], include_stop_str_in_output=True, skip_special_tokens=False, stream_interval=3)
    assert ours.stop == ["so"] and ours.include_stop_str_in_output and not ours.skip_special_tokens and ours.stream_interval == 3


@pytest.mark.parametrize("asked", [{"mode": "hard", "tau": 0}, {"mode": "soft", "gamma": 0}, {"mode": "fuzzy", "sigma": 0.0}])
def test_greedy_is_possible_in_every_mode(asked: dict[str, Any]) -> None:
    assert options(**asked)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"tau": 0.5}, "softrl_mode = None: expected hard, soft, fuzzy"),
        ({"mode": "sofft"}, "softrl_mode = 'sofft': expected hard, soft, fuzzy"),
        ({"mode": ["soft"]}, "softrl_mode = ['soft']: expected"),
        ({"mode": "soft", "xargs": {"softrl_taau": 1}}, "unknown option softrl_taau: did you mean softrl_tau?"),
        ({"mode": "soft", "xargs": {"softrl_zzzzzzzz": 1}}, "unknown option softrl_zzzzzzzz: expected one of softrl_mode, "),
        ({"mode": "soft", "xargs": {EXTRA_ARG: {"mode": "soft"}}}, "unknown option softrl: did you mean softrl_"),
        ({"xargs": {EXTRA_ARG: "x"}}, "unknown option softrl: "),
        ({"mode": "soft", "tau": 0}, "softrl_tau = 0: expected a number above 0 in soft mode; softrl_gamma = 0 makes it greedy"),
        ({"mode": "fuzzy", "tau": 0.0}, "softrl_tau = 0: expected a number above 0 in fuzzy mode"),
        ({"mode": "hard", "tau": -1}, "softrl_tau = -1: expected a finite number of at least 0"),
        ({"mode": "soft", "tau": float("nan")}, "softrl_tau = nan: expected a finite number"),
        ({"mode": "soft", "tau": "0.5"}, "softrl_tau = '0.5': expected a finite number"),
        ({"mode": "soft", "tau": 1e-9}, "softrl_tau = 1e-09: expected a number from 1e-05 to 1"),
        ({"mode": "soft", "tau": 50}, "softrl_tau = 50: expected a number from 1e-05 to 1"),
        ({"mode": "soft", "gamma": 0.3, "sigma": 0.1}, "softrl_gamma and softrl_sigma both say how much noise"),
        ({"mode": "soft", "sigma": float("inf")}, "softrl_sigma = inf: expected a finite number"),
        ({"mode": "hard", "gamma": 0.3}, "softrl_gamma: there is no noise in hard mode"),
        ({"mode": "soft", "max_cot_tokens": 0}, "softrl_max_cot_tokens = 0: expected a whole number from 1 to 64"),
        ({"mode": "soft", "max_cot_tokens": 65}, "softrl_max_cot_tokens = 65: expected a whole number from 1 to 64"),
        ({"mode": "soft", "max_cot_tokens": 2.0}, "softrl_max_cot_tokens = 2.0: expected a whole number"),
        ({"mode": "soft", "max_tokens": 21}, "max_tokens = 21: with softrl_mode this is the answer alone"),
        ({"mode": "soft", "seed": -2}, "seed = -2: expected a whole number from 0"),
        ({"mode": "soft", "prompt": {"type": "embeds"}}, "the prompt is not made of tokens alone"),
        ({"mode": "soft", "spec": None}, "softrl_mode: this server decodes no soft tokens; start it with `softrl serve`"),
    ],
)
def test_an_impossible_option_is_named_in_one_line(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(VLLMValidationError) as refused:
        ask(**asked)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_request_that_does_not_fit_the_models_length_says_how_long_it_is() -> None:
    fits = LENGTH - 64 - 3 - 16 - 1
    assert ask(prompt={"type": "token", "prompt_token_ids": [0] * fits}, mode="soft")
    with pytest.raises(VLLMValidationError, match=f"has {fits + 1} tokens and needs 201 .* length is 200; lower softrl_max_cot"):
        ask(prompt={"type": "token", "prompt_token_ids": [0] * (fits + 1)}, mode="soft")


UNHONOURED = {
    "n": 2, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1,
    "ignore_eos": True, "min_tokens": 1, "stop_token_ids": [3], "logprobs": 0, "logprob_token_ids": [3], "prompt_logprobs": 1,
    "allowed_token_ids": [3], "bad_words": ["no"], "logit_bias": {3: 1.0},
    "structured_outputs": None, "thinking_token_budget": 5, "watermarking": True,
}  # fmt: skip


@pytest.mark.parametrize("name", UNHONOURED)
def test_what_soft_decoding_would_ignore_is_refused_with_the_reason(name: str) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    value = StructuredOutputsParams(regex="a") if name == "structured_outputs" else UNHONOURED[name]
    with pytest.raises(VLLMValidationError, match=f"^{name} can't be used with softrl_mode \\(.+\\); leave it out$"):
        ask(mode="soft", **{name: value})
    assert ask(**{name: value})  # without softrl's options it is vLLM's affair


def test_every_reason_is_of_a_sampling_parameter_that_exists() -> None:
    assert REASONS.keys() <= set(SamplingParams.__struct_fields__) and REASONS.keys() <= UNHONOURED.keys()


# ---------------------------------------------------------------------- the server


def vllm_config(given: Any, **fields: Any) -> Any:
    usual: dict[str, Any] = {
        "additional_config": {} if given is None else {EXTRA_ARG: given, "theirs": 1},
        "model_config": SimpleNamespace(enable_prompt_embeds=True, tokenizer=str(resolve_model(SMOLLM2)), max_model_len=LENGTH),
        "parallel_config": ParallelConfig(),
        "device_config": SimpleNamespace(device_type="cpu"),
        "scheduler_config": SimpleNamespace(policy="fcfs", max_num_seqs=3),
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
    }
    return SimpleNamespace(**usual | fields)


def test_the_switch_becomes_what_every_process_needs() -> None:
    config = vllm_config({"max_answer_tokens": 7})
    serving.configure(config)
    spec = serving.served_spec(config)
    assert spec is not None and config.additional_config["theirs"] == 1
    assert (spec.max_num_seqs, spec.max_cot_tokens, spec.max_answer_tokens) == (3, 512, 7)
    assert spec.stop_id == spec.eos_ids[0] and spec.prefills[0] != spec.prefills[1]


@pytest.mark.parametrize("additional", [{}, {"theirs": 1}, SimpleNamespace()])
def test_a_server_that_does_not_ask_is_left_alone(additional: Any) -> None:
    config = SimpleNamespace(additional_config=additional)
    serving.configure(config)
    assert config.additional_config is additional and serving.served_spec(config) is None


@pytest.mark.parametrize(
    ("given", "fields", "says"),
    [
        (True, {}, "softrl = True: expected an object with no other keys than max_cot_tokens, max_answer_tokens"),
        ({"max_cot": 5}, {}, "softrl = {'max_cot': 5}: expected"),
        ({"max_cot_tokens": 0}, {}, "softrl.max_cot_tokens = 0: expected a whole number of at least 1"),
        ({"max_cot_tokens": "5"}, {}, "softrl.max_cot_tokens = '5': expected"),
        ({}, {"model_config": SimpleNamespace(enable_prompt_embeds=False)}, "without --enable-prompt-embeds"),
        ({}, {"speculative_config": SimpleNamespace()}, "with --speculative-config"),
        ({}, {"scheduler_config": SimpleNamespace(policy="priority", max_num_seqs=3)}, "with --scheduling-policy"),
        ({}, {"kv_transfer_config": SimpleNamespace()}, "with --kv-transfer-config"),
    ],
)
def test_a_server_that_cannot_is_refused_at_its_start(given: Any, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as refused:
        serving.configure(vllm_config(given, **fields))
    assert says in str(refused.value)


def test_vllms_own_command_line_switches_it_on(as_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the plugin, in vLLM's own code from its arguments to its config."""
    monkeypatch.setattr(EngineArgs, "__post_init__", lambda self: None)  # it would load the installed plugins
    plugin.register()
    plugin.register()
    model = str(resolve_model(SMOLLM2))
    asked = AsyncEngineArgs(model=model, enable_prompt_embeds=True, additional_config={EXTRA_ARG: {}}, max_model_len=256)
    for _ in range(2):  # several API servers make it several times
        spec = serving.served_spec(asked.create_engine_config())
        assert spec is not None and spec.tokenizer == model
    assert serving.served_spec(AsyncEngineArgs(model=model, max_model_len=256).create_engine_config()) is None
    assert inspect.unwrap(AsyncLLM.generate) is AsyncLLM.generate.__wrapped__  # type: ignore[attr-defined]  # wrapped once


def test_a_refusal_comes_before_the_answer_begins(as_installed: None) -> None:
    """`generate` raises at once, where vLLM answers 400, and not when its stream is first read."""
    serving.open_front_end()
    config = vllm_config({})
    serving.configure(config)
    llm = SimpleNamespace(vllm_config=config)
    asked = SamplingParams(extra_args={"softrl_mode": "no"})
    with pytest.raises(VLLMValidationError, match="softrl_mode = 'no'"):
        AsyncLLM.generate(llm, PROMPT, asked, "id")  # type: ignore[arg-type]
    assert inspect.isasyncgen(AsyncLLM.generate(llm, PROMPT, SamplingParams(), "id"))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [CompletionRequest, ChatCompletionRequest])
def test_beams_are_refused(as_installed: None, kind: Any) -> None:
    serving.open_front_end()
    prompt = {"prompt": "a"} if kind is CompletionRequest else {"messages": [{"role": "user", "content": "a"}]}
    plain = kind(**prompt, use_beam_search=True)
    assert plain.to_beam_search_params(5, {}).max_tokens == 5
    with pytest.raises(VLLMValidationError, match="use_beam_search can't be used with softrl_mode"):
        kind(**prompt, use_beam_search=True, vllm_xargs={"softrl_mode": "soft"}).to_beam_search_params(5, {})


def test_workers_attach_after_their_own_warm_up(as_installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.register()
    done: list[str] = []
    monkeypatch.setattr("rollout.worker_extension.attach_decoder", lambda runner, spec: {"attached": done.append(runner)})
    for given in ({}, None):
        config = vllm_config(given)
        serving.configure(config)
        worker = SimpleNamespace(
            vllm_config=config, model_runner="runner", compile_or_warm_up_model=lambda: done.append("warm") or "times"
        )
        wrapper = WorkerWrapperBase()
        wrapper.worker = worker  # type: ignore[assignment]
        assert wrapper.compile_or_warm_up_model() == "times"
    assert done == ["warm", "runner", "warm"]


# ---------------------------------------------------------------------- the text


@pytest.mark.parametrize("stop_id", STOP_IDS)
@pytest.mark.parametrize("seed", range(12))
def test_a_text_has_its_last_token_and_ends_one_position_later(seed: int, stop_id: int) -> None:
    """Whatever is asked for again, as after preemption; and nobody waits for its record."""
    toy = Toy(torch.float32)
    story = a_story(toy, seed)
    requests = SoftRequests(toy.decoder(slots=2, stop_id=stop_id))
    said = {f: getattr(story.request, f) for f in story.request.__dataclass_fields__ if f != "prompt_length"}
    params = SimpleNamespace(extra_args={EXTRA_ARG: {**said, "mode": str(said["mode"])}})
    slot = requests.admit("a", params, story.request.prompt_length)
    emitted: list[int] = []
    while not emitted or emitted[-1] != stop_id:
        k = len(emitted)
        for again in (max(0, k - 1), k):
            token = emit(requests, slot, story.request.prompt_length + again, toy, story.hidden[min(again, LONGEST - 1)])
        emitted.append(token)
    record = requests.decoder.record(slot)
    prefill = requests.decoder.prefill_ids[record.prefill_kind, : requests.decoder.prefill_length[record.prefill_kind]].tolist()
    true = [*record.shadow_ids.tolist(), *prefill, *record.answer_ids.tolist()]
    shown = [requests.decoder.other_id if token == stop_id else token for token in true[:-1]]
    assert emitted == [*shown, *([] if true[-1] == stop_id else [true[-1]]), stop_id]
    assert int(requests.decoder.phase[slot]) == DONE
    requests.remove("a")
    assert not requests.finished and not requests.record_ids and requests.decoder.free_slots == 2


def emit(requests: SoftRequests, slot: int, position: int, toy: Toy, hidden: torch.Tensor) -> int:
    """The next output of a slot, or one that is asked for again: the token at `position` of its sequence."""
    one = lambda value: torch.tensor([value]).numpy()  # noqa: E731
    rows = StepRows(slot=one(slot), computed=one(position - 1), scheduled=one(1), begin=one(0), sampled=one(True))
    _, emitted = requests.advance(rows, toy.logits(hidden[None]), hidden[None])
    return int(emitted)


def test_the_id_that_stands_in_for_a_stop_id_adds_nothing_to_the_text(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from rollout.token_tables import silent_id

    tokenizer = AutoTokenizer.from_pretrained(resolve_model(SMOLLM2))
    for stop_id in (0, 2, tokenizer.eos_token_id):
        stand_in = silent_id(tokenizer, stop_id)
        ids = [tokenizer.encode("a")[0], stand_in, tokenizer.encode("b")[0]]
        assert stand_in != stop_id and tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_prefills_of_a_served_model_are_the_papers() -> None:
    from transformers import AutoTokenizer

    spec = AttachSpec.of_model(str(resolve_model(SMOLLM2)), max_num_seqs=1, max_cot_tokens=2, max_answer_tokens=3)
    decode = AutoTokenizer.from_pretrained(spec.tokenizer).decode
    assert [decode(ids) for ids in spec.prefills] == [PREFILL_AFTER_PHRASE, PREFILL_AT_LIMIT]
    assert spec.most_generated(10, 5) == 10 + len(spec.prefills[1]) + 5

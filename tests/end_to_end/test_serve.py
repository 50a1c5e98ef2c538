"""`softrl serve`: the real server on a tiny model, asked as by curl and with the openai client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import BadRequestError, OpenAI
from transformers import AutoTokenizer

from cluster.placement import cores
from rollout.engine_args import engine_environment
from rollout.prompt import PREFILL_AT_LIMIT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SOFTRL = str(Path(sys.executable).with_name("softrl"))
PROMPT = "Two trains leave a town at noon."
MODEL_LENGTH, MOST_COT, MOST_ANSWER = 1000, 840, 8  # a client that asks for the most can leave long before it has it
COT = 20  # tokens of a usual chain of thought
START_S, STOP_S, ANSWER_S = 240, 40, 60
MODES = ("hard", "soft", "fuzzy")


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    model: str
    model_dir: Path

    def call(self, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        status, answer = self.call("/v1/completions", body)
        assert status == 200, answer
        [choice] = json.loads(answer)["choices"]
        return dict(choice)

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0, timeout=ANSWER_S)

    def stats(self) -> dict[str, int]:
        """What the worker holds, once vLLM has had another batch in which to free what has ended."""
        self.complete(ordinary(max_tokens=1))
        status, answer = self.call("/collective_rpc", {"method": "softrl_stats"})
        assert status == 200, answer
        return dict(json.loads(json.loads(answer)["results"][0]))


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    command = [SOFTRL, "serve", str(tiny_llama), "--max-cot-tokens", str(MOST_COT), "--max-answer-tokens", str(MOST_ANSWER)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--max-model-len", str(MODEL_LENGTH)]
    command += ["--max-num-seqs", "4", "--kv-cache-memory-bytes", str(2**26)]
    command += ["--worker-extension-cls", "rollout.worker_extension.SoftWorkerExtension"]  # tells of leaked slots
    environment = os.environ | engine_environment(cores(None)[:1]) | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    running = Server(process, port, log, str(tiny_llama), tiny_llama)
    try:
        deadline = time.monotonic() + START_S
        while not is_up(running):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
            time.sleep(0.2)
        yield running
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=STOP_S)


def is_up(server: Server) -> bool:
    try:
        return server.call("/health")[0] == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def ordinary(**fields: Any) -> dict[str, Any]:
    return {"prompt": PROMPT, "temperature": 0, "max_tokens": COT, "ignore_eos": True, "return_token_ids": True} | fields


def soft(mode: str, *, cot: int = COT, xargs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    asked = {"softrl_mode": mode, "softrl_max_cot_tokens": cot} | (xargs or {})
    return {"prompt": PROMPT, "max_tokens": MOST_ANSWER, "return_token_ids": True, "vllm_xargs": asked} | fields


def streamed(answer: str) -> list[dict[str, Any]]:
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_the_log_says_that_soft_decoding_is_on(server: Server) -> None:
    assert "softrl: soft decoding is on: " in server.log.read_text()


@pytest.mark.parametrize("mode", MODES)
def test_a_text_is_thought_then_forced_then_answered(server: Server, mode: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(server.model_dir)
    prefill = tokenizer.encode(PREFILL_AT_LIMIT, add_special_tokens=False)
    choice = server.complete(soft(mode, seed=3))
    ids = choice["token_ids"]
    assert ids[COT : COT + len(prefill)] == prefill
    assert len(ids) <= COT + len(prefill) + MOST_ANSWER + 1 and ids[-1] == tokenizer.eos_token_id
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == tokenizer.decode(ids, skip_special_tokens=True) and PREFILL_AT_LIMIT in choice["text"]


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_says_what_is_drawn_and_a_stream_is_the_same_text(server: Server, mode: str) -> None:
    text = server.complete(soft(mode, seed=3))["text"]
    assert server.complete(soft(mode, seed=3))["text"] == text
    unseeded = {server.complete(soft(mode))["text"] for _ in range(3)}
    assert len(unseeded | {text, server.complete(soft(mode, seed=4))["text"]}) == 5
    status, answer = server.call("/v1/completions", soft(mode, seed=3, stream=True))
    chunks = [event["choices"][0] for event in streamed(answer)]
    assert status == 200 and "".join(chunk["text"] for chunk in chunks) == text
    assert len(chunks) > COT and chunks[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("mode", "xargs"),
    [
        ("hard", {"softrl_tau": 0}),
        ("fuzzy", {"softrl_gamma": 0}),
        ("soft", {"softrl_tau": 1e-4, "softrl_sigma": 0}),
    ],
)
def test_without_noise_or_warmth_a_thought_is_vllms_own_greedy_text(server: Server, mode: str, xargs: dict[str, Any]) -> None:
    thought = server.complete(soft(mode, xargs=xargs))["token_ids"][:COT]
    assert thought == server.complete(ordinary())["token_ids"]


def test_noise_is_what_is_asked_for(server: Server) -> None:
    """gamma = 0.33 unless said, and sigma is gamma RMS(E)."""
    usual, as_gamma, stronger = (
        server.complete(soft("soft", seed=3, xargs=xargs))["text"] for xargs in ({}, {"softrl_gamma": 0.33}, {"softrl_gamma": 0.5})
    )
    assert usual == as_gamma != stronger


@pytest.mark.parametrize("mode", MODES)
def test_the_openai_client_completes_and_chats(server: Server, mode: str) -> None:
    client = server.client()
    extra = {"vllm_xargs": {"softrl_mode": mode, "softrl_max_cot_tokens": COT}}
    [completion] = client.completions.create(model=server.model, prompt=PROMPT, max_tokens=4, seed=1, extra_body=extra).choices
    assert PREFILL_AT_LIMIT in completion.text
    asked: dict[str, Any] = {"model": server.model, "messages": [{"role": "user", "content": "What is 2 + 3?"}], "seed": 1}
    [chat] = client.chat.completions.create(**asked, extra_body=extra).choices  # its max_tokens is the server's own
    assert chat.message.content is not None and PREFILL_AT_LIMIT in chat.message.content
    chunks = client.chat.completions.create(**asked, extra_body=extra, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.message.content


def test_a_string_in_stop_ends_the_text_there(server: Server) -> None:
    assert server.complete(soft("soft", stop=[" answer"]))["text"].endswith("The final")


BAD = [
    ({"softrl_mode": "sofft"}, {}, "softrl_mode = 'sofft'"),
    ({"softrl_taau": 1}, {}, "unknown option softrl_taau: did you mean softrl_tau?"),
    ({"softrl": "x"}, {}, "unknown option softrl:"),
    ({"softrl_tau": 0}, {}, "softrl_tau = 0: expected a number above 0"),
    ({"softrl_max_cot_tokens": MOST_COT + 1}, {}, f"from 1 to {MOST_COT}"),
    ({}, {"max_tokens": MOST_ANSWER + 1}, "this is the answer alone"),
    ({"softrl_max_cot_tokens": MOST_COT}, {"prompt": [5] * 150}, "lower softrl_max_cot_tokens or shorten the prompt"),
    ({}, {"n": 2}, "n can't be used with softrl_mode"),
    ({}, {"logprobs": 1}, "logprobs can't be used with softrl_mode"),
    ({}, {"frequency_penalty": 1}, "frequency_penalty can't be used with softrl_mode"),
    ({}, {"structured_outputs": {"regex": "a*"}}, "structured_outputs can't be used with softrl_mode"),
    ({}, {"response_format": {"type": "json_object"}}, "structured_outputs can't be used with softrl_mode"),
    ({}, {"use_beam_search": True, "n": 2}, "use_beam_search can't be used with softrl_mode"),
]


def test_what_cannot_be_is_refused_while_others_go_on(server: Server) -> None:
    with ThreadPoolExecutor(1) as others:
        going_on = others.submit(server.call, "/v1/completions", soft("soft", cot=8 * COT, seed=3, stream=True))
        for xargs, fields, says in BAD:
            for stream in (False, True):
                if stream and "use_beam_search" in fields:
                    continue  # vLLM refuses it first
                status, answer = server.call("/v1/completions", soft("soft", xargs=xargs, stream=stream, **fields))
                assert status == 400, (xargs, fields, answer)
                message = json.loads(answer)["error"]["message"]
                assert says in message and "\n" not in message
        status, answer = going_on.result()
        assert status == 200 and streamed(answer)[-1]["choices"][0]["finish_reason"] == "stop"
    chat = {
        "model": server.model,
        "messages": [{"role": "user", "content": "2 + 3?"}],
        "extra_body": {"vllm_xargs": {"softrl_tau": 1}},
    }
    with pytest.raises(BadRequestError, match="softrl_mode = None: expected hard, soft, fuzzy"):
        server.client().chat.completions.create(**chat)  # type: ignore[call-overload]


def test_more_requests_than_are_decoded_at_once_wait_and_ordinary_ones_are_as_ever(server: Server) -> None:
    alone = server.complete(ordinary(logprobs=1))
    with ThreadPoolExecutor(16) as clients:
        mixed = [clients.submit(server.complete, soft(MODES[i % 3], cot=COT + i, seed=i)) for i in range(12)]
        beside = [clients.submit(server.complete, ordinary(logprobs=1)) for _ in range(2)]
        for waiting in mixed:
            assert PREFILL_AT_LIMIT in waiting.result()["text"]
        for waiting in beside:
            found = waiting.result()
            assert found["token_ids"] == alone["token_ids"]
            assert found["logprobs"]["token_logprobs"] == pytest.approx(alone["logprobs"]["token_logprobs"], abs=1e-4)
    assert server.stats() == {"slots_used": 0, "records_untaken": 0}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_leaves_no_slot(server: Server, stream: bool) -> None:
    before = generated(server)
    for mode in MODES:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=ANSWER_S)
        body = json.dumps(soft(mode, cot=MOST_COT, stream=stream))
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall((head + body).encode())
        wait_for_slots(server, 1)
        connection.close()
        wait_for_slots(server, 0)
    assert generated(server) - before < len(MODES) * MOST_COT  # they did not go on to their ends
    assert server.stats() == {"slots_used": 0, "records_untaken": 0}


def wait_for_slots(server: Server, used: int) -> None:
    deadline = time.monotonic() + ANSWER_S
    while server.stats()["slots_used"] != used:
        assert time.monotonic() < deadline, f"never were {used} slots in use"


def generated(server: Server) -> float:
    _, metrics = server.call("/metrics")
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("vllm:generation_tokens_total{"))


def test_it_ends_when_it_is_told_to_and_leaves_nothing(server: Server) -> None:
    family = [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    assert len(family) > 1
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(timeout=STOP_S)
    _, left = psutil.wait_procs(family[1:], timeout=STOP_S)
    assert not left
    served, _, _ = server.log.read_text().partition("shutdown triggered")  # vLLM may log a race of its own as it stops
    assert "Traceback" not in served

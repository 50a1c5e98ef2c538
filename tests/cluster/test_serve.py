"""`softrl serve` becomes vLLM's own server, with the options that soft decoding takes; the server is in tests/end_to_end."""

import json
import os
import sys

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cluster import cli
from cluster.serve import command
from rollout.models import SMOLLM2, resolve_model


class Replaced(Exception):
    """In place of os.execv, after which nothing of this process is left."""


def softrl_serve(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[str]:
    """What the process would become."""

    def execv(path: str, became: list[str]) -> None:
        assert path == became[0] == sys.executable
        raise Replaced(became)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr("sys.argv", ["softrl", "serve", *arguments])
    with pytest.raises(Replaced) as replaced:
        cli.main()
    return list(replaced.value.args[0])


def as_vllm_reads_it(arguments: list[str]) -> tuple[AsyncEngineArgs, object]:
    read = make_arg_parser(FlexibleArgumentParser()).parse_args(arguments[arguments.index("-m") + 2 :])
    return AsyncEngineArgs.from_cli_args(read), read


def test_vllm_is_told_what_soft_decoding_takes_and_what_the_user_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ["--port", "8123", "--max-model-len=256", "--no-enforce-eager", "-tp", "2"]
    engine, read = as_vllm_reads_it(softrl_serve(monkeypatch, SMOLLM2, "--max-answer-tokens", "64", *own))
    assert (engine.model, engine.served_model_name) == (str(resolve_model(SMOLLM2)), [SMOLLM2])
    assert engine.additional_config == {"softrl": {"max_answer_tokens": 64}}
    assert engine.enable_prompt_embeds and engine.generation_config == "vllm"
    assert (read.port, read.host) == (8123, "127.0.0.1")  # type: ignore[attr-defined]
    assert (engine.max_model_len, engine.enforce_eager, engine.tensor_parallel_size) == (256, False, 2)


def test_the_log_of_a_server_is_vllms_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    softrl_serve(monkeypatch, SMOLLM2)
    assert "VLLM_LOGGING_LEVEL" not in os.environ


def test_only_a_cpu_is_kept_from_compiling() -> None:
    assert "--enforce-eager" in command(SMOLLM2, {}, [], on_gpu=False)
    on_gpu = command(SMOLLM2, {}, [], on_gpu=True)
    assert "--enforce-eager" not in on_gpu and json.dumps({"softrl": {}}) in on_gpu


@pytest.mark.parametrize(
    ("arguments", "plugins", "says"),
    [
        (["/no/such/folder"], None, "/no/such/folder: no such folder"),
        ([SMOLLM2, "--additional-config={}"], None, "--additional-config: softrl serve writes it"),
        ([SMOLLM2], "lora", "VLLM_PLUGINS=lora keeps vLLM from loading softrl's plugin"),
        ([SMOLLM2, "--max-cot-tokens", "0"], None, "--max-cot-tokens"),
    ],
)
def test_bad_input_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], plugins: str | None, says: str
) -> None:
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("it started"))
    monkeypatch.setattr("sys.argv", ["softrl", "serve", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2 and says in capsys.readouterr().err

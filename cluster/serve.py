"""`softrl serve`: vLLM's own OpenAI server, with soft decoding for the requests that ask for it (rollout/serving.py)."""

import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from configs.errors import InputError
from rollout.models import resolve_model
from rollout.plugin import EXTRA_ARG, require_plugin_allowed

ADDITIONAL = "--additional-config"


def serve(model: str, limits: dict[str, int], options: Sequence[str]) -> NoReturn:
    """Become vLLM's server, whose signals, log and exit code are its own. See `command`."""
    import torch

    require_plugin_allowed()
    arguments = command(model, limits, options, on_gpu=torch.cuda.is_available())
    os.execv(arguments[0], arguments)


def command(model: str, limits: dict[str, int], options: Sequence[str], *, on_gpu: bool) -> list[str]:
    """vLLM's server for a model as in model.path: what soft decoding takes, then the user's own options, of which the last counts.

    `limits` are rollout.serving.LIMITS where they differ. The server is what `vllm serve` starts, by its module, because the `vllm`
    command of vLLM's build for CPUs does not find its own version. Raises InputError for a model that is not there.
    """
    if any(option.split("=")[0] == ADDITIONAL for option in options):
        raise InputError(f"{ADDITIONAL}: softrl serve writes it; use `vllm serve` with a key {EXTRA_ARG!r} in yours")
    ours = ["--model", str(resolve_model(model)), "--served-model-name", model, ADDITIONAL, json.dumps({EXTRA_ARG: limits})]
    ours += ["--enable-prompt-embeds"]  # its buffer takes the soft tokens
    ours += ["--host", "127.0.0.1"]  # clients may then send embeddings too, and vLLM trusts them to be well-formed
    ours += ["--generation-config", "vllm"]  # a checkpoint's own sampling defaults must not leak into the answer
    # A GPU adds logits up in float32 anyway: vLLM is asked not to round them. Compiling takes a CPU minutes.
    ours += ["--hf-overrides", '{"head_dtype": "float32"}'] if on_gpu else ["--enforce-eager"]
    return [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", *ours, *options]

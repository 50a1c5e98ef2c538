"""From the `model.path` of a config to a checkpoint folder that engine and learner can load.

    smollm2-135m  --> converted once into the cache folder            \\
    ./folder      --> as it is                                          >-- checked (no weight is loaded) --> Path
    owner/name    --> snapshot of the Hugging Face hub, safetensors   /
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InputError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMOLLM2 = "smollm2-135m"
SMOLLM2_FOLDER = f"{SMOLLM2}-v1"  # a change of the conversion takes a new name, so an old cache is never mistaken for it

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_DUPLICATES = ["consolidated*", "original/*"]  # the same weights in their publishers' own formats
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
CAUSAL_CLASSES = ("ForCausalLM", "LMHeadModel")  # how transformers names them
LOGIT_KEYS = ("final_logit_softcapping", "logits_scaling", "logit_scale")  # of a config: logits are not hidden @ head^T alone
# What says that inputs are not rows of the embedding: the name of a family whose classes scale them without a word in config.json,
# or a key. Worker and learner compare the numbers themselves; this is what is known before a weight is loaded.
SCALING_FAMILY, SCALE_KEYS = "gemma", ("scale_emb",)
PROBED_IDS = 64  # that they compare, spread over the vocabulary: some rows may be zero, which scaling would not show


def resolve_model(path: str) -> Path:
    """The folder of a checked checkpoint for a `model.path`; InputError in one line when there is none to be had."""
    if path == SMOLLM2:
        return converted_smollm2()
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise InputError(f"model.path: {path}: no such folder; give a checkpoint folder, a Hugging Face id or {SMOLLM2}")
        folder = _snapshot(path)
    check_model(folder, path)
    return folder.resolve()


def load_tokenizer(path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a `model.path` (as `resolve_model` takes it)."""
    from transformers import AutoTokenizer  # seconds to import; config checks do without

    folder = resolve_model(path)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.path: {path}: its tokenizer does not load: {_first_line(error)}") from error


def cache_folder() -> Path:
    """$SOFTRL_CACHE, else softrl under $XDG_CACHE_HOME, else ~/.cache/softrl."""
    if own := os.environ.get("SOFTRL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "softrl"


def converted_smollm2() -> Path:
    """The embedded default as a checkpoint in the cache folder, converted by whoever comes first (7 to 20 s, 270 MB)."""

    def convert(folder: Path) -> None:
        from rollout import smollm2

        smollm2.convert(smollm2.gguf_path(), folder)

    return build_once(cache_folder() / SMOLLM2_FOLDER, convert)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """`target`, filled by `build(empty folder)` unless it exists. It appears by one rename, so no reader ever sees half of it;
    processes that come at the same time wait for the first. RunError when the folder cannot be written."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _exclusive(target.with_name(f".{target.name}.lock")):
            if not target.is_dir():
                partial = target.with_name(f".{target.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a builder that was killed: nobody else holds the lock
                try:
                    partial.mkdir()
                    build(partial)
                    partial.rename(target)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"{target}: cannot be written ({error.strerror or error}); make room or set SOFTRL_CACHE to another folder"
        ) from error
    return target


def check_model(folder: Path, name: str) -> None:
    """InputError unless `folder` holds a causal language model that softrl can train: config, safetensors, tokenizer, an
    embedding and an LM head, tied or not, and nothing that scales what they give. Reads config and tensor names only."""
    config = _read_json(folder / "config.json", name)
    tensors = _tensor_names(folder, name)
    classes = [str(architecture) for architecture in config.get("architectures") or []]
    if not any(architecture.endswith(CAUSAL_CLASSES) for architecture in classes):
        found = ", ".join(classes) or "nothing"
        raise InputError(f"model.path: {name}: not a causal language model: architectures in config.json holds {found}")
    _require_plain_ends(config, classes, name)
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise InputError(f"model.path: {name}: no tokenizer; expected one of {', '.join(TOKENIZER_FILES)} in {folder}")
    if not any(tensor.endswith(EMBEDDING_NAMES) for tensor in tensors):
        raise InputError(f"model.path: {name}: no token embedding in its weights; expected one of {', '.join(EMBEDDING_NAMES)}")
    if not any(tensor.endswith(HEAD_NAMES) for tensor in tensors) and not _tied(folder, config, name):
        raise InputError(
            f"model.path: {name}: no LM head: its weights hold none of {', '.join(HEAD_NAMES)} and tie_word_embeddings is not "
            "true in config.json; give a causal language model"
        )


def _require_plain_ends(config: dict[str, Any], classes: list[str], name: str) -> None:
    text = config.get("text_config") or config
    if scaled := [architecture for architecture in classes if SCALING_FAMILY in architecture.lower()]:
        raise InputError(f"model.path: {name}: {scaled[0]} scales its embeddings; soft tokens are mixtures of them as they are")
    for keys, part in ((SCALE_KEYS, "the embeddings, of which soft tokens are mixtures"), (LOGIT_KEYS, "hidden @ head^T")):
        for key in keys:
            if text.get(key) not in (None, 1):
                raise InputError(f"model.path: {name}: {key} {text[key]} in config.json; softrl takes {part}, as they are")


def _tied(folder: Path, config: dict[str, Any], name: str) -> bool:
    """Whether the LM head is the embedding. A config that does not say leaves it to the architecture's default."""
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        return bool(AutoConfig.from_pretrained(folder).get_text_config().tie_word_embeddings)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model.path: {name}: config.json is not understood: {_first_line(error)}") from error


def _tensor_names(folder: Path, name: str) -> set[str]:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = _read_json(index, name).get("weight_map", {})
        missing = sorted(shard for shard in set(shards.values()) if not (folder / shard).is_file())
        if missing:
            raise InputError(f"model.path: {name}: {missing[0]} is missing from {folder}, named in {index.name}")
        return set(shards)
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                names.update(tensors.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"model.path: {name}: {file}: not a readable safetensors file: {_first_line(error)}") from error
    if not names:
        raise InputError(f"model.path: {name}: no *.safetensors weights in {folder}; save the model with safe serialization")
    return names


def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_DUPLICATES))
    except GatedRepoError as error:
        advice = "access is gated: accept its licence on the hub and log in with `hf auth login`"
        raise InputError(f"model.path: {name}: {advice}") from error
    except HFValidationError as error:
        raise InputError(f"model.path: {name}: neither a folder nor a hub id (owner/name); built in: {SMOLLM2}") from error
    except OSError as error:  # not found, no network, hub down: all of huggingface_hub's errors are OSErrors
        raise InputError(
            f"model.path: {name}: no such folder, and the Hugging Face hub did not deliver it ({type(error).__name__}); check "
            f"the name and the network, or give a checkpoint folder or {SMOLLM2}"
        ) from error


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(f"model.path: {name}: no {path.name} in {path.parent}; expected a Hugging Face checkpoint") from None
    except ValueError as error:
        raise InputError(f"model.path: {name}: {path}: not JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"model.path: {name}: {path}: expected a JSON object")
    return value


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    with open(lock, "w") as file:  # the kernel frees the lock when its holder dies
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

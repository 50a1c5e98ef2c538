"""Tables over the vocabulary that let a device follow text without a detokenizer.

Two questions are asked of every token: does the shadow text now end with the stop phrase, and does this token close the answer's
brace? Both are answered by one gather from a table computed once from the tokens' exact bytes, whatever way the phrase is cut
into tokens.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.errors import InputError


@dataclass(frozen=True, slots=True)
class TokenTables:
    """V is the model's vocabulary (rows of the head without padding); n the length of the stop phrase in bytes."""

    phrase_state: Tensor  # uint8 [n+1, V]: automaton state after the token; n means "ends with the phrase"
    escaping: Tensor  # uint8 [2, V]: the text after the token ends with an escaping backslash; row 1: the text before it did
    brace_delta: Tensor  # int16 [2, V]: opening minus closing braces in the token
    brace_lowest: Tensor  # int16 [2, V]: the lowest running sum inside the token, at most 0
    is_eos: Tensor  # bool [V]

    @property
    def accept(self) -> int:
        """n, the automaton state in which the text ends with the stop phrase."""
        return self.phrase_state.shape[0] - 1

    def to(self, device: torch.device) -> "TokenTables":
        """New tables on `device`, of the same shapes and dtypes; a tensor that lies there already is shared."""
        return TokenTables(*(getattr(self, name).to(device) for name in self.__slots__))


def build_token_tables(tokenizer: PreTrainedTokenizerBase, vocab_size: int, phrase: str, eos_ids: list[int]) -> TokenTables:
    """Tables for a tokenizer and a phrase; ids at or above the tokenizer's own size are treated as empty text."""
    pieces = token_bytes(tokenizer, vocab_size)
    flat, lengths = pad_pieces(pieces)
    is_eos = torch.zeros(vocab_size, dtype=torch.bool)
    is_eos[[i for i in eos_ids if i < vocab_size]] = True
    escaping, delta, lowest = brace_tables(flat, lengths)
    return TokenTables(
        phrase_state=torch.from_numpy(phrase_table(flat, lengths, phrase.encode())),
        escaping=torch.from_numpy(escaping),
        brace_delta=torch.from_numpy(delta),
        brace_lowest=torch.from_numpy(lowest),
        is_eos=is_eos,
    )


def token_bytes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[bytes]:
    """The exact bytes that each token id adds to the text.

    Knows byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece with byte fallback (Llama 2, Gemma).
    Raises InputError for any other decoder: guessing would end the chain of thought in the wrong place.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(f"tokenizer {type(tokenizer).__name__}: expected a fast tokenizer (tokenizer.json); convert it first")
    decoder = json.loads(backend.to_str())["decoder"]
    added = {i: token.content.encode() for i, token in tokenizer.added_tokens_decoder.items()}
    if _mentions(decoder, "ByteLevel"):
        alphabet = {c: b for b, c in byte_level_alphabet().items()}
        plain = [bytes(alphabet[c] for c in t) if all(c in alphabet for c in t) else t.encode() for t in _tokens(tokenizer)]
    elif _mentions(decoder, "ByteFallback"):
        plain = [_sentencepiece_bytes(t) for t in _tokens(tokenizer)]
    else:
        raise InputError(
            f"tokenizer decoder {decoder and decoder.get('type')!r}: expected ByteLevel or ByteFallback; use another model"
        )
    return [added.get(i, plain[i] if i < len(plain) else b"") for i in range(vocab_size)]


def silent_id(tokenizer: PreTrainedTokenizerBase, stop_id: int) -> int:
    """The id to show for a true `stop_id`: another special token, which readers of the text skip too; else any other."""
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i != stop_id]
    return min(special, default=0 if stop_id else 1)


def phrase_table(flat: NDArray[np.uint8], lengths: NDArray[np.int64], phrase: bytes) -> NDArray[np.uint8]:
    """[n+1, V] uint8: where the Knuth-Morris-Pratt automaton of `phrase` stands after each token, from each state."""
    step = kmp_automaton(phrase)
    state = np.repeat(np.arange(len(phrase) + 1, dtype=np.uint8)[:, None], len(lengths), axis=1)
    for i in range(flat.shape[1]):
        state = np.where(i < lengths, step[state, flat[:, i]], state)
    return state


def kmp_automaton(phrase: bytes) -> NDArray[np.uint8]:
    """[n+1, 256] uint8: state (bytes of the phrase matched by the end of the text so far) and byte -> state."""
    n = len(phrase)
    if not 0 < n < 255:
        raise InputError(f"stop phrase of {n} bytes: expected 1 to 254")
    step = np.zeros((n + 1, 256), dtype=np.uint8)
    step[0, phrase[0]] = 1
    fallback = 0  # the state after phrase[1:i], where a mismatch continues
    for i in range(1, n + 1):
        step[i] = step[fallback]
        if i < n:
            step[i, phrase[i]] = i + 1
            fallback = int(step[fallback, phrase[i]])
    return step


def brace_tables(
    flat: NDArray[np.uint8], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int16], NDArray[np.int16]]:
    """Per token [V], and per whether the text before it ends with an escaping backslash (row 1) or not (row 0):

    whether the text after it does, the brace balance it adds, and the lowest balance reached on the way. A brace after a
    backslash is a printed brace of LaTeX and does not count, in whatever token the backslash came.
    """
    escaping = np.repeat(np.arange(2, dtype=np.uint8)[:, None], len(lengths), axis=1)
    balance = np.zeros((2, len(lengths)), dtype=np.int16)
    lowest = balance.copy()
    for i in range(flat.shape[1]):
        byte, inside = flat[:, i], i < lengths
        change = (byte == ord("{")).astype(np.int16) - (byte == ord("}"))
        balance += np.where(inside & (escaping == 0), change, 0).astype(np.int16)
        lowest = np.minimum(lowest, balance)
        escaping = np.where(inside, (escaping == 0) & (byte == ord("\\")), escaping).astype(np.uint8)
    return escaping, balance, lowest


def pad_pieces(pieces: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pieces as [V, longest] uint8, zero padded, and their lengths [V]."""
    lengths = np.array([len(p) for p in pieces], dtype=np.int64)
    width = max(1, int(lengths.max(initial=0)))
    joined = b"".join(p.ljust(width, b"\0") for p in pieces)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(pieces), width), lengths


def byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: byte -> character."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


def _tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [t or "" for t in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def _mentions(decoder: Any, kind: str) -> bool:
    return kind in json.dumps(decoder)

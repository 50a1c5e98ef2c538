"""The tables say of every sequence of tokens what its decoded bytes say, however phrase and braces are cut into tokens."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from configs.errors import InputError
from rollout.models import SMOLLM2, load_tokenizer
from rollout.prompt import STOP_PHRASE
from rollout.token_tables import (
    TokenTables,
    brace_tables,
    build_token_tables,
    byte_level_alphabet,
    kmp_automaton,
    pad_pieces,
    phrase_table,
    token_bytes,
)  # fmt: skip

# --- the phrase ------------------------------------------------------------------------------------------------------


def matched(text: bytes, phrase: bytes) -> int:
    """The longest beginning of the phrase that the text ends with."""
    return max(n for n in range(len(phrase) + 1) if text.endswith(phrase[:n]))


@st.composite
def phrase_pieces_and_tokens(draw: st.DrawFn) -> tuple[bytes, list[bytes], list[int]]:
    """Two or three letters only, so that repeated beginnings, near misses and overlaps are the rule; some pieces are cut out of
    the phrase itself, or straddle one of its ends."""
    letters = st.sampled_from([b"a", b"b", b"\xc3", b"\0"])

    def strings(shortest: int, longest: int) -> st.SearchStrategy[bytes]:
        return st.lists(letters, min_size=shortest, max_size=longest).map(b"".join)

    phrase = draw(strings(1, 7))
    cuts = st.tuples(st.integers(0, len(phrase)), st.integers(0, len(phrase))).map(lambda ends: phrase[min(ends) : max(ends)])
    straddling = st.tuples(strings(0, 3), cuts, strings(0, 3)).map(b"".join)
    pieces = draw(st.lists(st.one_of(strings(0, 4), cuts, straddling), min_size=1, max_size=12))
    return phrase, pieces, draw(st.lists(st.integers(0, len(pieces) - 1), max_size=40))


@given(phrase_pieces_and_tokens())
def test_the_automaton_accepts_exactly_when_the_text_ends_with_the_phrase(case: tuple[bytes, list[bytes], list[int]]) -> None:
    phrase, pieces, tokens = case
    table = phrase_table(*pad_pieces(pieces), phrase)
    assert table.shape == (len(phrase) + 1, len(pieces)) and table.dtype == np.uint8
    state, text = 0, b""
    for token in tokens:
        state, text = int(table[state, token]), text + pieces[token]
        assert (state == len(phrase)) == text.endswith(phrase)
        assert state == matched(text, phrase)


@pytest.mark.parametrize("phrase", [b"aaaa", b"abababac", b"The final answer is: ", b"x" * 254])
def test_the_automaton_of_a_repetitive_text(phrase: bytes) -> None:
    step = kmp_automaton(phrase)
    letters = random.Random(0).choices(sorted({*phrase, ord("?")}), k=200)
    text = b"".join(phrase[:cut] for cut in range(len(phrase) + 1)) + bytes(letters) + phrase + phrase[1:]
    state = 0
    for end in range(1, len(text) + 1):
        state = int(step[state, text[end - 1]])
        assert (state == len(phrase)) == text[:end].endswith(phrase)


@pytest.mark.parametrize("length", [0, 255])
def test_a_phrase_too_long_for_a_byte_is_refused(length: int) -> None:
    with pytest.raises(InputError, match=f"stop phrase of {length} bytes: expected 1 to 254"):
        kmp_automaton(b"x" * length)


# --- braces ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([b"{", b"}", b"\\", b"7"]), max_size=9).map(b"".join), min_size=1, max_size=20))
def test_brace_tables_are_what_a_scan_finds(pieces: list[bytes]) -> None:
    escaping, delta, lowest = brace_tables(*pad_pieces(pieces))
    for before in (0, 1):
        for i, piece in enumerate(pieces):
            depth, deepest, escaped = 0, 0, bool(before)
            for byte in piece:
                depth += 0 if escaped else (byte == ord("{")) - (byte == ord("}"))
                deepest = min(deepest, depth)
                escaped = byte == ord("\\") and not escaped
            assert (escaping[before, i], delta[before, i], lowest[before, i]) == (escaped, depth, deepest)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def fast_tokenizer(tokens: list[str], decoder: Any, added: list[AddedToken] | None = None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.decoder = decoder
    backend.add_tokens(added or [])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)


@given(st.lists(st.binary(min_size=1, max_size=5), min_size=1, max_size=20, unique=True), st.randoms(use_true_random=False))
def test_byte_level_pieces_are_what_the_tokenizer_decodes(pieces: list[bytes], order: random.Random) -> None:
    alphabet = byte_level_alphabet()
    written = ["".join(alphabet[byte] for byte in piece) for piece in pieces]
    tokenizer = fast_tokenizer(written, decoders.ByteLevel(), [AddedToken("<|im_start|>", special=True), AddedToken("<｜é｜>")])
    known = token_bytes(tokenizer, len(tokenizer) + 3)
    assert known == [*pieces, b"<|im_start|>", "<｜é｜>".encode(), b"", b"", b""]
    ids = order.choices(range(len(tokenizer)), k=30)
    assert b"".join(known[i] for i in ids).decode(errors="replace") == tokenizer.decode(ids)


def test_the_byte_level_alphabet_is_a_bijection() -> None:
    alphabet = byte_level_alphabet()
    assert sorted(alphabet) == list(range(256)) and len(set(alphabet.values())) == 256
    assert (alphabet[ord(" ")], alphabet[ord("\n")], alphabet[ord("a")]) == ("Ġ", "Ċ", "a")


def test_byte_fallback_pieces_are_what_the_tokenizer_decodes() -> None:
    tokens = ["▁The", "▁", "▁▁", "final", ":", "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>", "é", "<0x>", "{<0x7B>"]
    tokenizer = fast_tokenizer(tokens, decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]))
    known = token_bytes(tokenizer, len(tokens))
    euro = [tokens.index(f"<0x{byte:02X}>") for byte in "€".encode()]
    for ids in (range(5), euro, [0, *euro, 8, 9, 1, *euro], [10, 11, 2]):
        assert b"".join(known[i] for i in ids).decode() == tokenizer.decode(list(ids))


@pytest.mark.parametrize(
    ("decoder", "name"), [(None, "None"), (decoders.WordPiece(), "'WordPiece'"), (decoders.Metaspace(), "'Metaspace'")]
)
def test_a_decoder_that_is_not_understood_is_refused(decoder: Any, name: str) -> None:
    with pytest.raises(InputError, match=f"tokenizer decoder {name}: expected ByteLevel or ByteFallback; use another model"):
        token_bytes(fast_tokenizer(["a"], decoder), 1)


def test_a_slow_tokenizer_is_refused() -> None:
    class SlowTokenizer:
        pass

    with pytest.raises(InputError, match=r"tokenizer SlowTokenizer: expected a fast tokenizer \(tokenizer.json\)"):
        token_bytes(SlowTokenizer(), 1)


# --- a real one ------------------------------------------------------------------------------------------------------

PADDED = 49_152 + 64  # as of a model whose embedding is padded


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def pieces(smollm2: Any) -> list[bytes]:
    return token_bytes(smollm2, PADDED)


@pytest.fixture(scope="module")
def tables(smollm2: Any) -> TokenTables:
    return build_token_tables(smollm2, PADDED, STOP_PHRASE, eos_ids=[0, 2, PADDED])


def test_smollm2s_pieces_are_what_it_decodes(smollm2: Any, pieces: list[bytes]) -> None:
    order = random.Random(0)
    shuffled = order.sample(range(len(smollm2)), len(smollm2))
    for start in range(0, len(shuffled), 64):  # each id once, in pieces of characters and in words
        ids = shuffled[start : start + 64]
        assert b"".join(pieces[i] for i in ids).decode(errors="replace") == smollm2.decode(ids)
    assert pieces[len(smollm2) :] == [b""] * 64
    text = "She said: €5 + {π} = 🙂,\n\tso the final answer is: \\boxed{5+π}"
    assert b"".join(pieces[i] for i in smollm2.encode(text)) == text.encode()


def test_smollm2s_tables_follow_real_text(smollm2: Any, pieces: list[bytes], tables: TokenTables) -> None:
    """Sentences around the phrase, tokenised as the model writes them and cut at random places into other tokens."""
    order = random.Random(1)
    sentences = [
        f"3 + 4 = 7. {STOP_PHRASE}", f"{STOP_PHRASE}{STOP_PHRASE}", "The final answer is:", "The final The final answer is:  7",
        "The final answer is: \\boxed{7}", "the final answer is: ", "So The final answer is : The final answer is:\n",
    ]  # fmt: skip
    accepted = 0
    for sentence in sentences * 10:
        cuts = sorted(order.sample(range(1, len(sentence)), order.randrange(6)))
        parts = [sentence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sentence)], strict=True)]
        state, text = 0, b""
        for token in (token for part in parts for token in smollm2.encode(part)):
            state, text = int(tables.phrase_state[state, token]), text + pieces[token]
            assert (state == tables.accept) == text.endswith(STOP_PHRASE.encode())
            accepted += state == tables.accept
    assert accepted > 10


def test_the_shapes_dtypes_and_eos_of_a_real_table(smollm2: Any, tables: TokenTables) -> None:
    assert tables.phrase_state.shape == (len(STOP_PHRASE) + 1, PADDED) and tables.phrase_state.dtype == torch.uint8
    assert tables.accept == len(STOP_PHRASE)
    assert tables.brace_delta.dtype == tables.brace_lowest.dtype == torch.int16
    assert tables.is_eos.nonzero().flatten().tolist() == [0, 2]  # ids past the vocabulary are passed over
    opening, closing = smollm2.encode("{")[0], smollm2.encode("}")[0]
    assert [tables.brace_delta[0, i].item() for i in (opening, closing)] == [1, -1]
    assert [tables.brace_lowest[0, i].item() for i in (opening, closing)] == [0, -1]
    unmoved = torch.arange(len(STOP_PHRASE) + 1, dtype=torch.uint8)[:, None].expand(-1, 64)
    assert torch.equal(tables.phrase_state[:, len(smollm2) :], unmoved)
    on_meta = tables.to(torch.device("meta"))
    assert {getattr(on_meta, name).device.type for name in TokenTables.__slots__} == {"meta"}

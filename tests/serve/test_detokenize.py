"""Detokenising as tokens come gives what one decoding of all tokens gives, characters whole."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.bundled import heldout_texts, target_path
from codesign.engine.models.tokenizer import Tokenizer
from codesign.serve.detokenize import Detokenizer

BUNDLED = Tokenizer(target_path())
BYTES = [token for token in range(BUNDLED.vocab_size) if "\ufffd" in BUNDLED.decode([token])]


def pieces_of(tokenizer: Tokenizer, token_ids: list[int], context: list[int] | None = None) -> list[str]:
    detokenizer = Detokenizer(tokenizer.decode, context or [])
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.finish()]


@given(st.lists(st.one_of(st.integers(0, BUNDLED.vocab_size - 1), st.sampled_from(BYTES)), max_size=40))
def test_pieces_of_any_tokens_are_the_whole_text(token_ids: list[int]) -> None:
    assert "".join(pieces_of(BUNDLED, token_ids)) == BUNDLED.decode(token_ids)


@given(st.text(max_size=30))
def test_text_comes_back_and_no_piece_shows_half_a_character(text: str) -> None:
    pieces = pieces_of(BUNDLED, BUNDLED.encode(text))

    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(st.lists(st.integers(0, BUNDLED.vocab_size - 1), max_size=12), st.text(max_size=12))
def test_context_does_not_change_what_a_byte_level_tokenizer_says(context: list[int], text: str) -> None:
    assert "".join(pieces_of(BUNDLED, BUNDLED.encode(text), context)) == text


def test_a_long_text_is_decoded_in_small_windows() -> None:
    token_ids = BUNDLED.encode(heldout_texts()[0].text[:20_000])
    longest = 0

    def decode(window: object) -> str:
        nonlocal longest
        longest = max(longest, len(window))  # type: ignore[arg-type]
        return BUNDLED.decode(window)  # type: ignore[arg-type]

    detokenizer = Detokenizer(decode)
    text = "".join(detokenizer.add(token) for token in token_ids) + detokenizer.finish()

    assert text == BUNDLED.decode(token_ids)
    assert longest < 20


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Words that carry their space, and bytes for what is not in the vocabulary, as Llama 2 and Mistral have them."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "\u2581hi",
        "\u2581you",
        "there",
        "\u2581a",
    ]
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": "<unk>",
        "vocab": {word: index for index, word in enumerate(words)},
        "merges": [],
    }
    decoders = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    document = {
        "version": "1.0",
        "added_tokens": [],
        "model": model,
        "decoder": {"type": "Sequence", "decoders": decoders},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return Tokenizer(folder)


def tokens_of(text: str) -> list[int]:
    """Words and bytes of the tokenizer above; the byte b is token b + 1."""
    words = {"\u2581": 257, "\u2581hi": 258, "\u2581you": 259, "there": 260, "\u2581a": 261}
    found = []
    for part in text.split("|"):
        found += [words[part]] if part in words else [byte + 1 for byte in part.encode()]
    return found


def test_words_keep_their_spaces(sentencepiece: Tokenizer) -> None:
    token_ids = tokens_of("\u2581hi|\u2581you|there|\u00e9\u4f60|\u2581a|\U0001f600")

    pieces = pieces_of(sentencepiece, token_ids)

    assert "".join(pieces) == sentencepiece.decode(token_ids) == "hi youthere\u00e9\u4f60 a\U0001f600"
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_first_word_after_a_prompt_keeps_its_space(sentencepiece: Tokenizer) -> None:
    assert "".join(pieces_of(sentencepiece, tokens_of("\u2581you"), tokens_of("\u2581hi"))) == " you"
    assert "".join(pieces_of(sentencepiece, tokens_of("\u2581you"))) == "you"


def test_an_output_that_ends_within_a_character_shows_that(sentencepiece: Tokenizer) -> None:
    half = tokens_of("\u4f60")[:2]

    assert pieces_of(sentencepiece, [*tokens_of("\u2581hi"), *half])[-1] == "\ufffd\ufffd"
    assert pieces_of(BUNDLED, BUNDLED.encode("\U0001f600")[:-1])[-1] == "\ufffd"

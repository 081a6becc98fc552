import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from codesign.bundled import draft_path, heldout_texts, target_path

TOKENIZER = Tokenizer.from_file(str(target_path() / "tokenizer.json"))


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_comes_back_whole(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_real_code_comes_back_whole() -> None:
    text = heldout_texts()[0].text

    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@pytest.mark.parametrize("number", ["12345", "00000", "90817263"])
def test_every_digit_is_a_token_of_its_own(number: str) -> None:
    assert TOKENIZER.encode(number).tokens == list(number)


def test_draft_and_target_share_the_vocabulary() -> None:
    assert (draft_path() / "tokenizer.json").read_bytes() == (target_path() / "tokenizer.json").read_bytes()


def test_vocabulary_is_as_large_as_the_models_say() -> None:
    config = json.loads((target_path() / "config.json").read_text())

    assert TOKENIZER.get_vocab_size() == config["vocab_size"]
    assert TOKENIZER.token_to_id("<|endoftext|>") == config["eos_token_id"]

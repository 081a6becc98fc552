import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from codesign.engine.models.tokenizer import Tokenizer, eos_token_ids
from codesign.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["def add(a, b): return a + b"] * 20, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


@pytest.mark.parametrize("text", ["def add(a, b):\n    return a", "", "  spaces  ", "žluťoučký 🐎", "<|end|> inside"])
def test_text_survives_the_round_trip(text: str, folder: Path) -> None:
    tokenizer = Tokenizer(folder)

    token_ids = tokenizer.encode(text)

    assert tokenizer.decode(token_ids) == text
    assert all(0 <= token < tokenizer.vocab_size for token in token_ids)


def test_missing_or_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json.*not there"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json.*not a readable"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {}, set()),
        (None, {"eos_token_id": 2}, {2}),
        ({}, {"eos_token_id": [2, 3]}, {2, 3}),
        ({"eos_token_id": [5, 6]}, {"eos_token_id": 2}, {5, 6}),
        ({"eos_token_id": None}, {"eos_token_id": 0}, {0}),
    ],
)
def test_eos_ids_come_from_generation_config_first(
    generation: object, config: object, expected: set[int], tmp_path: Path
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "config.json").write_text(json.dumps(config))

    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("value", ["2", -1, True, [1, "2"], 1.5, {"id": 2}])
def test_eos_ids_of_another_kind_are_refused(value: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": value}))

    with pytest.raises(InputError, match="eos_token_id"):
        eos_token_ids(tmp_path)

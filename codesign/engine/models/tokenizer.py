"""Text to token ids and back, from the tokenizer.json of a model directory."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from codesign.engine.models.config_values import read_json
from codesign.errors import InputError


class Tokenizer:
    """Args:
    path: the model directory.

    Raises:
        InputError: no tokenizer.json, or one that cannot be read.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json"
        if not file.is_file():
            raise InputError("is needed to turn text into tokens and is not there", file=file)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exception
            raise InputError(f"is not a readable tokenizer: {error}", file=file) from error

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, with added tokens."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def vocab_size(self) -> int:
        """With added tokens."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of the text alone, or with what the model's tokenizer puts before and after a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))


def same_vocabulary(one: str, other: str) -> bool:
    """Whether the tokenizers of two model directories name their tokens alike; true where one has none to compare.

    Raises:
        InputError: a tokenizer that cannot be read.
    """
    files = [Path(folder) / "tokenizer.json" for folder in (one, other)]
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return True
    return Tokenizer(files[0].parent).vocabulary == Tokenizer(files[1].parent).vocabulary


def eos_token_ids(path: Path) -> frozenset[int]:
    """Ids that end an output: of generation_config.json, else of config.json; none when neither says.

    Raises:
        InputError: a value that is neither an id nor a list of ids.
    """
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        value = read_json(file).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in ids):
            raise InputError(f"must be a token id or a list of them, got {value!r:.80}", file=file, key="eos_token_id")
        return frozenset(ids)
    return frozenset()

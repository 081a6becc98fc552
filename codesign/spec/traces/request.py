"""What every trace comes to: requests with their lengths, and the bounds within which a file is read."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from codesign.errors import InputError, shown

MAX_REQUESTS = 100_000  # of one trace; what follows is not read
MAX_TOKENS = 2**24
_MAX_LINE_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceRequest:
    """One observed request.

    Attributes:
        arrival_s: None where the trace has no times.
        prompt_tokens, output_tokens: None where the trace holds texts, whose length is a tokenizer's to say.
        hash_ids: of the prompt's 512-token blocks; equal ids at the beginning are an equal beginning.
    """

    arrival_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    hash_ids: tuple[int, ...] = ()
    prompt_text: str = ""
    output_text: str = ""


def lines(stream: BinaryIO, file: str) -> Iterator[tuple[str, str]]:
    """("file:line", text) of each line that is not blank.

    Raises:
        InputError: a line over 1 MiB, or one that is not UTF-8.
    """
    number = 0
    while raw := stream.readline(_MAX_LINE_BYTES + 1):
        number += 1
        place = f"{file}:{number}"
        if len(raw) > _MAX_LINE_BYTES:
            raise InputError(f"is longer than {_MAX_LINE_BYTES // 1024} KiB, the most that is read", file=place)
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise InputError("is not UTF-8 text", file=place) from None
        if text:
            yield place, text


def whole(value: Any, place: str, key: str | None, *, low: int = 0) -> int:
    """`value`, a whole number from `low` to MAX_TOKENS; InputError for anything else."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_TOKENS:
        raise InputError(f"must be a whole number from {low} to {MAX_TOKENS}, got {shown(value)}", file=place, key=key)
    return value


def parsed_whole(text: str, place: str, key: str | None, *, low: int = 0) -> int:
    """The whole number that a text spells in decimal digits."""
    is_number = text.isascii() and text.isdigit() and len(text) <= 20
    return whole(int(text) if is_number else text, place, key, low=low)


def refuse_constant(text: str) -> float:
    """For json's `parse_constant`: NaN and the infinities are not numbers of a trace."""
    raise ValueError(f"{text} is not allowed; numbers must be finite")


DECODER = json.JSONDecoder(parse_constant=refuse_constant)

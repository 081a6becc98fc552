"""The Mooncake traces: JSON lines with lengths and the hashes of each prompt's 512-token blocks.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 2353, 2354]}

Qin et al., Mooncake, 2024, https://github.com/kvcache-ai/Mooncake. `timestamp` in milliseconds. A block's hash covers
all that comes before it, so two prompts that begin with equal ids begin with equal tokens.
"""

from collections.abc import Iterator
from typing import BinaryIO

from codesign.errors import InputError, shown
from codesign.spec.traces.request import DECODER, TraceRequest, lines, whole

BLOCK_TOKENS = 512

_MAX_MS = 10**15


def requests(stream: BinaryIO, file: str) -> Iterator[TraceRequest]:
    """The lines; arrivals in seconds.

    Raises:
        InputError: a line is not such a mapping; names the line and the key.
    """
    for place, text in lines(stream, file):
        try:
            plain = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"is not JSON: {error}", file=place) from None
        if not isinstance(plain, dict):
            raise InputError(f"must be a mapping, got {shown(plain)}", file=place)
        for key in ("timestamp", "input_length", "output_length"):
            if key not in plain:
                raise InputError("is missing", file=place, key=key)
        timestamp = plain["timestamp"]
        if not isinstance(timestamp, int | float) or isinstance(timestamp, bool) or not 0 <= timestamp <= _MAX_MS:
            raise InputError(f"must be milliseconds, got {shown(timestamp)}", file=place, key="timestamp")
        hash_ids = plain.get("hash_ids", [])
        if not isinstance(hash_ids, list) or any(not isinstance(item, int) for item in hash_ids):
            raise InputError(f"must be a list of whole numbers, got {shown(hash_ids)}", file=place, key="hash_ids")
        yield TraceRequest(
            arrival_s=timestamp / 1e3,
            prompt_tokens=whole(plain["input_length"], place, "input_length", low=1),
            output_tokens=whole(plain["output_length"], place, "output_length"),
            hash_ids=tuple(hash_ids),
        )

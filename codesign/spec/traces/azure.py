"""The Azure LLM inference traces: a CSV of arrival times and lengths.

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:17:03.9799600,4808,10

https://github.com/Azure/AzurePublicDataset (Patel et al., Splitwise, 2024; Stojkovic et al., DynamoLLM, 2025).
Columns may stand in any order and others beside them. A time without a zone is taken as UTC.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import BinaryIO

from codesign.errors import InputError, shown
from codesign.spec.traces.request import TraceRequest, lines, parsed_whole

_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def requests(stream: BinaryIO, file: str) -> Iterator[TraceRequest]:
    """The rows; arrivals in seconds since 1970.

    Raises:
        InputError: the header lacks a column, or a row is not what the header says; names the line.
    """
    rows = lines(stream, file)
    place, header = next(rows, (file, ""))
    columns = [name.strip() for name in header.split(",")]
    for name in _COLUMNS:
        if columns.count(name) != 1:
            raise InputError(
                f"the first line must name the column {name} once, got {shown(header)}", file=place, key=name
            )
    time, prompt, output = (columns.index(name) for name in _COLUMNS)
    for place, row in rows:
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) != len(columns):
            raise InputError(f"has {len(cells)} columns, the first line {len(columns)}", file=place)
        yield TraceRequest(
            arrival_s=_seconds(cells[time], place),
            prompt_tokens=parsed_whole(cells[prompt], place, _COLUMNS[1], low=1),
            output_tokens=parsed_whole(cells[output], place, _COLUMNS[2]),
        )


def _seconds(text: str, place: str) -> float:
    try:
        moment = datetime.fromisoformat(text)
        seconds = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise InputError(f"must be a date and time, got {shown(text)}", file=place, key=_COLUMNS[0])
    return seconds

"""Trace: a file of observed requests that a workload replays, read within fixed bounds.

    trace: azure.csv                                    Azure LLM inference trace
    trace: {file: mooncake.jsonl, speed: 2, max_prompt_tokens: 4096, max_output_tokens: 256}
    trace: {file: sharegpt.json, max_prompt_tokens: 1024, max_output_tokens: 512}

The file's ending says what it is. Caps cut longer requests so that they fit a small machine; records say how many were.
"""

import hashlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Self

from pydantic import Field, model_validator

from codesign.errors import InputError
from codesign.spec.lengths import Tokens
from codesign.spec.regular_file import open_regular
from codesign.spec.section import Positive, Section
from codesign.spec.traces import azure, mooncake, sharegpt
from codesign.spec.traces.request import MAX_REQUESTS, TraceRequest

_FORMATS: dict[str, Callable[[BinaryIO, str], Iterator[TraceRequest]]] = {
    ".csv": azure.requests,
    ".jsonl": mooncake.requests,
    ".json": sharegpt.requests,
}


class Trace(Section):
    """Attributes:
    file: relative to the file that names it.
    speed: of the clock: at 2 requests come twice as fast. Only where the trace's arrivals are used.
    max_prompt_tokens, max_output_tokens: longer ones are cut to this; a trace of texts needs both.
    digest: of the requests, written into resolved profiles; a file that has changed since is refused.
    """

    file: Annotated[str, Field(min_length=1, max_length=4096)]
    speed: Positive | None = None
    max_prompt_tokens: Tokens | None = None
    max_output_tokens: Tokens | None = None
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None

    @model_validator(mode="after")
    def _format_is_known(self) -> Self:
        if Path(self.file).suffix not in _FORMATS:
            raise ValueError(
                "a trace must be an Azure .csv, a Mooncake .jsonl or a ShareGPT .json, by the file's ending"
            )
        if not self.has_times and None in (self.max_prompt_tokens, self.max_output_tokens):
            raise ValueError("a trace of texts needs max_prompt_tokens and max_output_tokens")
        return self

    @property
    def has_times(self) -> bool:
        """Whether the trace says when its requests came and how long they were; else it holds texts."""
        return Path(self.file).suffix != ".json"

    @property
    def max_model_len(self) -> int:
        """Tokens that the longest prompt and the longest output come to."""
        if self.max_prompt_tokens is None or self.max_output_tokens is None:
            raise ValueError(f"{self.file} has not been read yet (spec.workload_files)")
        return self.max_prompt_tokens + self.max_output_tokens


def trace_field(value: Any) -> Any:
    """A bare text is the file."""
    return {"file": value} if isinstance(value, str) else value


def read_trace(trace: Trace, folder: Path = Path()) -> tuple[TraceRequest, ...]:
    """The trace's requests, at most MAX_REQUESTS, by arrival, the first at 0 s; not yet cut.

    Args:
        folder: what `trace.file` is relative to.

    Raises:
        InputError: the file cannot be read, holds something else, nothing, or not what `digest` was written for.
    """
    path = folder / trace.file
    read = _FORMATS[path.suffix]
    with open_regular(path, wanted="a trace", suffixes=tuple(_FORMATS)) as stream:
        found = list(islice(read(stream, str(path)), MAX_REQUESTS))
    if not found:
        raise InputError("holds no request", file=path)
    if trace.has_times:
        found.sort(key=lambda request: request.arrival_s or 0.0)  # stable: equal times keep their order
    if trace.digest not in (None, requests_digest(found)):
        raise InputError("has changed since this profile was resolved (another digest)", file=path)
    return tuple(found)


def requests_digest(requests: list[TraceRequest] | tuple[TraceRequest, ...]) -> str:
    """Sixteen hex digits of all that a replay depends on."""
    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(request).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]

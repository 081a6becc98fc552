"""How tokens are counted from what a server says, piece by piece."""

from typing import Any

import pytest

from codesign.measure.completion_stream import CompletionStream
from codesign.spec.request import Request, SamplingParams

REQUEST = Request(request_id="r", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=9))


def piece(text: str = "w", *, end: bool = False, total: int | None = None, **more: Any) -> dict[str, Any]:
    usage = None if total is None else {"prompt_tokens": 2, "completion_tokens": total}
    return {"choices": [{"text": text, "finish_reason": "stop" if end else None, **more}], "usage": usage}


def final(total: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": total}}


CASES: dict[str, tuple[list[dict[str, Any]], list[float]]] = {
    "a piece is a token where nothing says otherwise": ([piece(), piece(), piece(end=True)], [0, 1, 2]),
    "an empty last piece is none": ([piece(), piece(), piece("", end=True)], [0, 1]),
    "ids are counted": ([piece(token_ids=[5, 6]), piece("", token_ids=[7], end=True)], [0, 0, 1]),
    "running totals are exact": ([piece(total=2), piece(total=3), piece(end=True, total=6)], [0, 0, 1, 2, 2, 2]),
    "the last total counts": ([piece(total=1), piece(end=True, total=2), final(3)], [0, 1, 1]),
    "the total at the end agrees": ([piece(), piece(end=True), final(2)], [0, 1]),
    "a token without text has its piece": ([piece(), piece(""), piece(), piece(end=True), final(4)], [0, 1, 2, 3]),
    "an end without a token stays one": ([piece(), piece(), piece("", end=True), final(2)], [0, 1]),
    "tokens too many for the pieces came with the last": ([piece(), piece(end=True), final(4)], [0, 1, 1, 1]),
    "text that is flushed at the end is no token": ([piece(), piece(), piece(end=True), final(2)], [0, 1]),
    "usage beside the last choice is the total": ([piece(), piece(), piece(end=True, total=3)], [0, 1, 2]),
    "a single piece may hold everything": ([piece(end=True, total=3)], [0, 0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_have_the_time_of_their_piece(name: str) -> None:
    chunks, times = CASES[name]
    stream = CompletionStream(REQUEST, sent_s=-1.0)
    for index, chunk in enumerate(chunks):
        stream.hear(chunk, float(index))
    events = stream.events()

    assert [event.time_s for event in events] == times
    assert [event.finish_reason for event in events] == [""] * (len(times) - 1) + ["stop"]
    assert {event.sent_s for event in events} == {-1.0}


def test_ids_are_those_of_the_server_or_unknown() -> None:
    known, unknown = CompletionStream(REQUEST, sent_s=0), CompletionStream(REQUEST, sent_s=0)
    known.hear(piece(token_ids=[5, 6], end=True), 1.0)
    unknown.hear(piece(end=True), 1.0)

    assert [event.token_id for event in known.events()] == [5, 6]
    assert [event.token_id for event in unknown.events()] == [-1]

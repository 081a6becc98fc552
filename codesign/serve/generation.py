"""One HTTP request's answer: its sequences' tokens, as a whole document or as server-sent events.

Whichever way, the client's leaving ends the work and gives its slots back.
"""

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from codesign.serve.choice import Choice, Piece, TokenScore
from codesign.serve.dispatcher import Flight
from codesign.serve.formats import Format
from codesign.serve.refusal import Refusal

T = TypeVar("T")


@dataclasses.dataclass(kw_only=True)
class Generation:
    """Args:
    flight: the sequences, one per choice.
    model, fingerprint: said in every document.
    prompt_tokens: for the usage; a prompt counts once however many choices it has.
    has_token_ids: every choice also says its tokens' ids.
    """

    flight: Flight
    choices: Sequence[Choice]
    format: Format
    model: str
    fingerprint: str
    prompt_tokens: int
    has_token_ids: bool = False

    def __post_init__(self) -> None:
        self._head = {
            "id": f"{self.format.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    async def document(self) -> dict[str, Any]:
        """The whole answer. Raises Refusal when the engine cannot finish it."""
        texts: list[list[str]] = [[] for _ in self.choices]
        scores: list[list[TokenScore]] = [[] for _ in self.choices]
        token_ids: list[list[int]] = [[] for _ in self.choices]
        async for index, piece in self._pieces():
            texts[index].append(piece.text)
            scores[index] += [piece.score] if piece.score else []
            token_ids[index].append(piece.token_id)
        choices = [
            self.format.choice(index, "".join(texts[index]), choice.finish_reason, scores[index])
            | self._ids(token_ids[index])
            for index, choice in enumerate(self.choices)
        ]
        return {**self._head, "object": self.format.whole, "choices": choices, "usage": self._usage}

    async def events(self, *, has_usage_at_end: bool) -> AsyncIterator[bytes]:
        """Server-sent events: a chunk per piece of text, then the usage if asked for, then [DONE].

        What goes wrong on the way is the last event, without [DONE]: the status was sent long ago.
        """
        head = {**self._head, "object": self.format.chunk}
        if has_usage_at_end:
            head["usage"] = None
        try:
            for index in range(len(self.choices)):
                if (opening := self.format.opening(index)) is not None:
                    yield _event({**head, "choices": [opening]})
            async for index, piece in self._pieces():
                if piece.text or piece.finish_reason or piece.score or self.has_token_ids:
                    choice = self.format.piece(index, piece) | self._ids([piece.token_id])
                    yield _event({**head, "choices": [choice]})
        except Refusal as refusal:
            yield _event(refusal.document)
            return
        if has_usage_at_end:
            yield _event({**head, "choices": [], "usage": self._usage})
        yield b"data: [DONE]\n\n"

    async def _pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(choice, what its next token brought), until all have ended."""
        num_open = len(self.choices)
        while num_open:
            index, output = await self.flight.next()
            if self.choices[index].finish_reason:
                continue  # drawn before the engine knew of the stop string
            piece = self.choices[index].take(output)
            if piece.finish_reason:
                num_open -= 1
                self.flight.abort(index, is_complete=True)
            yield index, piece

    def _ids(self, token_ids: list[int]) -> dict[str, Any]:
        return {"token_ids": token_ids} if self.has_token_ids else {}

    @property
    def _usage(self) -> dict[str, int]:
        completion = sum(choice.num_tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }


class WholeAnswer(Response):
    """Sends the document when it is there."""

    def __init__(self, generation: Generation) -> None:
        super().__init__()
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation.flight:
            document = await until_gone(receive, self._generation.document())
        if document is not None:
            await JSONResponse(document)(scope, receive, send)


class EventStream(Response):
    """Sends events as they come."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, *, has_usage_at_end: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._generation, self._has_usage_at_end = generation, has_usage_at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._generation.flight:
            await until_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._generation.events(has_usage_at_end=self._has_usage_at_end):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """What `work` returns, or None when the client left before; then the work is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(document, ensure_ascii=False, allow_nan=False)}\n\n".encode()

"""A small OpenAI-compatible completions server on a real socket, plain asyncio, that can misbehave in known ways."""

import asyncio
import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

Body = dict[str, Any]
Chunks = list[bytes | float]  # what is sent, and pauses in seconds


def sse(document: object) -> bytes:
    return b"data: " + (document if isinstance(document, bytes) else json.dumps(document).encode()) + b"\n\n"


def choice(text: str = " w", finish_reason: str | None = None, **more: Any) -> Body:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason, **more}], "usage": None}


def usage(body: Body, completion_tokens: int | None = None) -> Body:
    count = body["max_tokens"] if completion_tokens is None else completion_tokens
    return {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}}


def steady(body: Body, step_s: float = 0.0) -> Chunks:
    """One piece a token, then usage, as vLLM does it."""
    count = body["max_tokens"]
    chunks: Chunks = []
    for index in range(count):
        reason = "length" if index == count - 1 else None
        chunks += [step_s, sse(choice(finish_reason=reason, token_ids=[body["prompt"][0] + index]))]
    return [*chunks, sse(usage(body)), sse(b"[DONE]")]


@dataclasses.dataclass
class Server:
    """Attributes:
    answer: body -> chunks of the stream, or (status, text) instead.
    bodies, headers: of every request so far.
    most_at_once, num_dropped: streams open at the same time; streams that the client gave up.
    """

    answer: Callable[[Body], Chunks | tuple[int, str]] = steady
    port: int = 0
    bodies: list[Body] = dataclasses.field(default_factory=list)
    headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
    num_open: int = 0
    most_at_once: int = 0
    num_dropped: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_open += 1
        self.most_at_once = max(self.most_at_once, self.num_open)
        try:
            while await self._exchange(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        except asyncio.IncompleteReadError:
            return False
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        self.bodies.append(body)
        self.headers.append(headers | {"path": head[0].split()[1]})
        answer = self.answer(body)
        if isinstance(answer, tuple):
            status, text = answer
            writer.write(f"HTTP/1.1 {status} x\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
            await writer.drain()
            return True
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for chunk in answer:
            if isinstance(chunk, float):
                await asyncio.sleep(chunk)
                if reader.at_eof():
                    self.num_dropped += 1
                    return False
            elif chunk:
                writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                await writer.drain()
            else:
                return False  # an empty chunk stands for a connection that breaks
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


@contextlib.contextmanager
def serving(answer: Callable[[Body], Chunks | tuple[int, str]] = steady) -> Iterator[Server]:
    """A server on a port of its own, in a thread of its own."""
    server, loop = Server(answer), asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.handle, "127.0.0.1", 0, backlog=1024))
    server.port = listening.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(_stop(listening), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _stop(listening: asyncio.Server) -> None:
    listening.close()
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)

"""Attacks on a server for serve_hostile.py, each at a stated pace for as long as it is let.

They write to sockets by hand, since a client library in this process would slow those whose time is taken.
"""

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

from codesign.serve import bounds
from tests.serve.process import ServerProcess
from tests.serve.test_chat_template import MESSAGES

GOOD = {"model": "bundled", "prompt": "def read(path):", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
Tally = Counter[str]  # how often an attack was begun, and what became of it
Attack = Callable[[ServerProcess, Tally], Awaitable[None]]


@contextlib.asynccontextmanager
async def attacking(attack: Attack, server: ServerProcess, tally: Tally) -> AsyncIterator[None]:
    task = asyncio.ensure_future(attack(server, tally))
    await asyncio.sleep(0.5)
    try:
        yield
        assert not task.done(), f"the attack ended early: {task}"
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.5)


async def each(period_s: float, once: Callable[[], Awaitable[None]], tally: Tally) -> None:
    """Starts `once` each so many seconds, at most 64 at a time; what becomes of it is counted."""
    running: set[asyncio.Task[None]] = set()

    async def quietly() -> None:
        tally["begun"] += 1
        try:
            async with asyncio.timeout(20):
                await once()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            tally[type(error).__name__] += 1

    try:
        while True:
            if len(running) < 64:
                task = asyncio.create_task(quietly())
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(period_s)
    finally:
        for task in running:
            task.cancel()


@contextlib.asynccontextmanager
async def sent(server: ServerProcess, data: bytes) -> AsyncIterator[asyncio.StreamReader]:
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        writer.write(data)
        await writer.drain()
        yield reader
    finally:
        writer.transport.abort()


def http(server: ServerProcess, body: bytes, *, route: str = "/v1/completions", length: int | None = None) -> bytes:
    address, size = urlsplit(server.url), len(body) if length is None else length
    head = (
        f"POST {route} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {server.key}\r\nContent-Length: {size}\r\n\r\n"
    )
    return head.encode() + body


async def flood(server: ServerProcess, tally: Tally) -> None:
    data = http(server, json.dumps({**GOOD, "n": bounds.CHOICES + 1}).encode())

    async def once() -> None:
        async with sent(server, data) as reader:
            await reader.readuntil(b"\r\n")

    await each(0.01, once, tally)


async def giant_bodies(server: ServerProcess, tally: Tally) -> None:
    data = http(server, b"x" * 2**20, length=2**40)

    async def once() -> None:
        async with sent(server, data) as reader:
            await reader.read()

    await each(0.1, once, tally)


async def trickles(server: ServerProcess, tally: Tally) -> None:
    data = http(server, b"{", length=1000)

    async def once() -> None:
        async with sent(server, data):
            await asyncio.sleep(10)

    await each(0.02, once, tally)


async def leavers(server: ServerProcess, tally: Tally) -> None:
    data = http(server, json.dumps({**GOOD, "max_tokens": 96, "stream": True}).encode())

    async def once() -> None:
        async with sent(server, data) as reader:
            await reader.readuntil(b"data: ")

    await each(0.1, once, tally)


async def slow_readers(server: ServerProcess, tally: Tally) -> None:
    data = http(server, json.dumps({**GOOD, "max_tokens": 96, "stream": True, "logprobs": 20}).encode())

    async def once() -> None:
        async with sent(server, data):
            await asyncio.sleep(3)

    await each(0.5, once, tally)


async def chats(server: ServerProcess, tally: Tally) -> None:
    body = {"model": "hostile", "messages": MESSAGES[:1], "max_tokens": 1}
    data = http(server, json.dumps(body).encode(), route="/v1/chat/completions")

    async def once() -> None:
        async with sent(server, data) as reader:
            await reader.readuntil(b"\r\n")

    await each(0.5, once, tally)


ATTACKS: dict[str, Attack] = {
    "100 refused requests a second": flood,
    "10 bodies of a terabyte a second": giant_bodies,
    "64 clients that never finish their body": trickles,
    "10 clients a second that leave after the first token": leavers,
    "2 clients a second that read nothing": slow_readers,
}

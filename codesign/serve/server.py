"""The server process: uvicorn around the application, and how it ends.

SIGTERM, SIGINT   no new requests (503), running ones finish within a limit, status 0; a second signal ends at once
engine failure    500 to those who wait, /health 503, then the process ends with an error
"""

import asyncio
import contextlib
import dataclasses
import signal
import socket
import time
from collections.abc import Callable, Iterator

import uvicorn
from starlette.types import ASGIApp

from codesign.serve import bounds
from codesign.serve.dispatcher import Dispatcher
from codesign.serve.engine_thread import EngineThread, Report

_POLL_S = 0.05
_FAILING_S = 1.0  # so that who asks /health or waits for an answer is told
_CLOSE_S = 5  # for answers that are complete to reach their clients
_KEEP_ALIVE_S = 30


@dataclasses.dataclass(kw_only=True)
class Server:
    """Args:
    app: with its guard.
    listener: bound; uvicorn listens on it.
    ready: said once requests and signals are taken.
    drain_s: for running requests after a signal.
    say: messages for a person.
    """

    app: ASGIApp
    dispatcher: Dispatcher
    engine: EngineThread
    listener: socket.socket
    ready: str
    say: Callable[[str], None]
    drain_s: float = bounds.DRAIN_S

    def run(self) -> str:
        """Serves until a signal or a failure; what ended it, in words.

        Raises:
            Exception: what the engine failed with.
        """
        return asyncio.run(self._run())

    async def _run(self) -> str:
        loop = asyncio.get_running_loop()
        self._ended_by = ""
        self._ending: asyncio.Task[None] | None = None
        self._uvicorn = _Uvicorn(uvicorn_config(self.app), self._on_signal, lambda: self.say(self.ready))

        def bring(report: Report) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(self._receive, report)

        self.engine.report_to(bring)
        await self._uvicorn.serve(sockets=[self.listener])
        if self._ending is not None:
            self._ending.cancel()
        if self.dispatcher.failure is not None:
            raise self.dispatcher.failure
        return self._ended_by

    def _receive(self, report: Report) -> None:
        self.dispatcher.receive(report)
        if self.dispatcher.failure is not None and self._ending is None:
            self._ending = asyncio.create_task(self._after_failure())

    def _on_signal(self, number: signal.Signals) -> None:
        if self._ended_by:
            self._uvicorn.should_exit = self._uvicorn.force_exit = True
            return
        self._ended_by = number.name
        self.dispatcher.is_draining = True
        if self._ending is None:
            self._ending = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        num_live = self.dispatcher.num_live
        if num_live:
            self._tell(f"{self._ended_by}: {num_live} sequences finish first, within {self.drain_s:g} s")
        deadline = time.monotonic() + self.drain_s
        while self.dispatcher.num_live and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_S)
        if self.dispatcher.num_live:
            self._tell(f"{self.dispatcher.num_live} sequences were cut off")
            self.dispatcher.cut_off()
        await asyncio.sleep(_POLL_S)
        self._uvicorn.should_exit = True

    def _tell(self, text: str) -> None:
        with contextlib.suppress(OSError):  # nobody reads our messages any more: no reason not to end
            self.say(text)

    async def _after_failure(self) -> None:
        await asyncio.sleep(_FAILING_S)
        self._uvicorn.should_exit = True


class _Uvicorn(uvicorn.Server):
    """uvicorn's server with our reaction to signals."""

    def __init__(
        self, config: uvicorn.Config, on_signal: Callable[[signal.Signals], None], on_started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._on_signal, self._on_started = on_signal, on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Nothing that we do not need: no websockets, no trust in proxies' headers, no log of who asked for what."""
    return uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=bounds.CONNECTIONS,
        # Longer than clients keep idle connections (httpx, and so OpenAI's: 5 s): whoever closes first must not be the
        # side that cannot know whether a request is on its way.
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_CLOSE_S,
    )

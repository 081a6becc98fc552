"""Dispatcher: the asyncio side of the engine. Which HTTP request waits for which sequence, and how many there may be.

Lives in the event loop's thread; the engine's reports are brought there first.
"""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

from codesign.engine.sequence import StepOutput
from codesign.serve.bounds import RETRY_AFTER_S
from codesign.serve.engine_thread import EngineThread, Failed, Refused, Report
from codesign.serve.metrics import Metrics
from codesign.serve.refusal import Refusal
from codesign.spec.request import Request

_DRAINING = "the server is shutting down"


@dataclasses.dataclass
class _Live:
    """A sequence that the engine has."""

    flight: "Flight"
    index: int
    last_s: float
    num_tokens: int = 0


class Flight:
    """The sequences of one HTTP request. Leaving the `with` block aborts those that still run."""

    def __init__(self, dispatcher: "Dispatcher", request_ids: list[str]) -> None:
        self._dispatcher, self._request_ids = dispatcher, request_ids
        self._events: asyncio.Queue[tuple[int, StepOutput | Refusal]] = asyncio.Queue()

    def __enter__(self) -> "Flight":
        return self

    def __exit__(self, *_: object) -> None:
        for index in range(len(self._request_ids)):
            self.abort(index)

    def put(self, index: int, event: StepOutput | Refusal) -> None:
        self._events.put_nowait((index, event))

    async def next(self) -> tuple[int, StepOutput]:
        """(which sequence, its next token).

        Raises:
            Refusal: the engine failed or refused it, or the server shuts down.
        """
        index, event = await self._events.get()
        if isinstance(event, Refusal):
            raise event
        return index, event

    def abort(self, index: int, *, is_complete: bool = False) -> None:
        """Gives up a sequence, if it still runs.

        Args:
            is_complete: its client has all it asked for (a stop string), so nothing was cut off.
        """
        self._dispatcher.abort(self._request_ids[index], is_complete=is_complete)


class Dispatcher:
    """Args:
    num_slots: sequences that the engine runs at once.
    max_waiting: sequences taken beyond them.

    Attributes:
        failure: what the engine failed with, None while it works.
    """

    def __init__(
        self,
        engine: EngineThread,
        metrics: Metrics,
        *,
        num_slots: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._metrics, self._clock = engine, metrics, clock
        self._capacity = num_slots + max_waiting
        self._live: dict[str, _Live] = {}
        self._numbers = itertools.count()
        self.is_draining = False
        self.failure: Exception | None = None

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_running(self) -> int:
        """Sequences with output that go on."""
        return sum(live.num_tokens > 0 for live in self._live.values())

    @property
    def unfit(self) -> Refusal | None:
        """Why no request is taken now, whoever asks."""
        if self.failure is not None:
            return Refusal(503, "the engine failed; the server is going down", code="engine_failed")
        if self.is_draining:
            return Refusal(503, _DRAINING, code="draining", headers={"Retry-After": str(RETRY_AFTER_S)})
        return None

    def open(self, requests: Sequence[Request], arrived_s: float) -> Flight:
        """Gives the sequences of one HTTP request to the engine: all or none.

        Args:
            requests: their ids are replaced by ones of our own, so that nobody's can collide.
            arrived_s: when the request came, by the clock of this dispatcher.
        Raises:
            Refusal: 429 when too many wait, 503 when the server goes down.
        """
        if (unfit := self.unfit) is not None:
            self._metrics.rejected["going_down"] += 1
            raise unfit
        if self.num_live + len(requests) > self._capacity:
            self._metrics.rejected["queue_full"] += 1
            raise Refusal(
                429,
                f"{self.num_live} sequences are running or waiting, {self._capacity} is the most; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        named = [dataclasses.replace(request, request_id=str(next(self._numbers))) for request in requests]
        flight = Flight(self, [request.request_id for request in named])
        for index, request in enumerate(named):
            self._live[request.request_id] = _Live(flight, index, arrived_s)
            self._metrics.num_sequences += 1
            self._metrics.prompt_tokens += len(request.prompt_token_ids)
            self._engine.submit(request)
        return flight

    def abort(self, request_id: str, *, is_complete: bool) -> None:
        if self._live.pop(request_id, None) is not None:
            self._metrics.aborted += not is_complete
            self._engine.abort(request_id)

    def receive(self, report: Report) -> None:
        """What the engine's thread reported, in the event loop's thread."""
        if isinstance(report, Failed):
            self.failure = report.error
            self._refuse_all(Refusal(500, "the engine failed while it computed this answer", code="engine_failed"))
        elif isinstance(report, Refused):
            live = self._live.pop(report.request_id, None)
            if live is not None:
                live.flight.put(live.index, Refusal(400, report.message))
        else:
            self._hand_out(report)

    def cut_off(self) -> None:
        """Aborts everything, with a word to whoever waits."""
        for request_id in self._live:
            self._engine.abort(request_id)
        self._metrics.aborted += self.num_live
        self._refuse_all(Refusal(503, _DRAINING, code="draining"))

    def _hand_out(self, outputs: list[StepOutput]) -> None:
        now = self._clock()
        for output in outputs:
            self._metrics.output_tokens += 1
            live = self._live.get(output.request_id)
            if live is None:  # aborted while this step ran
                continue
            histogram = self._metrics.itl_s if live.num_tokens else self._metrics.ttft_s
            histogram.observe(now - live.last_s)
            live.last_s = now
            live.num_tokens += 1
            if output.finish_reason:
                del self._live[output.request_id]
            live.flight.put(live.index, output)

    def _refuse_all(self, refusal: Refusal) -> None:
        waiting, self._live = self._live, {}
        for live in waiting.values():
            live.flight.put(live.index, refusal)

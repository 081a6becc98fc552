"""Load: which requests are sent when, and what came back, by the parent's clock.

A `Load` is a fixed request set; throughput is completed output tokens over the wall time of that set, so there is no
edge of a window to argue about. `drive` sends it to any Endpoint and returns one RequestSample per request.

    single_stream   one at a time                       concurrency 1
    interactive     N clients, each waits for its reply  concurrency N
    offline         everything at once                   concurrency = all
    server          on a schedule, whatever comes back   arrivals_s

For a schedule, latency starts at the *scheduled* arrival, also when this side is late (no coordinated omission).
"""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable

from codesign.measure.session import Endpoint, TokenEvent, TrialFailed
from codesign.results.record import Outcome, RequestSample
from codesign.spec.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Attributes:
    requests: each with a `request_id` of its own.
    concurrency: most requests in flight (closed loop).
    arrivals_s: scheduled arrival of each request, ascending, from the start (open loop); None for a closed loop.
    """

    requests: tuple[Request, ...]
    concurrency: int = 1
    arrivals_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len({request.request_id for request in self.requests}) != len(self.requests):
            raise ValueError("request ids must be distinct")
        if self.arrivals_s is not None and len(self.arrivals_s) != len(self.requests):
            raise ValueError("one arrival per request is needed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """Attributes:
    samples: one per request, in the order of the load.
    wall_s: from the first arrival to the last token.
    tokens: request id -> output token ids, for checks of identity.
    """

    samples: tuple[RequestSample, ...]
    wall_s: float
    tokens: dict[str, tuple[int, ...]]

    @property
    def output_tokens(self) -> int:
        return sum(sample.output_tokens for sample in self.samples)


class _Flight:
    """One request on its way."""

    def __init__(self, request: Request, arrival_s: float) -> None:
        self.request = request
        self.arrival_s = arrival_s
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.finish_reason = ""

    def sample(self) -> RequestSample:
        times = self.times_s
        gaps = tuple(round((b - a) * 1e3, 4) for a, b in itertools.pairwise(times))
        return RequestSample(
            prompt_tokens=len(self.request.prompt_token_ids),
            output_tokens=len(self.tokens),
            finish_reason=self.finish_reason,
            ttft_ms=(times[0] - self.arrival_s) * 1e3,
            e2e_ms=(times[-1] - self.arrival_s) * 1e3,
            tpot_ms=(times[-1] - times[0]) * 1e3 / (len(times) - 1) if len(times) > 1 else None,
            itl_ms=gaps,
        )


def drive(
    endpoint: Endpoint,
    load: Load,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
    poll_s: float = 0.2,
) -> LoadResult:
    """Sends the load and waits for all of it.

    Args:
        on_progress: called with (finished requests, all requests) when one finishes.

    Raises:
        TrialFailed: what the endpoint raises, or `protocol` when a stream breaks the rules: a token for an unknown or
            finished request, more tokens than asked for, a reason that does not fit the count, times running backwards.
    """
    start_s = clock()
    waiting = deque(enumerate(load.requests))
    flights: dict[str, _Flight] = {}
    num_done = 0
    while num_done < len(load.requests):
        now = clock() - start_s
        while waiting and _may_send(load, waiting[0][0], now, in_flight=len(flights) - num_done):
            index, request = waiting.popleft()
            arrival_s = start_s + load.arrivals_s[index] if load.arrivals_s is not None else clock()
            flights[request.request_id] = _Flight(request, arrival_s)
            endpoint.submit(request)
        timeout_s = poll_s
        if waiting and load.arrivals_s is not None:
            timeout_s = min(poll_s, max(0.0, load.arrivals_s[waiting[0][0]] - (clock() - start_s)))
        for event in endpoint.poll(timeout_s):
            if _receive(flights, event):
                num_done += 1
                on_progress(num_done, len(load.requests))
    ordered = [flights[request.request_id] for request in load.requests]
    return LoadResult(
        samples=tuple(flight.sample() for flight in ordered),
        wall_s=max(flight.times_s[-1] for flight in ordered) - min(flight.arrival_s for flight in ordered),
        tokens={flight.request.request_id: tuple(flight.tokens) for flight in ordered},
    )


def _may_send(load: Load, index: int, now_s: float, *, in_flight: int) -> bool:
    if load.arrivals_s is not None:
        return now_s >= load.arrivals_s[index]
    return in_flight < load.concurrency


def _receive(flights: dict[str, _Flight], event: TokenEvent) -> bool:
    """Books one token; True when it ends its request. The rules are what a cheating or broken engine would break."""
    flight = flights.get(event.request_id)
    if flight is None:
        raise _fault(f"a token for the unknown request {event.request_id!r}")
    if flight.finish_reason:
        raise _fault(f"a token after the end of request {event.request_id!r}")
    if flight.times_s and event.time_s < flight.times_s[-1]:
        raise _fault(f"time runs backwards in request {event.request_id!r}")
    flight.tokens.append(event.token_id)
    flight.times_s.append(event.time_s)
    sampling = flight.request.sampling
    count = len(flight.tokens)
    if not event.finish_reason:
        if count == sampling.max_tokens:
            raise _fault(f"request {event.request_id!r} has all its {count} tokens but does not end")
        return False
    if event.finish_reason == "length" and count != sampling.max_tokens:
        raise _fault(f"request {event.request_id!r} ends by length after {count} of {sampling.max_tokens} tokens")
    if event.finish_reason == "stop" and sampling.ignore_eos:
        raise _fault(f"request {event.request_id!r} stopped although it was to ignore the end of text")
    flight.finish_reason = event.finish_reason
    return True


def _fault(detail: str) -> TrialFailed:
    return TrialFailed(Outcome(kind="protocol", detail=detail))

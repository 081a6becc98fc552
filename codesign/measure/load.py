"""Load: which requests are sent when, and what came back, by the parent's clock.

A `Load` is a fixed request set; throughput is completed output tokens over the wall time of that set, so there is no
edge of a window to argue about. `drive` sends it to any Endpoint and returns one RequestSample per answered request.

    single_stream   one at a time                       concurrency 1
    interactive     N clients, each waits for its reply  concurrency N, turns of a conversation one after the other
    offline         everything at once                   concurrency = all
    server          on a schedule, whatever comes back   arrivals_s

Latency starts at the *scheduled* arrival, also when this side is late (no coordinated omission); how late it was is
kept beside it, so that a client that cannot keep up is not taken for a slow engine.
"""

import dataclasses
import heapq
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping

from codesign.measure.session import Endpoint, TokenEvent, TrialFailed
from codesign.results.record import Outcome, RequestSample
from codesign.spec.request import Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Attributes:
    requests: each with a `request_id` of its own.
    concurrency: most requests (conversations) under way (closed loop).
    arrivals_s: scheduled arrival of each request, ascending, from the start (open loop); None for a closed loop.
    turns: so many consecutive requests are one conversation (closed loop). The prompt of each but the first is
        then only what is new: it is sent behind the conversation so far, the real output included.
    think_s: seconds from the end of the turn before to the scheduled arrival of each request; () for none.
    """

    requests: tuple[Request, ...]
    concurrency: int = 1
    arrivals_s: tuple[float, ...] | None = None
    turns: int = 1
    think_s: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len({request.request_id for request in self.requests}) != len(self.requests):
            raise ValueError("request ids must be distinct")
        if self.arrivals_s is not None and len(self.arrivals_s) != len(self.requests):
            raise ValueError("one arrival per request is needed")
        if self.arrivals_s is not None and self.turns != 1:
            raise ValueError("conversations need a closed loop")
        if self.think_s and len(self.think_s) != len(self.requests):
            raise ValueError("one think time per request is needed")

    def rest_of_conversation(self, index: int) -> range:
        """The turns that come after request `index`."""
        return range(index + 1, min(len(self.requests), index - index % self.turns + self.turns))

    @property
    def at_once(self) -> "Load":
        """The same requests without a clock: no schedule, no thinking."""
        return dataclasses.replace(self, arrivals_s=None, think_s=())


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadResult:
    """Attributes:
    samples: one per answered request, in the order of the load.
    wall_s: from the first arrival to the last token.
    tokens: request id -> output token ids, for checks of identity.
    num_rejected: requests that the endpoint refused because it was full, and turns that could not follow one.
    num_unfinished: requests that were not answered by the deadline.
    late_ms: how long after its scheduled arrival each request was really sent.
    """

    samples: tuple[RequestSample, ...]
    wall_s: float
    tokens: dict[str, tuple[int, ...]]
    num_rejected: int = 0
    num_unfinished: int = 0
    late_ms: tuple[float, ...] = ()

    @property
    def output_tokens(self) -> int:
        return sum(sample.output_tokens for sample in self.samples)


class _Flight:
    """One request on its way."""

    def __init__(self, index: int, request: Request, arrival_s: float) -> None:
        self.index = index
        self.request = request
        self.arrival_s = arrival_s
        self.sent_s = arrival_s
        self.tokens: list[int] = []
        self.times_s: list[float] = []
        self.finish_reason = ""
        self.end_s = math.nan
        self.is_aborting = False

    @property
    def is_answered(self) -> bool:
        return self.finish_reason in ("stop", "length")

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

    def next_turn(self, request: Request) -> Request:
        """`request` behind the conversation so far."""
        if min(self.tokens) < 0:
            detail = "the endpoint does not say its output token ids, which the next turn of a conversation begins with"
            raise TrialFailed(Outcome(kind="unsupported", detail=detail))
        prompt = (*self.request.prompt_token_ids, *self.tokens, *request.prompt_token_ids)
        return dataclasses.replace(request, prompt_token_ids=prompt)


def drive(
    endpoint: Endpoint,
    load: Load,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
    poll_s: float = 0.2,
    deadline_s: float = math.inf,
) -> LoadResult:
    """Sends the load and waits for all of it.

    Args:
        on_progress: called with (finished requests, all requests) when one finishes.
        deadline_s: from the start; what is then still on its way is aborted, and nothing more is sent.

    Raises:
        TrialFailed: what the endpoint raises, `unsupported` when it cannot be asked for a conversation, or `protocol`
            when a stream breaks the rules: a token for an unknown or finished request, more tokens than asked for, a
            reason that does not fit the count, times running backwards.
    """
    start_s = clock()
    schedule = _Schedule(load, start_s)
    flights: dict[str, _Flight] = {}
    num_done = num_rejected = 0
    while num_done < len(load.requests) and clock() - start_s < deadline_s:
        for index, request, arrival_s in schedule.due(clock):
            flight = flights[request.request_id] = _Flight(index, request, arrival_s)
            endpoint.submit(request)
            flight.sent_s = clock()
        for event in endpoint.poll(min(poll_s, schedule.wait_s(clock()))):
            flight = _receive(flights, event)
            if flight.finish_reason:
                num_ended = schedule.finish(flight)
                num_done += num_ended
                num_rejected += 0 if flight.is_answered else num_ended
                on_progress(num_done, len(load.requests))
    if num_done < len(load.requests):
        _abort(endpoint, flights, poll_s)
    sent = sorted(flights.values(), key=lambda flight: flight.index)
    answered = [flight for flight in sent if flight.is_answered]
    return LoadResult(
        samples=tuple(flight.sample() for flight in answered),
        wall_s=max(flight.end_s for flight in sent) - min(flight.arrival_s for flight in sent),
        tokens={flight.request.request_id: tuple(flight.tokens) for flight in answered},
        num_rejected=num_rejected,
        num_unfinished=len(load.requests) - len(answered) - num_rejected,
        late_ms=tuple(round(max(0.0, flight.sent_s - flight.arrival_s) * 1e3, 4) for flight in sent),
    )


def _abort(endpoint: Endpoint, flights: Mapping[str, _Flight], poll_s: float) -> None:
    """Stops what is on its way and waits until it has; the endpoint's own clock ends a wait for nothing."""
    running = {name for name, flight in flights.items() if not flight.finish_reason}
    for name in running:
        flights[name].is_aborting = True
        endpoint.abort(name)
    while running:
        running -= {event.request_id for event in endpoint.poll(poll_s) if _receive(flights, event).finish_reason}


class _Schedule:
    """Which requests may be sent by now, and when each should have been."""

    def __init__(self, load: Load, start_s: float) -> None:
        self._load = load
        self._start_s = start_s
        self._waiting = deque(range(0, len(load.requests), load.turns))
        self._later: list[tuple[float, int, Request]] = []  # heap of further turns: (arrival, index, whole request)
        self._num_active = 0

    def due(self, clock: Callable[[], float]) -> Iterator[tuple[int, Request, float]]:
        """(index, request, scheduled arrival) of each request that is due; time goes on meanwhile."""
        while self._later and self._later[0][0] <= clock():
            arrival_s, index, request = heapq.heappop(self._later)
            yield index, request, arrival_s
        arrivals_s = self._load.arrivals_s
        while self._waiting:
            index, now_s = self._waiting[0], clock()
            arrival_s = now_s if arrivals_s is None else self._start_s + arrivals_s[index]
            if arrival_s > now_s or (arrivals_s is None and self._num_active >= self._load.concurrency):
                return
            self._waiting.popleft()
            self._num_active += 1
            yield index, self._load.requests[index], arrival_s

    def wait_s(self, now_s: float) -> float:
        """Seconds to the next scheduled arrival; infinity where only an answer brings one."""
        nexts = [self._later[0][0]] if self._later else []
        if self._waiting and self._load.arrivals_s is not None:
            nexts.append(self._start_s + self._load.arrivals_s[self._waiting[0]])
        return max(0.0, min(nexts, default=math.inf) - now_s)

    def finish(self, flight: _Flight) -> int:
        """How many requests that ends: one, or with a rejected turn also those that were to follow it."""
        rest = self._load.rest_of_conversation(flight.index)
        if rest and flight.is_answered:
            think_s = self._load.think_s[rest[0]] if self._load.think_s else 0.0
            request = flight.next_turn(self._load.requests[rest[0]])
            heapq.heappush(self._later, (flight.end_s + think_s, rest[0], request))
            return 1
        self._num_active -= 1
        return 1 if flight.is_answered else 1 + len(rest)


def _receive(flights: Mapping[str, _Flight], event: TokenEvent) -> _Flight:
    """Books one event. The rules are what a cheating or broken engine would break."""
    flight = flights.get(event.request_id)
    if flight is None:
        raise _fault(f"a token for the unknown request {event.request_id!r}")
    if flight.finish_reason:
        raise _fault(f"a token after the end of request {event.request_id!r}")
    if flight.times_s and event.time_s < flight.times_s[-1]:
        raise _fault(f"time runs backwards in request {event.request_id!r}")
    if event.sent_s is not None:
        flight.sent_s = event.sent_s
    flight.end_s = event.time_s
    if (event.finish_reason == "rejected" and not flight.tokens) or (
        event.finish_reason == "aborted" and flight.is_aborting
    ):
        flight.finish_reason = event.finish_reason
        return flight
    if event.finish_reason in ("rejected", "aborted"):
        raise _fault(f"request {event.request_id!r} was {event.finish_reason} on its way")
    flight.tokens.append(event.token_id)
    flight.times_s.append(event.time_s)
    sampling = flight.request.sampling
    count = len(flight.tokens)
    if not event.finish_reason and count == sampling.max_tokens:
        raise _fault(f"request {event.request_id!r} has all its {count} tokens but does not end")
    if event.finish_reason == "length" and count != sampling.max_tokens:
        raise _fault(f"request {event.request_id!r} ends by length after {count} of {sampling.max_tokens} tokens")
    if event.finish_reason == "stop" and sampling.ignore_eos:
        raise _fault(f"request {event.request_id!r} stopped although it was to ignore the end of text")
    flight.finish_reason = event.finish_reason
    return flight


def _fault(detail: str) -> TrialFailed:
    return TrialFailed(Outcome(kind="protocol", detail=detail))

"""An endpoint in virtual time: one server, first come first served, so that its true capacity is known."""

import heapq
import math
from collections.abc import Sequence

from codesign.measure.session import TokenEvent
from codesign.spec.request import Request


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class QueueEndpoint:
    """Args:
    service_s: what one request takes, all its tokens evenly; requests wait for one another.
    servers: how many are served at once; each at its own pace.
    queue: most that may wait; more are rejected.
    hiccup_s: the server stands still until this time.
    """

    def __init__(
        self,
        clock: VirtualClock,
        *,
        service_s: float = 0.1,
        servers: int = 1,
        queue: float = math.inf,
        hiccup_s: float = 0.0,
    ) -> None:
        self.clock, self.service_s, self.queue = clock, service_s, queue
        self.free_s = [hiccup_s] * servers
        self.events: list[tuple[float, int, TokenEvent]] = []  # heap by time and order
        self.num_events = 0
        self.last_s: dict[str, float] = {}  # running request -> its last token

    def submit(self, request: Request) -> None:
        now_s, count, name = self.clock.now_s, request.sampling.max_tokens, request.request_id
        if len(self.last_s) > self.queue:
            self._add(TokenEvent(name, -1, now_s, "rejected"))
            return
        server = min(range(len(self.free_s)), key=self.free_s.__getitem__)
        begin_s = max(now_s, self.free_s[server])
        self.last_s[name] = self.free_s[server] = begin_s + self.service_s
        for i in range(1, count + 1):
            time_s = begin_s + self.service_s * i / count
            self._add(TokenEvent(name, 7, time_s, "length" if i == count else ""))

    def abort(self, request_id: str) -> None:
        if self.last_s.pop(request_id, None) is not None:
            self._add(TokenEvent(request_id, -1, self.clock.now_s, "aborted"))

    def poll(self, timeout_s: float) -> Sequence[TokenEvent]:
        left_s = self.events[0][0] - self.clock.now_s if self.events else math.inf
        self.clock.now_s += min(timeout_s, max(0.0, left_s))
        found = []
        while self.events and self.events[0][0] <= self.clock.now_s:
            event = heapq.heappop(self.events)[2]
            if event.finish_reason not in ("rejected", "aborted"):
                if event.request_id not in self.last_s:
                    continue  # aborted meanwhile
                if event.finish_reason:
                    del self.last_s[event.request_id]
            found.append(event)
        return found

    def _add(self, event: TokenEvent) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (event.time_s, self.num_events, event))

"""Session: one protocol for everything that can be built, loaded and judged, ours or somebody else's.

    session = ChildSession(...)     # a fresh process (or a server to talk to)
    facts = session.build(config)   # what was built: bytes by part, kernels, phases
    session.submit(request)         # then session.poll() yields what came out, stamped by the parent's clock
    session.score(suite)            # quality of this very engine, through its own step loop
    session.close()

A trial is a short session. Several sessions can be open at once (idle ones block), so that configurations can be
measured alternately.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from codesign.measure.kv_use import KVUse
from codesign.results.record import Outcome
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request


class TrialFailed(Exception):
    """The session ended in something else than "ok"; carries the typed outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(f"{outcome.kind}: {outcome.detail}")
        self.outcome = outcome


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One output token as the parent saw it arrive.

    Attributes:
        time_s: parent's monotonic clock.
        finish_reason: "" until the request ends; then "stop", "length" or "aborted"; "rejected" (token_id -1) instead
            of a first token when the endpoint is full.
        token_id: -1 where the endpoint does not say it.
        sent_s: when the request really left, where that is later than `submit`; None: then.
    """

    request_id: str
    token_id: int
    time_s: float
    finish_reason: str = ""
    sent_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildFacts:
    """What the child says it built; checked for type and range by the parent, since the child is not trusted.

    Attributes:
        resolved: kv_budget_tokens per layer, num_slots, dtype, ...
        bytes: part -> bytes.
        kernels: part -> kernel name.
        phases: phase -> seconds (load, quantize, allocate).
    """

    resolved: Mapping[str, Any]
    bytes: Mapping[str, int]
    kernels: Mapping[str, str]
    phases: Mapping[str, float]


class Endpoint(Protocol):
    """Something that takes requests and streams tokens; the load generator needs no more than this."""

    def submit(self, request: Request) -> None: ...

    def abort(self, request_id: str) -> None:
        """Stops a request; its last event says "aborted" and has token_id -1. Nothing happens when it has finished."""

    def poll(self, timeout_s: float) -> Sequence[TokenEvent]:
        """Token events that have arrived, waiting at most `timeout_s` for the first. Raises TrialFailed."""


class Session(Endpoint, Protocol):
    """Every method raises TrialFailed when the child dies, hangs or lies."""

    def build(self, config: EngineConfig) -> BuildFacts: ...

    def score(self, suite: Mapping[str, Any]) -> Mapping[str, Any]:
        """Quality numbers of the built engine for a suite of measure.quality (plain JSON both ways)."""

    def memory(self) -> Mapping[str, int]:
        """Peak and current memory of the device and the child process, in bytes, read by the parent where it can."""

    def speculation(self) -> Mapping[str, Any]:
        """What became of drafts since the build, and the table of batch size -> K; empty without speculation."""

    def stats(self) -> Mapping[str, int]:
        """What the engine has counted since it was built, such as `preemptions` and `prefix_hit_tokens`."""

    def kv_use(self) -> Sequence[KVUse]:
        """Readings of a paged cache since the last call, after steps of the engine; none of another cache."""

    def close(self) -> None: ...

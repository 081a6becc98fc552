"""Who measures the trials of a search: here itself, processes of its own, or a Ray cluster.

    pool.start(identity, config) ... pool.wait(seconds, listener) -> records of trials that have ended

Whatever becomes of a worker, each trial that was started comes back as one record: a lost one as `harness`, which the
study tries again. Pools do not retry.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from codesign.results.record import Outcome, TrialIdentity, TrialRecord
from codesign.search.interrupt import Interrupt
from codesign.spec.engine_config import EngineConfig

OnPhase = Callable[[str, float | None], None]
Measure = Callable[[TrialIdentity, EngineConfig, OnPhase], TrialRecord]


class Listener(Protocol):
    """Who is told how the trials in a pool go."""

    def phase(self, uid: str, name: str, fraction: float | None) -> None: ...

    def placed(self, uid: str, place: str) -> None: ...


class Pool(Protocol):
    def free_place(self) -> str | None:
        """Where the next trial would run, in words, as far as that is known; None when all places are taken."""
        ...

    def start(self, identity: TrialIdentity, config: EngineConfig) -> None:
        """Starts a trial in a free place."""
        ...

    def wait(self, timeout_s: float, listener: Listener) -> Sequence[TrialRecord]:
        """Records of trials that have ended; waits at most `timeout_s` for the first, or longer (InlinePool)."""
        ...

    def cancel(self) -> None:
        """Ends the trials that run, without records."""
        ...


class InlinePool:
    """Measures in this process, one trial at a time; the first signal ends it with KeyboardInterrupt."""

    def __init__(self, measure: Measure, interrupt: Interrupt) -> None:
        self._measure = measure
        self._interrupt = interrupt
        self._next: tuple[TrialIdentity, EngineConfig] | None = None

    def free_place(self) -> str | None:
        return "" if self._next is None else None

    def start(self, identity: TrialIdentity, config: EngineConfig) -> None:
        self._next = identity, config

    def wait(self, timeout_s: float, listener: Listener) -> Sequence[TrialRecord]:
        if self._next is None:
            time.sleep(timeout_s)
            return ()
        identity, config = self._next
        with self._interrupt.waiting():
            record = self._measure(
                identity, config, lambda name, fraction: listener.phase(identity.uid, name, fraction)
            )
        self._next = None
        return (record,)

    def cancel(self) -> None:
        self._next = None


def lost(identity: TrialIdentity, config: EngineConfig, detail: str, since: str) -> TrialRecord:
    """The record of a trial whose worker is gone."""
    return TrialRecord(
        **dataclasses.asdict(identity),
        config=config.to_dict(),
        config_digest=config.digest,
        outcome=Outcome(kind="harness", detail=detail),
        started_at=since,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )

"""A recorded grid measured again: the figures follow from the configuration, and measuring them is a sleep.

Workers and Ray tasks make it by its name: `Order("tests.search.replay:replay", {"seconds": 0.1})`.
"""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from codesign.results.record import TrialIdentity, TrialRecord
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import OnPhase, record_of


@contextlib.contextmanager
def replay(
    *, seconds: float = 0.0, log: str | None = None, die_on: int | None = None, fail: str | None = None
) -> Iterator[Callable[[TrialIdentity, EngineConfig, OnPhase], TrialRecord]]:
    """Args:
    log: file that gets a line "number attempt pid cores" for each trial that began.
    die_on: number of the trial whose first attempt kills its worker.
    fail: what a worker says that cannot measure at all.
    """
    if fail is not None:
        raise RuntimeError(fail)

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        if log is not None:
            cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
            with Path(log).open("a") as file:
                file.write(f"{identity.number} {identity.attempt} {os.getpid()} {cores}\n")
        if identity.number == die_on and identity.attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        on_phase("measure", 0.5)
        time.sleep(seconds)
        placement = {"host": socket.gethostname(), "worker": os.getpid(), "device": "replay"}
        return replace(record_of(identity, config, seconds=seconds), provenance={"placement": placement})

    yield measure

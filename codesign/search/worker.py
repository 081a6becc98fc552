"""A worker process: takes trials over a socket, one at a time, and answers with their records. JSON lines both ways.

    search -> worker    the order, then per trial {"identity", "config"}
    worker -> search    {"event": "phase", "name", "fraction"} ..., {"event": "record", "json"}

It lives as long as its search: the kernel kills it when that dies, and an ended socket ends it. It keeps its own cores
and GPUs from its first moment (see seat).
"""

import json
import os
import signal
import socket
import sys
from typing import Any

from codesign.measure import linux
from codesign.results.record import TrialIdentity
from codesign.search.measurer import Order, measurer
from codesign.spec.engine_config import EngineConfig


def job(identity: TrialIdentity, config: EngineConfig) -> str:
    """The line that asks for a trial."""
    plain = {"study": identity.study, "number": identity.number, "uid": identity.uid, "attempt": identity.attempt}
    return json.dumps({"identity": plain, "config": config.to_dict()})


def read_job(line: str) -> tuple[TrialIdentity, EngineConfig]:
    plain: Any = json.loads(line)
    return TrialIdentity(**plain["identity"]), EngineConfig.from_dict(plain["config"])


class _Phases:
    """Says phases, each once; where the search does not listen (the database is away, say), it is left out."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._last = ""

    def __call__(self, name: str, fraction: float | None) -> None:
        share = None if fraction is None else round(fraction, 2)
        line = json.dumps({"event": "phase", "name": name, "fraction": share}) + "\n"
        if line != self._last:
            self._last = line
            try:
                sent = self._control.send(line.encode(), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            self._control.sendall(line.encode()[sent:])


def main() -> None:
    descriptor, parent = int(sys.argv[1]), int(sys.argv[2])
    cores = [int(core) for core in sys.argv[3].split(",")]
    linux.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.sched_setaffinity(0, cores)
    with (
        socket.socket(fileno=descriptor) as control,
        control.makefile("r", encoding="utf-8") as lines,
        measurer(Order.from_json(lines.readline())) as measure,
    ):
        for line in lines:
            identity, config = read_job(line)
            record = measure(identity, config, _Phases(control))
            control.sendall((json.dumps({"event": "record", "json": record.to_json()}) + "\n").encode())


if __name__ == "__main__":
    main()

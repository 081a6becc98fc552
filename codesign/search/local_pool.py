"""Worker processes of this machine, one per seat. One that dies is replaced; its trial comes back as lost."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import IO, Self

from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.measurer import Order
from codesign.search.pool import Listener, lost
from codesign.search.seat import Seat
from codesign.search.worker import job
from codesign.spec.engine_config import EngineConfig

# Longer than all clocks of a trial together and its waiting for a turn: a worker that is silent for so long is lost.
TRIAL_S = 4 * 3600.0
_END_S = 10.0


class LocalPool:
    """Args:
    order: what the workers measure.
    seats: one worker each.
    """

    def __init__(self, order: Order, seats: Sequence[Seat]) -> None:
        self._order = order
        self._seats = [_Place(seat) for seat in seats]

    def free_place(self) -> str | None:
        place = next((place for place in self._seats if place.job is None), None)
        return None if place is None else place.text

    def start(self, identity: TrialIdentity, config: EngineConfig) -> None:
        place = next(place for place in self._seats if place.job is None)
        place.job = _Job(identity, config)
        if place.worker is None or not place.worker.is_running:
            place.replace_worker(self._order)
        assert place.worker is not None
        place.worker.ask(job(identity, config))

    def wait(self, timeout_s: float, listener: Listener) -> Sequence[TrialRecord]:
        busy = [place for place in self._seats if place.job is not None and place.worker is not None]
        by_socket = {place.worker.control: place for place in busy if place.worker is not None}
        readable, _, _ = select.select([*by_socket], [], [], timeout_s)
        records = []
        for place in busy:
            assert place.worker is not None and place.job is not None
            if not place.job.is_placed:
                place.job.is_placed = True
                listener.placed(place.job.identity.uid, place.text)
            if place.worker.control in readable:
                found = place.hear(listener)
            elif time.monotonic() - place.job.began_s > TRIAL_S:
                found = place.lose(f"was silent for {TRIAL_S / 3600:.0f} h")
            else:
                continue
            records += [] if found is None else [found]
        return records

    def cancel(self) -> None:
        """Ends the workers that measure; the engine of a trial dies with its worker."""
        for place in self._seats:
            if place.job is not None:
                place.end_worker()
                place.job = None

    def close(self) -> None:
        self.cancel()
        for place in self._seats:
            if place.worker is not None:
                place.worker.dismiss()
        for place in self._seats:
            place.end_worker(wait_s=_END_S)

    @property
    def pids(self) -> list[int]:
        """Of the workers that run."""
        return [place.worker.pid for place in self._seats if place.worker is not None and place.worker.is_running]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Job:
    def __init__(self, identity: TrialIdentity, config: EngineConfig) -> None:
        self.identity, self.config = identity, config
        self.began_s = time.monotonic()
        self.since = datetime.now(UTC).isoformat(timespec="seconds")
        self.is_placed = False


class _Place:
    """A seat, its worker and what that has to do."""

    def __init__(self, seat: Seat) -> None:
        self.seat = seat
        self.worker: _Worker | None = None
        self.job: _Job | None = None

    @property
    def text(self) -> str:
        """Where it is, and who works there, if anybody does yet."""
        if self.worker is None or not self.worker.is_running:
            return str(self.seat)
        return f"worker {self.worker.pid}, {self.seat}"

    def replace_worker(self, order: Order) -> None:
        self.end_worker()
        self.worker = _Worker(order, self.seat)

    def hear(self, listener: Listener) -> TrialRecord | None:
        """Takes in what the worker has said. Returns the trial's record when it has ended."""
        assert self.worker is not None and self.job is not None
        lines = self.worker.read()
        if lines is None:
            return self.lose(f"ended ({self.worker.end()})")
        for line in lines:
            message = json.loads(line)
            if message["event"] == "record":
                self.job = None
                return TrialRecord.from_json(message["json"])
            listener.phase(self.job.identity.uid, message["name"], message["fraction"])
        return None

    def lose(self, why: str) -> TrialRecord:
        assert self.worker is not None and self.job is not None
        job, self.job = self.job, None
        pid = self.worker.pid
        self.end_worker()
        return lost(job.identity, job.config, f"its worker ({pid}, on {self.seat}) {why}", job.since)

    def end_worker(self, wait_s: float = 0.0) -> None:
        if self.worker is not None:
            self.worker.close(wait_s)
            self.worker = None


class _Worker:
    """One process."""

    def __init__(self, order: Order, seat: Seat) -> None:
        self.control, theirs = socket.socketpair()
        self._unread = b""
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `close`
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}
        if seat.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(seat.gpus)
        cores = ",".join(str(core) for core in seat.cores)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "codesign.search.worker", str(theirs.fileno()), str(os.getpid()), cores],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at a terminal is for the search to handle
                env=environment,
            )
        self.pid = self._process.pid
        self.ask(order.to_json())

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def ask(self, line: str) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended; `read` will find out
            self.control.sendall(line.encode() + b"\n")

    def read(self) -> list[bytes] | None:
        """Whole lines that have come, maybe none; None when the worker is gone."""
        try:
            chunk = self.control.recv(2**20)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            return None
        *lines, self._unread = (self._unread + chunk).split(b"\n")
        return lines

    def end(self) -> str:
        """How it ended, with the last line of what it wrote."""
        try:
            status = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it closed its socket"
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        self._stderr.seek(max(self._stderr.seek(0, os.SEEK_END) - 2000, 0))
        last = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
        return ": ".join([how, *last])

    def dismiss(self) -> None:
        """There is no more to do: it ends its nursery and itself."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)

    def close(self, wait_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
        self._process.kill()
        self._process.wait()
        self.control.close()
        self._stderr.close()

"""Nursery: the search process's hold on the process that forks the engines' processes (see nursery_process).

    nursery = Nursery()
    fork = nursery.fork(channel_fd, stderr_fd, data_limit_bytes=None)    # starts the nursery when there is none
    fork.send_signal(SIGTERM); fork.kill(); fork.exit                    # how it ended, once nothing of it is left
    nursery.close()

One thread uses a nursery and the sessions on it. A nursery that died is started again once per fork; the sessions that
it took along are the harness's fault, since the kernel's word on how their processes ended went with it.
"""

import contextlib
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import IO, Any, Self, TypeVar

from codesign.errors import Unsupported
from codesign.measure import linux
from codesign.measure.packets import receive_packet, send_packet
from codesign.measure.session import TrialFailed
from codesign.measure.taxonomy import Exit
from codesign.results.record import Outcome

T = TypeVar("T")

ENGINE_MODULES = ("torch", "codesign.engine.build", "codesign.measure.quality")
# In the environment of all that comes from a nursery: whose it is (pid namespace, pid, start time) and a nonce.
_MARKER = "CODESIGN_NURSERY"
_START_S = 120.0
_ANSWER_S = 15.0
_END_S = 10.0


class _NurseryDied(Exception):
    """The text says how."""


class Nursery:
    """Args:
    preload: modules that the nursery imports before it forks.
    """

    def __init__(self, *, preload: Sequence[str] = ENGINE_MODULES) -> None:
        if sys.platform != "linux":
            raise Unsupported(f"measuring needs Linux (pidfd, /proc, prctl); this is {sys.platform}")
        self._preload = tuple(preload)
        self._process: _Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the nursery that runs now, or None."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process unless one runs, which takes as long as importing `preload`.

        Raises:
            TrialFailed: `harness`, when it does not come up in two attempts.
        """
        self._try_twice(lambda process: process)

    def fork(self, channel: int, stderr: int, *, data_limit_bytes: int | None) -> "Fork":
        """A fresh child that speaks over `channel`; both descriptors are copied, the caller closes its own.

        Raises:
            TrialFailed: `harness`: the nursery died twice, or must not be forked any more.
        """
        return self._try_twice(lambda process: process.fork(channel, stderr, data_limit_bytes))

    def _try_twice(self, action: Callable[["_Process"], T]) -> T:
        for is_last in (False, True):
            try:
                if self._process is None or self._process.is_dead():
                    if self._process is not None:
                        self._process.destroy()
                    self._process = _Process(self._preload)
                return action(self._process)
            except _NurseryDied as death:
                if is_last:
                    raise TrialFailed(Outcome(kind="harness", detail=f"the nursery died twice: {death}")) from None
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Ends the nursery and everything below it."""
        if self._process is not None:
            self._process.close()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """One run of the nursery process."""

    def __init__(self, preload: Sequence[str]) -> None:
        _bury_the_abandoned()
        self._marker = f"{_search_name(os.getpid())}-{os.urandom(8).hex()}"
        self._ids = itertools.count()
        self._answers: dict[int, tuple[dict[str, Any], list[int]]] = {}
        self._exits: dict[int, tuple[Exit, list[int]]] = {}
        self._is_ready = False
        self.is_known_dead = False
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `destroy`
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid())]
        with theirs:
            self._popen = subprocess.Popen(
                # -P and our own sys.path: it imports what we would import, and nothing from the folder it stands in
                [sys.executable, "-P", "-m", "codesign.measure.nursery_process", *arguments, *preload],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C at a terminal is for the search process to handle
                env={**os.environ, **_environment(self._marker)},
            )
        self.pid = self._popen.pid
        try:
            self._wait(lambda: self._is_ready, _START_S, "did not come up")
        except BaseException:
            self.destroy()
            raise

    def fork(self, channel: int, stderr: int, data_limit_bytes: int | None) -> "Fork":
        child_id = next(self._ids)
        command = {"op": "fork", "id": child_id, "data_limit_bytes": data_limit_bytes}
        self._send(command, [channel, stderr])
        self._wait(lambda: child_id in self._answers, _ANSWER_S, "did not answer")
        answer, descriptors = self._answers.pop(child_id)
        if answer["event"] == "refused":
            raise TrialFailed(Outcome(kind="harness", detail=answer["detail"]))
        return Fork(self, child_id, answer["pid"], descriptors[0])

    def kill(self, child_id: int) -> None:
        with contextlib.suppress(_NurseryDied):
            self._send({"op": "kill", "id": child_id}, [])

    def exit(self, child_id: int) -> tuple[Exit, list[int]] | None:
        return self._exits.get(child_id)

    def is_dead(self) -> bool:
        self.pump()
        return self.is_known_dead

    def pump(self) -> None:
        """Takes in everything that the nursery has said; never blocks."""
        while not self.is_known_dead:
            try:
                received = receive_packet(self.control, block=False)
            except BlockingIOError:
                return
            if received is None:
                self.is_known_dead = True
                return
            message, descriptors = received
            match message.pop("event"):
                case "ready":
                    self._is_ready = True
                case "exited":
                    child_id, left = message.pop("id"), message.pop("left")
                    self._exits[child_id] = (Exit(**message), left)
                case event:
                    self._answers[message["id"]] = ({**message, "event": event}, descriptors)

    def _send(self, command: dict[str, Any], descriptors: list[int]) -> None:
        try:
            send_packet(self.control, command, descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self.is_known_dead = True
            raise _NurseryDied(self._death()) from None

    def _wait(self, condition: Callable[[], bool], seconds: float, complaint: str) -> None:
        deadline = time.monotonic() + seconds
        while True:
            self.pump()
            if condition():
                return
            if self.is_known_dead:
                raise _NurseryDied(self._death())
            if (left := deadline - time.monotonic()) <= 0:
                self.destroy()
                raise _NurseryDied(f"{complaint} within {seconds:.0f} s")
            select.select([self.control], [], [], left)

    def _death(self) -> str:
        """How it ended, with the end of what it wrote."""
        try:
            status = self._popen.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it closed its control socket and lives on"
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        if self._stderr.closed:
            return f"ended by {how}"
        self._stderr.seek(max(self._stderr.seek(0, os.SEEK_END) - 2000, 0))
        return f"ended by {how}: {self._stderr.read().decode(errors='replace').strip()}"

    def close(self) -> None:
        """Asks it to end everything and itself, and makes sure."""
        with contextlib.suppress(OSError):
            self.control.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(_END_S)
        self.destroy()

    def destroy(self) -> bool:
        """Kills it and everything that ever came from it; returns whether nothing is left. May be called again."""
        self.is_known_dead = True
        self._popen.kill()
        self._popen.wait()
        for _, descriptors in self._answers.values():
            for descriptor in descriptors:
                os.close(descriptor)
        self._answers.clear()
        self._stderr.close()
        self.control.close()
        # Its children die with it; what those had detached went to init, and is known by what it inherited.
        return linux.kill_by_environment(_MARKER, lambda value: value == self._marker, timeout_s=_END_S)


class Fork:
    """One child. `exit` is known when the child and everything that it started are gone.

    Attributes:
        pid: of the child; `pidfd` holds it, so that no signal can reach another process.
    """

    def __init__(self, process: _Process, child_id: int, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._process = process
        self._id = child_id
        self._pidfd = pidfd

    def fileno(self) -> int:
        """Readable when there may be news; then call `pump`."""
        return self._process.control.fileno()

    def pump(self) -> None:
        self._process.pump()

    @property
    def exit(self) -> Exit | None:
        end = self._process.exit(self._id)
        return None if end is None else end[0]

    @property
    def left(self) -> list[int]:
        """Process ids that did not go although they were killed; empty when all is well."""
        end = self._process.exit(self._id)
        return [] if end is None else end[1]

    @property
    def is_abandoned(self) -> bool:
        """Whether the nursery died first, so that `exit` will never be known. As of the last `pump`."""
        return self.exit is None and self._process.is_known_dead

    def send_signal(self, number: int) -> None:
        """To the child alone; nothing happens when it has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """SIGKILL for the child, its group and what it detached; `exit` tells when it is done."""
        self._process.kill(self._id)

    def destroy_nursery(self) -> bool:
        """The last resort: kills the nursery with everything that came from it; returns whether nothing is left."""
        return self._process.destroy()

    def close(self) -> None:
        os.close(self._pidfd)


def _bury_the_abandoned() -> None:
    """Kills what is left of nurseries whose search process is gone.

    A killed search process takes its nursery along, and that everything else. Only when both were killed at once can
    something that an engine detached live on; the next nursery finds it here.
    """

    def is_abandoned(marker: str) -> bool:
        search, _, _ = marker.rpartition("-")
        match search.split("-"):
            case [namespace, pid, _] if pid.isdigit() and namespace == linux.pid_namespace():
                return search != _search_name(int(pid))
        return False

    linux.kill_by_environment(_MARKER, is_abandoned, timeout_s=_END_S)


def _search_name(pid: int) -> str:
    return f"{linux.pid_namespace()}-{pid}-{linux.start_time(pid)}"


def _environment(marker: str) -> dict[str, str]:
    return {
        _MARKER: marker,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        # numpy's OpenBLAS starts its threads when it is imported; the engine's ops run in torch, not there
        "OPENBLAS_NUM_THREADS": "1",
    }

"""The nursery: a single-threaded process that has imported torch and the engine, runs no op, and forks the children.

    search process ──control socket──> nursery ──fork──> child      (0.13 s instead of the 2 s of a fresh import)
          └──────────── one socketpair and one stderr pipe per child ───┘

It is the parent of every child, so it is the one that hears how they end, and the one that makes sure that nothing of
them is left: their process group, and whatever they detached, which comes back to it because it is a child subreaper.
It ends, and takes everything along, when the search process ends in whatever way.

Forking is safe only from one thread and without a CUDA context (forking after a parallel op hangs), so both are checked
before every fork and a fork is refused otherwise.

Control messages are JSON, one per packet, both sides ours:
    in   {"op":"fork","id":n,"data_limit_bytes":int|null} + [channel, stderr]      {"op":"kill","id":n}
    out  {"event":"ready"}  {"event":"forked","id":n,"pid":p} + [pidfd]  {"event":"refused","id":n,"detail":""}
         {"event":"exited","id":n,"status":int|null,"signal":int|null,"peak_rss_bytes":n,"left":[pid, ...]}
"""

import contextlib
import gc
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

from codesign.measure import linux
from codesign.measure.child import run_child
from codesign.measure.packets import receive_packet, send_packet

_SWEEP_S = 5.0
_MANAGED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


class _NurseryProcess:
    def __init__(self, control: socket.socket, search_pidfd: int) -> None:
        self._control = control
        self._search_pidfd = search_pidfd
        self._wake_read, self._wake_write = socket.socketpair()
        self._children: dict[int, int] = {}  # id -> pid
        self._is_stopping = False
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        for number in _MANAGED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._is_stopping = self._is_stopping or number != signal.SIGCHLD

    def serve(self) -> None:
        """Until the search process closes the control socket or ends; then nothing of ours is left running."""
        self._tell({"event": "ready"})
        poller = select.poll()
        for descriptor in (self._control.fileno(), self._search_pidfd, self._wake_read.fileno()):
            poller.register(descriptor, select.POLLIN)
        while not self._is_stopping:
            ready = {descriptor for descriptor, _ in poller.poll()}
            if self._wake_read.fileno() in ready:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
                self._reap()
            if self._control.fileno() in ready:
                self._obey()
            if self._search_pidfd in ready:
                self._is_stopping = True
        for pid in self._children.values():
            _kill_group(pid)
        self._sweep(keep=set())

    def _tell(self, message: dict[str, Any], *descriptors: int) -> None:
        try:
            send_packet(self._control, message, descriptors)
        except (BrokenPipeError, ConnectionResetError):
            self._is_stopping = True

    def _obey(self) -> None:
        received = receive_packet(self._control, block=True)
        if received is None:
            self._is_stopping = True
            return
        command, descriptors = received
        try:
            if command["op"] == "fork":
                self._fork(command["id"], command["data_limit_bytes"], *descriptors)
            elif (pid := self._children.get(command["id"])) is not None:
                _kill_group(pid)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _fork(self, child_id: int, data_limit_bytes: int | None, channel: int, stderr: int) -> None:
        if (reason := unsafe_to_fork()) is not None:
            self._tell({"event": "refused", "id": child_id, "detail": reason})
            return
        signal.pthread_sigmask(signal.SIG_BLOCK, _MANAGED)  # until the child has its own handlers
        nursery_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                self._forget_everything()
                end = socket.socket(fileno=channel)
                run_child(end, stderr, nursery_pid=nursery_pid, data_limit_bytes=data_limit_bytes)
            finally:
                os._exit(1)  # never back into the nursery's loop
        with contextlib.suppress(OSError):  # the child does the same: whoever comes first
            os.setpgid(pid, pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _MANAGED)
        self._children[child_id] = pid
        pidfd = os.pidfd_open(pid)
        self._tell({"event": "forked", "id": child_id, "pid": pid}, pidfd)
        os.close(pidfd)

    def _forget_everything(self) -> None:
        """In the child: nothing of the nursery may be reached from here, least of all its control socket."""
        signal.set_wakeup_fd(-1)
        for number in _MANAGED:
            signal.signal(number, signal.SIG_DFL)
        for end in (self._control, self._wake_read, self._wake_write):
            end.close()
        os.close(self._search_pidfd)

    def _reap(self) -> None:
        """Reports every child that has ended, after everything that it started is gone; buries unknown orphans."""
        ids = {pid: child_id for child_id, pid in self._children.items()}
        while (ended := _peek()) is not None:
            child_id = ids.get(ended.si_pid)
            if child_id is None:
                os.waitpid(ended.si_pid, 0)
                continue
            _kill_group(ended.si_pid)
            _, _, usage = os.wait4(ended.si_pid, 0)
            del self._children[child_id]
            left = self._sweep(keep=set(self._children.values()))
            by_signal = ended.si_code != os.CLD_EXITED
            self._tell(
                {
                    "event": "exited",
                    "id": child_id,
                    "status": None if by_signal else ended.si_status,
                    "signal": ended.si_status if by_signal else None,
                    "peak_rss_bytes": usage.ru_maxrss * 1024,
                    "left": sorted(left),
                }
            )

    def _sweep(self, keep: set[int]) -> set[int]:
        """Kills our children that are not in `keep`, and theirs, which become ours. Returns those that did not go.

        An orphan of a session that is still open goes too: what an engine starts must not outlive its parent.
        """
        deadline = time.monotonic() + _SWEEP_S
        while orphans := linux.children_of(os.getpid()) - keep:
            for pid in orphans:
                with contextlib.suppress(PermissionError):  # it became another user's: reported as left
                    os.kill(pid, signal.SIGKILL)  # ours and not reaped, so the number is still its own
            for pid in orphans:
                os.waitpid(pid, os.WNOHANG)
            if time.monotonic() > deadline:
                return orphans
            time.sleep(0.001)
        return set()


def _kill_group(pid: int) -> None:
    """Kills a child and its group. Nobody but us reaps it, so neither number can belong to somebody new."""
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # it moved itself elsewhere
        os.killpg(pid, signal.SIGKILL)


def unsafe_to_fork() -> str | None:
    """Why this process must not be forked now, or None."""
    if (count := linux.num_threads()) != 1:
        return f"the nursery has {count} threads; a fork of it could hang"
    torch = sys.modules.get("torch")
    if linux.has_device_open() or (torch is not None and torch.cuda.is_initialized()):
        return "the nursery has a CUDA context; a fork of it could not use the device"
    return None


def _peek() -> "os.waitid_result | None":
    """A child that has ended and is not reaped yet; it stays so."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None


def main() -> None:
    """`python -m codesign.measure.nursery_process CONTROL_FD SEARCH_PID MODULE...`, started by measure.nursery only."""
    control_fd, search_pid, *modules = sys.argv[1:]
    # While it imports it cannot watch. The thread that started it waits for `ready`, so the signal means the process.
    linux.set_parent_death_signal(signal.SIGKILL)
    search_pidfd = os.pidfd_open(int(search_pid))
    if os.getppid() != int(search_pid):
        sys.exit("the search process has ended")
    linux.become_child_subreaper()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=int(control_fd))
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # the children's collector leaves these pages alone, so they stay shared
    nursery = _NurseryProcess(control, search_pidfd)
    # From here on it is the search process that is watched, not the thread that happened to start the nursery.
    linux.set_parent_death_signal(0)
    nursery.serve()


if __name__ == "__main__":
    main()

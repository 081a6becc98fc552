"""The few things that only Linux tells or does, and Python has no name for: process control and /proc."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def set_parent_death_signal(number: int) -> None:
    """Has the kernel send `number` to this process when the thread that started it ends; 0 takes it back.

    A parent that ended before the call is not noticed: compare `os.getppid()` afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def become_child_subreaper() -> None:
    """Orphaned descendants of this process become its children instead of init's, however they were detached."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}, {value}) failed")


def num_threads() -> int:
    """Threads of this process, those of C libraries included."""
    return len(os.listdir("/proc/self/task"))


def has_device_open() -> bool:
    """Whether this process holds an NVIDIA device, as every process with a CUDA context does."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{entry}").startswith("/dev/nvidia"):
                return True
        except OSError:  # the descriptor that listed the folder
            continue
    return False


def children_of(parent: int) -> set[int]:
    """Process ids whose parent is `parent`, zombies included."""
    found = set()
    for pid in _pids():
        with contextlib.suppress(OSError):  # gone meanwhile
            if int(_stat_fields(pid)[1]) == parent:
                found.add(pid)
    return found


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot, or None when it has ended; pid and start name one process."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])


def pid_namespace() -> str:
    """The namespace in which our process ids count: a container on this machine has another."""
    return os.readlink("/proc/self/ns/pid").strip("pid:[]")


def environment_entry(pid: int, name: str) -> str | None:
    """The value that `name` had when the process, or the one it was forked from, was started; None if unreadable."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, a zombie, or another user's
        return None
    prefix = name.encode() + b"="
    return next((entry[len(prefix) :].decode(errors="replace") for entry in entries if entry.startswith(prefix)), None)


def kill_by_environment(name: str, is_wanted: Callable[[str], bool], *, timeout_s: float) -> bool:
    """Kills every other process whose value of `name` is wanted; whether none is left after at most `timeout_s`."""

    def matches(pid: int) -> bool:
        value = environment_entry(pid, name)
        return value is not None and is_wanted(value)

    deadline = time.monotonic() + timeout_s
    while found := [pid for pid in _pids() if pid != os.getpid() and matches(pid)]:
        for pid in found:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if matches(pid):  # still that process, now that it is held: its number may have been reused
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _stat_fields(pid: int) -> list[bytes]:
    """Fields of /proc/PID/stat from `state` on; the name before it may hold anything, parentheses too."""
    stat = Path(f"/proc/{pid}/stat").read_bytes()
    return stat[stat.rindex(b")") + 2 :].split()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]

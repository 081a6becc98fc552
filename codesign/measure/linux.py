"""The few things that only Linux tells or does, and Python has no name for: process control and /proc."""

import ctypes
import os
import signal
import time
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
        try:
            stat = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            continue
        # "pid (name) state ppid ...": the name may hold anything, parentheses too
        if int(stat[stat.rindex(b")") + 2 :].split()[1]) == parent:
            found.add(pid)
    return found


def processes_with_environment(entry: str) -> set[int]:
    """Other live processes that were started with `entry` ("NAME=value") in their environment, or forked from one."""
    return {pid for pid in _pids() if pid != os.getpid() and _carries(pid, entry)}


def kill_by_environment(entry: str, *, timeout_s: float) -> bool:
    """Kills every process that carries `entry`; returns whether none is left after at most `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while found := processes_with_environment(entry):
        for pid in found:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            try:
                if _carries(pid, entry):  # still that process, now that it is held: its number may have been reused
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
            finally:
                os.close(pidfd)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _carries(pid: int, entry: str) -> bool:
    try:
        return entry.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # gone, a zombie, or another user's
        return False


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]

"""The processes of ranks: started by rank 0, in its process group, gone when it is.

A rank is a fork where that is safe (one thread, no CUDA context: a child of the nursery before its first operation),
and a new interpreter where it is not. Either dies with rank 0 (parent-death signal) and says over a pipe of its own
why it failed, if it still can.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch

from codesign.engine.parallel.failure import Disconnected, RankDied, raise_report, report_of

_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 5.0  # for those that fail because another has failed
_END_S = 5.0
_POLL_S = 0.002
_DISCONNECTED = 75  # exit status of a rank that only lost another one


class RankProcess:
    """One rank other than 0.

    Args:
        report: reading end of its pipe.
    """

    def __init__(self, rank: int, pid: int, report: int) -> None:
        self.rank, self.pid = rank, pid
        self._report = report
        self._status: int | None = None

    def has_ended(self) -> bool:
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    @property
    def signal(self) -> int | None:
        """What ended it, if a signal did."""
        return os.WTERMSIG(self._status) if self._status is not None and os.WIFSIGNALED(self._status) else None

    @property
    def status(self) -> int | None:
        """What it ended with, unless a signal ended it."""
        return os.WEXITSTATUS(self._status) if self._status is not None and os.WIFEXITED(self._status) else None

    def report(self) -> dict[str, str] | None:
        """What it said, once it has ended."""
        data = b""
        while chunk := os.read(self._report, 65536):
            data += chunk
        return json.loads(data) if data else None

    def kill(self) -> None:
        """Ends it, unless it has ended, and waits until it is gone."""
        if not self.has_ended():
            os.kill(self.pid, signal.SIGKILL)  # not reaped, so the number is still its own
            _, self._status = os.waitpid(self.pid, 0)

    def close(self) -> None:
        os.close(self._report)


class Processes:
    """Those of all ranks but 0."""

    def __init__(self, ranks: list[RankProcess]) -> None:
        self.ranks = ranks

    def raise_failure(self) -> None:
        """Raises why ranks failed, the cause rather than what followed from it; returns when none has failed.

        To be called when one cannot be reached: waits a moment until it is known which.
        """
        deadline = time.monotonic() + _LAST_WORDS_S
        while not (causes := [rank for rank in self.ranks if rank.has_ended() and rank.status != _DISCONNECTED]):
            if time.monotonic() > deadline:
                return
            time.sleep(_POLL_S)
        self.kill()
        for rank in causes:
            if rank.signal is not None:
                raise RankDied(rank.rank, rank.signal)
        rank = causes[0]
        if (report := rank.report()) is not None:
            raise_report(rank.rank, report)
        raise RuntimeError(f"rank {rank.rank} ended with status {rank.status} and said nothing")

    def end(self) -> None:
        """Waits a little for ranks that were told to end, and kills those that have not."""
        deadline = time.monotonic() + _END_S
        while not all(rank.has_ended() for rank in self.ranks) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.kill()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def close(self) -> None:
        self.kill()
        for rank in self.ranks:
            rank.close()
        self.ranks = []


def start(job: Mapping[str, Any], ranks: Iterable[int], run: Callable[[Mapping[str, Any]], None]) -> Processes:
    """These ranks.

    Args:
        job: plain data; each rank gets it with its own `rank`.
        run: what a rank does with it. In a new interpreter `codesign.engine.parallel.worker` calls the same.
    """
    started: list[RankProcess] = []
    try:
        for rank in ranks:
            own = {**job, "rank": rank, "parent": os.getpid()}
            started.append(_fork(own, run) if _is_safe_to_fork() else _spawn(own))
    except BaseException:
        Processes(started).close()
        raise
    return Processes(started)


def _is_safe_to_fork() -> bool:
    return len(os.listdir("/proc/self/task")) == 1 and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


def _fork(job: Mapping[str, Any], run: Callable[[Mapping[str, Any]], None]) -> RankProcess:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _close_all_but(theirs)
            be_rank(job, theirs, run)
        finally:
            os._exit(1)
    os.close(theirs)
    return RankProcess(job["rank"], pid, ours)


def _spawn(job: Mapping[str, Any]) -> RankProcess:
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    arguments = [sys.executable, "-P", "-m", "codesign.engine.parallel.worker", str(theirs), json.dumps(job)]
    paths = os.pathsep.join(os.path.abspath(path) for path in sys.path)
    try:
        pid = os.posix_spawn(sys.executable, arguments, {**os.environ, "PYTHONPATH": paths})
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)
    return RankProcess(job["rank"], pid, ours)


def be_rank(job: Mapping[str, Any], report: int, run: Callable[[Mapping[str, Any]], None]) -> NoReturn:
    """What the process of a rank does, from its start to its end."""
    status = 1
    try:
        _die_with(job["parent"])
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is rank 0 that is interrupted
        run(job)
        status = 0
    except Disconnected:
        status = _DISCONNECTED  # whoever failed says why
    except BaseException as error:
        os.write(report, json.dumps(report_of(error)).encode())
    finally:
        sys.stderr.flush()
        os._exit(status)


def _die_with(parent: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def _close_all_but(kept: int) -> None:
    """In a fork: what rank 0 holds open, its channel to the trial first of all, is none of a rank's business."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):  # what listed the folder
                os.close(int(name))


def cores_of(rank: int, num_ranks: int, *, num_threads: int | None) -> list[int]:
    """The cores of one rank: an equal share of the first `num_threads` that this process may use; where there are
    fewer cores than ranks, one that it shares."""
    cores = sorted(os.sched_getaffinity(0))[:num_threads]
    each = len(cores) // num_ranks
    return cores[rank * each : (rank + 1) * each] if each else [cores[rank * len(cores) // num_ranks]]


def device_of(device: str, rank: int) -> torch.device:
    """cuda:N + rank; a CPU is one device for all."""
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(device.partition(":")[2] or 0) + rank)

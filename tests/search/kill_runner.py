"""Runs searches to be killed: imports once, then forks one search per line of JSON on stdin.

    {"out", "trials", "seconds", "die_at", "die_after", "deaf"}
    ->  "pid N", "acked UID" per finished trial, "exit CODE"

A search measures through a fake nursery: a process that forks one child per trial, which sleeps and answers over a
pipe. Both die with their parent. `die_at` names the step at which the search kills itself, on its `die_after`-th turn.
"""

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy

from codesign.results import files
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search import folder_store, storage
from codesign.search import lease as leases
from codesign.search.interrupt import Interrupt
from codesign.search.limits import Limits
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import OnPhase, record_of
from tests.search.studies import Heard, run_study, space_of

SPACE = "max_batch_size: {low: 1, high: 64}\nmax_step_tokens: {low: 128, high: 2048, step: 128}\n"
_PR_SET_PDEATHSIG = 1

# What is wrapped for a named crash point: (owner, attribute, "before" or "after" the call).
CRASH_POINTS: dict[str, tuple[Any, str, str]] = {
    "before_lease": (leases, "write", "before"),
    "after_lease": (folder_store.FolderStore, "claim", "after"),
    "before_record": (folder_store, "write_record", "before"),
    "before_rename": (files.os, "rename", "before"),
    "after_record": (folder_store, "write_record", "after"),
    "in_index": (storage, "add_trials", "after"),
    "after_index": (folder_store.FolderStore, "abandon", "before"),
    "in_rebuild": (storage.Index, "close", "before"),
    "before_commit": (None, "commit", "before"),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str, turn: int) -> None:
    """Makes the process kill itself at a named point, the `turn`-th time it comes by."""
    owner, name, when = CRASH_POINTS[point]
    left = [turn]

    def count() -> None:
        left[0] -= 1
        if left[0] <= 0:
            die()

    if owner is None:
        sqlalchemy.event.listen(sqlalchemy.Engine, "commit", lambda connection: count())
        return
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            count()
        result = original(*arguments, **named)
        if when == "after":
            count()
        return result

    setattr(owner, name, wrapped)


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def measure(identity: TrialIdentity, config: EngineConfig, seconds: float) -> TrialRecord:
    """Lets a fake nursery fork a child that sleeps; whichever of the two is killed, the trial was killed."""
    reading, writing = os.pipe()
    nursery = os.fork()
    if nursery == 0:
        die_with_parent()
        child = os.fork()
        if child == 0:
            die_with_parent()
            time.sleep(seconds)
            os.write(writing, b"ok")
            os._exit(0)
        os.waitpid(child, 0)
        os._exit(0)
    os.close(writing)
    answer = os.read(reading, 2)
    os.close(reading)
    os.waitpid(nursery, 0)
    return record_of(identity, config, "ok" if answer == b"ok" else "killed_by_os", seconds=seconds)


class Acknowledging(Heard):
    """Says on stdout which trials it has been told of: these must never be lost."""

    def finished(self, record: TrialRecord) -> None:
        os.write(1, f"acked {record.uid}\n".encode())


def search(order: dict[str, Any]) -> None:
    if order.get("die_at"):
        arm(order["die_at"], order.get("die_after", 1))
    out = Path(order["out"])

    def fake(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        try:
            return measure(identity, config, order["seconds"])
        except KeyboardInterrupt:
            if order.get("deaf"):  # a session that takes its time to close
                time.sleep(60)
            raise

    interrupt = Interrupt()
    with interrupt.installed():
        run_study(
            out,
            space_of(out, SPACE),
            measure=fake,
            heard=Acknowledging(),
            limits=Limits(trials=order["trials"]),
            interrupt=interrupt,
            write_report=lambda: (out / "report").write_text("written"),
        )
    os._exit(interrupt.exit_status if interrupt.signal_number else 0)


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    die_with_parent()
    with tempfile.TemporaryDirectory() as folder:  # imports what a search imports late, before the first fork
        run_study(Path(folder), space_of(Path(folder), SPACE), limits=Limits(trials=2))
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            try:
                search(order)
            except BaseException as error:
                sys.stderr.write(f"{type(error).__name__}: {error}\n")
                os._exit(3)
            os._exit(0)
        os.write(1, f"pid {pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        os.write(1, f"exit {os.waitstatus_to_exitcode(status)}\n".encode())


if __name__ == "__main__":
    main()

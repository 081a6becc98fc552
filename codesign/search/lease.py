"""Worker leases: who holds a study's running trial, and whether that process still lives.

A lease is a small document that exists before a trial is asked for: a file `leases/<worker>.json` in a study's folder,
a column beside the trial in a database. Optuna's own heartbeat misses trials that die before their first beat, and
exists only inside `optimize()`. Here a worker is dead when its process is gone: same boot, same pid, same start time
means alive, anything else is dead, so a reused pid or a rebooted machine never keeps a dead trial running.
"""

import contextlib
import dataclasses
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from codesign.measure import linux

HEARD_S = 120.0  # leases of other machines are written again by each search that hears of them
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """Attributes:
    worker: names the file; new for every process that searches, and for every trial that it holds.
    pid_namespace: in which `pid` counts; containers of one machine have their own.
    pid_start_ticks: start time of the process in clock ticks since boot; with the pid it names one process.
    uid: of the record that the trial in hand will write; "" between trials.
    number, attempt, config: of that trial; `config` as plain data.
    place: where it is measured, for a person: "cores 0-3", "GPU-5d3f...".
    since: when it began, UTC, ISO 8601.
    """

    worker: str
    host: str
    boot_id: str
    pid_namespace: str = ""
    pid: int
    pid_start_ticks: int
    uid: str = ""
    number: int = -1
    attempt: int = 0
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    place: str = ""
    since: str = ""

    @property
    def is_here(self) -> bool:
        """Whether its process would be one that we can see."""
        return self.host == socket.gethostname() and self.pid_namespace in ("", linux.pid_namespace())

    @property
    def is_alive(self) -> bool:
        """Whether the process that wrote this still runs; where we cannot look, it counts as alive."""
        if not self.is_here:
            return True
        return self.boot_id == _boot_id() and start_ticks(self.pid) == self.pid_start_ticks

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises ValueError or TypeError when the text is not a lease."""
        plain: Any = json.loads(text)
        if not isinstance(plain, dict):
            raise ValueError("a lease is a mapping")
        return cls(**plain)


def new() -> Lease:
    """A lease of this process."""
    return Lease(
        worker=uuid.uuid4().hex[:12],
        host=socket.gethostname(),
        boot_id=_boot_id(),
        pid_namespace=linux.pid_namespace(),
        pid=os.getpid(),
        pid_start_ticks=start_ticks(os.getpid()) or 0,
    )


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[Lease]:
    """This process's lease, written for as long as the block runs. Raises OSError when it cannot be written."""
    lease = new()
    write(folder, lease)
    try:
        yield lease
    finally:
        drop(folder, lease)


def drop(folder: Path, lease: Lease) -> None:
    """Takes a lease back; nothing happens when it is gone."""
    (folder / f"{lease.worker}.json").unlink(missing_ok=True)


def write(folder: Path, lease: Lease) -> None:
    """Atomic for readers; not fsynced, because after a power cut the boot id has changed and every lease is dead."""
    path = folder / f"{lease.worker}.json"
    part = path.with_suffix(".part")
    part.write_text(lease.to_json())
    os.replace(part, path)


def touch(folder: Path, lease: Lease) -> None:
    """Says that a lease was heard of just now; it is written again where somebody removed it."""
    try:
        os.utime(folder / f"{lease.worker}.json")
    except FileNotFoundError:
        write(folder, lease)


def sweep(folder: Path) -> tuple[Lease, ...]:
    """Leases of living workers; those of dead ones, and files that are no lease, are removed."""
    living = []
    for path in sorted(folder.glob("*.json")):
        try:
            lease = Lease.from_json(path.read_text())
        except (ValueError, TypeError):
            path.unlink(missing_ok=True)
            continue
        if lease.is_alive:
            living.append(lease)
        else:
            path.unlink(missing_ok=True)
    for part in folder.glob("*.part"):
        if part.stem not in {lease.worker for lease in living}:
            part.unlink(missing_ok=True)
    return tuple(living)


def running_in(folder: Path) -> tuple[Lease, ...]:
    """What is measured now, by number, for a reader: of processes that live here, or that were heard of lately."""
    found = []
    for path in folder.glob("*.json"):
        try:
            lease, heard_s = Lease.from_json(path.read_text()), path.stat().st_mtime
        except (OSError, ValueError, TypeError):  # gone meanwhile, or no lease
            continue
        if lease.uid and lease.is_alive and (lease.is_here or time.time() - heard_s < HEARD_S):
            found.append(lease)
    return tuple(sorted(found, key=lambda lease: (lease.number, lease.attempt)))


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None when there is none or it is a zombie."""
    try:
        # The command in parentheses may hold anything, so count fields from the last parenthesis.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()

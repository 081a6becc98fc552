"""What a worker has for itself: cores, and on CUDA also GPUs. No two workers of a machine share any.

Cores that are two threads of one physical core go to the same worker, as far as the counts allow.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from codesign.errors import InputError, WorkError
from codesign.measure.monitor import gpus
from codesign.measure.provenance import core_ranges
from codesign.measure.turn import open_lock
from codesign.spec.hardware import Hardware

_TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclasses.dataclass(frozen=True)
class Seat:
    """Attributes:
    cores: numbers as the kernel counts them.
    gpus: UUIDs.
    """

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ", ".join(self.gpus) or f"cores {core_ranges(self.cores)}"


def seats_of(hardware: Hardware, count: int) -> list[Seat]:
    """Seats for `count` workers.

    On CUDA a worker has as many GPUs as the profile's `hardware.count` and an equal share of the cores. On a processor
    it has the profile's `hardware.cores`, or an equal share where the profile leaves them open.

    Raises:
        InputError: this machine has not that much.
    """
    cores, devices = ordered_cores(), [str(gpu["uuid"]) for gpu in gpus()] if hardware.device == "cuda" else []
    each = len(cores) // count
    if hardware.device == "cpu" and hardware.cores is not None:
        each = min(hardware.cores, len(cores)) if count == 1 else hardware.cores
    if each * count > len(cores) or each == 0:
        most = len(cores) // max(1, hardware.cores or 1)
        raise InputError(
            f"{count} workers need {count * max(each, 1)} cores, here are {len(cores)}; at most {most} fit",
            key="--workers",
        )
    wanted = hardware.count if hardware.device == "cuda" else 0
    if wanted * count > len(devices):
        raise InputError(
            f"{count} workers of {wanted} GPUs each need {wanted * count}, here are {len(devices)}; at most "
            f"{len(devices) // wanted} fit",
            key="--workers",
        )
    return [
        Seat(
            tuple(sorted(cores[place * each : (place + 1) * each])),
            tuple(devices[place * wanted : (place + 1) * wanted]),
        )
        for place in range(count)
    ]


def ordered_cores() -> list[int]:
    """Cores that this process may use, threads of one physical core beside each other."""

    def key(core: int) -> tuple[int, int, int]:
        found = []
        for name in ("physical_package_id", "core_id"):
            try:
                found.append(int((_TOPOLOGY / f"cpu{core}" / "topology" / name).read_text()))
            except (OSError, ValueError):
                return (0, core, core)
        return (found[0], found[1], core)

    return sorted(os.sched_getaffinity(0), key=key)


@contextlib.contextmanager
def taken_seat(name: str, num_cores: int) -> Iterator[Seat]:
    """A share of this machine's cores that no other process with this `name` has; this process moves onto it.

    For workers that nobody gave a seat: Ray counts cores, and does not say which.

    Raises:
        WorkError: all are taken.
    """
    cores = ordered_cores()
    for place in range(len(cores) // num_cores):
        lock = open_lock(f"{name}.{num_cores}.{place}.seat")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        with _moved(cores[place * num_cores : (place + 1) * num_cores]) as seat:
            try:
                yield seat
            finally:
                os.close(lock)
        return
    raise WorkError(
        f"no {num_cores} of this machine's {len(cores)} cores are free; its Ray node offers more than it has"
    )


@contextlib.contextmanager
def _moved(cores: Sequence[int]) -> Iterator[Seat]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield Seat(tuple(sorted(cores)))
    finally:
        os.sched_setaffinity(0, before)

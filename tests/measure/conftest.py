"""A nursery for the tests of this folder, and the check that nothing of it is left running or open."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from codesign.measure.nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(preload=("torch", "hostile_engines")) as nursery:
        nursery.start()
        yield nursery


def family(nursery_pid: int) -> set[int]:
    """Every live process that came from that nursery, itself included."""
    return family_of(entry_of(nursery_pid))


def entry_of(nursery_pid: int) -> bytes:
    """What all that came from a nursery has inherited from it."""
    (entry,) = [
        item
        for item in Path(f"/proc/{nursery_pid}/environ").read_bytes().split(b"\0")
        if item.startswith(b"CODESIGN_NURSERY=")
    ]
    return entry


def family_of(entry: bytes) -> set[int]:
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if entry in (folder / "environ").read_bytes():
                found.add(int(folder.name))
    return found


@pytest.fixture
def nothing_left(nursery: Nursery) -> Iterator[Callable[[], None]]:
    """Call it after the sessions: no process but the nursery, no descriptor that was not open before."""
    nursery.start()
    before = len(os.listdir("/proc/self/fd"))

    def check() -> None:
        assert nursery.pid is not None
        assert family(nursery.pid) == {nursery.pid}
        assert len(os.listdir("/proc/self/fd")) == before

    yield check

"""A nursery for the tests of this folder, and the check that nothing of it is left running or open."""

import os
from collections.abc import Callable, Iterator

import pytest
from relatives import family

from codesign.measure.nursery import Nursery


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(preload=("torch",)) as nursery:
        nursery.start()
        yield nursery


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

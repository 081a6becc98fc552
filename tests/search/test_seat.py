"""What a worker has for itself."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from codesign.errors import InputError, WorkError
from codesign.search import seat
from codesign.search.seat import Seat, ordered_cores, seats_of, taken_seat
from codesign.spec.hardware import Hardware

CORES = sorted(os.sched_getaffinity(0))


def cpu(cores: int | None = None) -> Hardware:
    return Hardware.model_validate({"name": "here", "device": "cpu", **({} if cores is None else {"cores": cores})})


def cuda(count: int) -> Hardware:
    return Hardware.model_validate({"name": "H100", "device": "cuda", "count": count})


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four physical cores of two threads each; 0 and 4 are one core."""
    monkeypatch.setattr(seat, "ordered_cores", lambda: [0, 4, 1, 5, 2, 6, 3, 7])


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seat, "gpus", lambda: [{"uuid": f"GPU-{letter}"} for letter in "abcd"])


@pytest.mark.usefixtures("eight_cores")
def test_workers_share_the_cores_out_and_keep_threads_of_one_core_together() -> None:
    assert [item.cores for item in seats_of(cpu(), 2)] == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert [item.cores for item in seats_of(cpu(), 4)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert [item.cores for item in seats_of(cpu(2), 2)] == [(0, 4), (1, 5)]
    assert seats_of(cpu(), 1) == [Seat(tuple(range(8)))]


@pytest.mark.usefixtures("eight_cores")
def test_more_workers_than_cores_are_refused_with_what_fits() -> None:
    with pytest.raises(InputError, match="need 16 cores, here are 8; at most 2 fit"):
        seats_of(cpu(4), 4)
    with pytest.raises(InputError, match="9 workers"):
        seats_of(cpu(), 9)


@pytest.mark.usefixtures("eight_cores", "four_gpus")
def test_gpus_are_shared_out_whole() -> None:
    seats = seats_of(cuda(2), 2)

    assert [item.gpus for item in seats] == [("GPU-a", "GPU-b"), ("GPU-c", "GPU-d")]
    assert not set(seats[0].cores) & set(seats[1].cores)
    assert str(seats[0]) == "GPU-a, GPU-b"
    with pytest.raises(InputError, match="need 6, here are 4; at most 2 fit"):
        seats_of(cuda(2), 3)


def test_the_cores_of_this_machine_are_those_that_we_may_use() -> None:
    assert sorted(ordered_cores()) == CORES


def test_two_processes_never_take_one_seat() -> None:
    name = uuid.uuid4().hex
    code = f"from codesign.search.seat import *\nwith taken_seat({name!r}, {len(CORES)}) as seat: print(seat.cores)"
    with taken_seat(name, len(CORES)) as mine:
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert os.sched_getaffinity(0) == set(mine.cores) == set(CORES)
        with pytest.raises(WorkError, match="are free"), taken_seat(name, len(CORES)):
            pass
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert "are free" in other.stderr
    assert again.stdout.strip() == str(tuple(CORES))
    for path in Path("/dev/shm").glob(f"*{name}*"):
        path.unlink()

"""Timing windows of one machine do not overlap, nor does anything else that workers do."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from codesign.errors import WorkError
from codesign.measure import turn as turns
from codesign.measure.turn import Turn, open_lock

# Says when it has its turn, and keeps it until it is killed or its stdin ends; a third argument: it may overlap.
HOLDER = (
    "import sys; from codesign.measure.turn import Turn\n"
    "turn = Turn(sys.argv[1], may_overlap=len(sys.argv) > 3)\n"
    "with getattr(turn, sys.argv[2])(): print('mine', flush=True); sys.stdin.read()"
)


@pytest.fixture
def name() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield name
    for path in Path("/dev/shm").glob(f"*{name}*"):
        path.unlink()


class Holder:
    def __init__(self, name: str, how: str, *, may_overlap: bool = False) -> None:
        command = [sys.executable, "-c", HOLDER, name, how, *(["overlap"] if may_overlap else [])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "mine\n"

    def end(self, *, kill: bool = False) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        if kill:
            self.process.kill()
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


def waits(turn: Turn, how: str, holder: Holder, *, kill: bool = False) -> bool:
    """Whether the turn had to be waited for; the holder ends when it has to."""
    waited: list[bool] = []

    def say() -> None:
        waited.append(True)
        holder.end(kill=kill)

    with turn.alone(say) if how == "alone" else turn.busy():
        pass
    return bool(waited)


@pytest.mark.parametrize(("kill", "other"), [(False, "busy"), (False, "alone"), (True, "alone")])
def test_a_window_waits_for_work_and_for_windows_also_of_a_process_that_is_killed(
    name: str, kill: bool, other: str
) -> None:
    assert waits(Turn(name), "alone", Holder(name, other), kill=kill)


@pytest.mark.parametrize("other", ["busy", "alone"])
def test_windows_that_may_overlap_wait_for_nobody_who_may_too(name: str, other: str) -> None:
    holder = Holder(name, other, may_overlap=True)

    assert not waits(Turn(name, may_overlap=True), "alone", holder)
    holder.end()


@pytest.mark.parametrize(("own", "other"), [(True, False), (False, True)])
def test_a_window_that_may_not_overlap_is_alone_whatever_others_may(name: str, own: bool, other: bool) -> None:
    assert waits(Turn(name, may_overlap=own), "alone", Holder(name, "alone", may_overlap=other))


def test_work_goes_beside_work(name: str) -> None:
    holder, turn = Holder(name, "busy"), Turn(name)
    began_s = time.monotonic()
    with turn.busy():
        assert time.monotonic() - began_s < 10
    holder.end()


def test_other_names_and_no_name_wait_for_nobody(name: str) -> None:
    holder = Holder(name, "alone")

    assert not waits(Turn(f"{name}2"), "alone", holder)
    assert not waits(Turn(), "alone", holder)
    holder.end()


def test_a_lock_file_of_somebody_else_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_MEMORY", tmp_path)
    (tmp_path / f"codesign-{os.getuid()}-{name}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WorkError, match="cannot be opened"):
        open_lock(name)

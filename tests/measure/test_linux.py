import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from codesign.measure import linux

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_children_are_found_whatever_they_are_called(tmp_path: Path) -> None:
    program = tmp_path / ") R 1 (x"  # the name of a process stands in parentheses before its parent
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "60"]) as process:
        try:
            assert process.pid in linux.children_of(os.getpid())
        finally:
            process.kill()


def test_pid_and_start_time_name_one_process() -> None:
    assert linux.start_time(os.getpid()) == linux.start_time(os.getpid())
    with subprocess.Popen(SLEEP) as process:
        started = linux.start_time(process.pid)
        assert started is not None
        assert started >= (linux.start_time(os.getpid()) or 0)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

        assert linux.start_time(process.pid) is None  # a zombie has ended

    assert linux.start_time(process.pid) is None


def test_only_what_carries_the_wanted_value_is_killed() -> None:
    name = f"CODESIGN_TEST_{os.getpid()}"
    with (
        subprocess.Popen(SLEEP, env={**os.environ, name: "wanted"}) as wanted,
        subprocess.Popen(SLEEP, env={**os.environ, name: "other"}) as other,
        subprocess.Popen(SLEEP, env={**os.environ, f"X{name}": "wanted"}) as third,
    ):
        wait_for(name, wanted.pid)
        wait_for(name, other.pid)

        assert linux.kill_by_environment(name, lambda value: value == "wanted", timeout_s=10)

        assert wanted.wait(10) == -9
        assert other.poll() is None
        assert third.poll() is None
        other.kill()
        third.kill()


def test_a_process_that_will_not_match_costs_no_waiting() -> None:
    before = time.monotonic()

    assert linux.kill_by_environment("CODESIGN_TEST_NOBODY_HAS_THIS", lambda value: True, timeout_s=60)
    assert time.monotonic() - before < 30


def test_a_failing_prctl_is_an_error() -> None:
    with pytest.raises(OSError, match="prctl"):
        linux.set_parent_death_signal(1000)


def wait_for(name: str, pid: int) -> None:
    """Until the process has its own environment (right after the fork it still has ours)."""
    end = time.monotonic() + 10
    while linux.environment_entry(pid, name) is None and time.monotonic() < end:
        time.sleep(0.01)

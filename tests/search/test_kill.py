"""kill -9 of the search, its nursery and their children, at named steps and at random moments; then resume."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from codesign.results.ledger import read_records
from codesign.search.lease import sweep
from tests.search.kill_runner import CRASH_POINTS
from tests.search.test_study import optuna_trials

ROOT = Path(__file__).parents[2]
NUM_RANDOM_KILLS = 25


class Runner:
    """The process that forks searches."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.search.kill_runner"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.acked: list[str] = []

    def run(self, out: Path, *, kill: "Kill | None" = None, **order: Any) -> int:
        """One search to its end, or its death. Returns its exit status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"out": str(out), "seconds": 0.02, **order}) + "\n")
        self._process.stdin.flush()
        pid = int(self._process.stdout.readline().split()[1])
        if kill is not None:
            kill.start(pid)
        for line in self._process.stdout:
            word, value = line.split()
            if word == "exit":
                if kill is not None:
                    kill.join()
                return int(value)
            self.acked.append(value)
        raise AssertionError("the runner died")

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


class Kill:
    """Kills a member of a search's family after a while: "search", "nursery" or "child"."""

    def __init__(self, victim: str, after_s: float) -> None:
        self._victim, self._after_s = victim, after_s
        self._thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        self._thread = threading.Thread(target=self._run, args=(pid,))
        self._thread.start()

    def join(self) -> None:
        assert self._thread is not None
        self._thread.join()

    def _run(self, pid: int) -> None:
        time.sleep(self._after_s)
        try:
            search = psutil.Process(pid)
            descendants = search.children(recursive=True)
            depth = {"search": 0, "nursery": 1, "child": 2}[self._victim]
            family = [search, *descendants]
            family[min(depth, len(family) - 1)].send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            pass  # it was done before


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()


def check_study(out: Path, acked: list[str], trials: int) -> None:
    """Nothing lost, doubled, left running or left behind."""
    records, damaged = read_records(out / "study" / "trials")
    assert not damaged
    uids = [record.uid for record in records]
    assert [record.number for record in records] == list(range(trials))
    assert len(acked) == len(set(acked))
    assert set(acked) <= set(uids)
    told = optuna_trials(out)
    assert all(trial.state.is_finished() for trial in told)
    assert sorted(t.user_attrs["uid"] for t in told if t.state.name == "COMPLETE") == sorted(uids)
    assert sweep(out / "study" / "leases") == ()


@pytest.mark.parametrize("point", [point for point in CRASH_POINTS if point != "in_rebuild"])
def test_a_search_that_dies_at_a_step_loses_doubles_and_leaves_nothing(
    runner: Runner, tmp_path: Path, point: str
) -> None:
    runner.acked.clear()
    statuses = [runner.run(tmp_path, trials=6, die_at=point, die_after=turn) for turn in (1, 2, 7)]
    done = runner.run(tmp_path, trials=6)

    assert -signal.SIGKILL in statuses
    assert done == 0
    check_study(tmp_path, runner.acked, 6)


def test_a_search_that_dies_while_it_rebuilds_its_index_rebuilds_it_next_time(runner: Runner, tmp_path: Path) -> None:
    runner.acked.clear()
    runner.run(tmp_path, trials=6)
    (tmp_path / "study" / "study.db").unlink()
    died = runner.run(tmp_path, trials=8, die_at="in_rebuild", die_after=3)
    done = runner.run(tmp_path, trials=8)

    assert (died, done) == (-signal.SIGKILL, 0)
    check_study(tmp_path, runner.acked, 8)


def test_searches_killed_at_random_moments_lose_double_and_leave_nothing(runner: Runner, tmp_path: Path) -> None:
    runner.acked.clear()
    rng = random.Random(20)
    began_s = time.monotonic()
    runner.run(tmp_path, trials=2)
    usual_s = time.monotonic() - began_s  # of two trials, on this machine as busy as it is
    killed = 0
    for turn in range(NUM_RANDOM_KILLS):
        kill = Kill(rng.choice(("search", "search", "search", "nursery", "child")), rng.uniform(0, 1.5 * usual_s))
        killed += runner.run(tmp_path, trials=4 + turn, kill=kill) == -signal.SIGKILL
    done = runner.run(tmp_path, trials=4 + NUM_RANDOM_KILLS)
    began_s = time.monotonic()
    nothing_to_do = runner.run(tmp_path, trials=4 + NUM_RANDOM_KILLS)
    resumed_s = time.monotonic() - began_s

    assert (done, nothing_to_do) == (0, 0)
    assert killed >= 8
    assert resumed_s < 5
    records, _ = read_records(tmp_path / "study" / "trials")
    check_study(tmp_path, runner.acked, 4 + NUM_RANDOM_KILLS)
    assert {record.outcome.kind for record in records} <= {"ok", "killed_by_os"}


def test_no_process_of_a_killed_search_is_left(runner: Runner, tmp_path: Path) -> None:
    runner.run(tmp_path, trials=50, seconds=5, kill=Kill("search", 1.5))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and len(psutil.Process(runner._process.pid).children(recursive=True)) > 0:
        time.sleep(0.05)

    assert psutil.Process(runner._process.pid).children(recursive=True) == []
    assert not [p for p in psutil.process_iter() if p.ppid() == 1 and str(tmp_path) in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []

"""kill -9 of the search, its nursery and their children, at named steps and at random moments; then resume."""

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from codesign.results.ledger import read_records
from codesign.search.lease import sweep
from tests.search.kill_runner import CRASH_POINTS
from tests.search.runner import Runner, Strike
from tests.search.studies import optuna_trials

NUM_RANDOM_KILLS = 25


def measured(out: Path) -> int:
    """How many trials have a record."""
    return len(read_records(out / "study" / "trials")[0])


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


@pytest.mark.parametrize("point", ["in_index", "in_rebuild"])
def test_a_search_that_dies_while_it_rebuilds_its_index_rebuilds_it_next_time(
    runner: Runner, tmp_path: Path, point: str
) -> None:
    runner.acked.clear()
    runner.run(tmp_path, trials=6)
    (tmp_path / "study" / "study.db").unlink()
    died = runner.run(tmp_path, trials=8, die_at=point, die_after=1)
    done = runner.run(tmp_path, trials=8)

    assert (died, done) == (-signal.SIGKILL, 0)
    check_study(tmp_path, runner.acked, 8)


def test_searches_killed_at_random_moments_lose_double_and_leave_nothing(runner: Runner, tmp_path: Path) -> None:
    runner.acked.clear()
    rng = random.Random(20)
    began_s = time.monotonic()
    runner.run(tmp_path, trials=2)
    usual_s = time.monotonic() - began_s  # of two trials, on this machine as busy as it is
    statuses = []
    for _ in range(NUM_RANDOM_KILLS):
        victim = rng.choice(("search", "search", "search", "nursery", "child"))
        # A search that is to die is asked for more than it can do by then; any other ends after two more trials.
        total = 10_000 if victim == "search" else measured(tmp_path) + 2
        status = runner.run(tmp_path, trials=total, strike=Strike(victim, rng.uniform(0, 1.5 * usual_s)))
        if victim == "search":
            statuses.append(status)
    total = measured(tmp_path) + 2
    done = runner.run(tmp_path, trials=total)
    began_s = time.monotonic()
    nothing_to_do = runner.run(tmp_path, trials=total)
    resumed_s = time.monotonic() - began_s

    assert (done, nothing_to_do) == (0, 0)
    assert set(statuses) == {-signal.SIGKILL}
    assert len(statuses) >= NUM_RANDOM_KILLS / 2
    assert resumed_s < 5
    records, _ = read_records(tmp_path / "study" / "trials")
    check_study(tmp_path, runner.acked, total)
    assert {record.outcome.kind for record in records} <= {"ok", "killed_by_os"}


def test_no_process_of_a_killed_search_is_left(runner: Runner, tmp_path: Path) -> None:
    runner.run(tmp_path, trials=50, seconds=5, strike=Strike("search", 1.5))
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and runner.descendants:
        time.sleep(0.05)

    assert runner.descendants == []
    assert not [p for p in psutil.process_iter() if p.ppid() == 1 and str(tmp_path) in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []

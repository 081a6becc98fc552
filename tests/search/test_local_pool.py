"""Worker processes: what they run on, what becomes of a trial whose worker dies, and how a study uses several."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from codesign.errors import WorkError
from codesign.results.pareto import front
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.limits import Limits
from codesign.search.local_pool import LocalPool
from codesign.search.measurer import Order
from codesign.search.seat import Seat
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import OBJECTIVES, FakeMeasure
from tests.search.studies import Heard, run_study, space_of
from tests.search.test_objective import identity

GRID = "max_batch_size: [1, 2, 4, 8]\nmax_step_tokens: [128, 256, 512]\n"
CORES = tuple(sorted(os.sched_getaffinity(0)))


class Listening:
    def __init__(self) -> None:
        self.phases: list[tuple[str, str]] = []
        self.places: list[str] = []

    def phase(self, uid: str, name: str, fraction: float | None) -> None:
        self.phases.append((uid, name))

    def placed(self, uid: str, place: str) -> None:
        self.places.append(place)


def pool_of(count: int, **arguments: object) -> LocalPool:
    return LocalPool(Order("tests.search.replay:replay", arguments), [Seat(CORES)] * count)


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[LocalPool]:
    with pool_of(2, seconds=0.05, log=str(tmp_path / "log"), die_on=3) as pool:
        yield pool


def wait(pool: LocalPool, number: int = 1, listening: Listening | None = None) -> list[TrialRecord]:
    records: list[TrialRecord] = []
    deadline = time.monotonic() + 60
    while len(records) < number:
        assert time.monotonic() < deadline
        records += pool.wait(1.0, listening or Listening())
    return records


def test_a_worker_measures_in_a_process_of_its_own_on_its_own_cores(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with LocalPool(Order("tests.search.replay:replay", {"log": str(log)}), [Seat(CORES[:1])]) as pool:
        pool.start(identity(1), EngineConfig().resolve())
        listening = Listening()
        (record,) = wait(pool, listening=listening)
        pid = pool.pids[0]

    assert record.outcome.kind == "ok"
    assert record.uid == identity(1).uid
    assert log.read_text() == f"1 0 {pid} {CORES[0]}\n"
    assert listening.places == [f"worker {pid}, cores {CORES[0]}"]
    assert listening.phases == [(identity(1).uid, "measure")]
    assert pid != os.getpid()
    assert not psutil.pid_exists(pid)


def test_places_are_free_until_each_worker_has_a_trial(pool: LocalPool) -> None:
    assert pool.free_place() is not None
    pool.start(identity(1), EngineConfig().resolve())
    assert pool.free_place() is not None
    pool.start(identity(2), EngineConfig().resolve())
    assert pool.free_place() is None

    assert {record.number for record in wait(pool, 2)} == {1, 2}
    assert pool.free_place() is not None


def test_a_worker_that_is_killed_gives_its_trial_back_as_lost_and_is_replaced(pool: LocalPool) -> None:
    pool.start(identity(3), EngineConfig().resolve())
    (record,) = wait(pool)
    assert record.outcome.kind == "harness"
    assert "SIGKILL" in record.outcome.detail

    again = TrialIdentity(study="s", number=3, uid="again", attempt=1)
    pool.start(again, EngineConfig().resolve())
    assert [record.outcome.kind for record in wait(pool)] == ["ok"]


def test_a_worker_that_cannot_measure_says_why() -> None:
    with pool_of(1, fail="no such model") as pool:
        pool.start(identity(1), EngineConfig().resolve())
        (record,) = wait(pool)

    assert record.outcome.kind == "harness"
    assert "no such model" in record.outcome.detail


def test_cancelling_ends_the_workers_that_measure() -> None:
    with pool_of(2, seconds=60) as pool:
        pool.start(identity(1), EngineConfig().resolve())
        pids = pool.pids
        pool.cancel()

        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert pool.free_place() is not None


def test_a_study_with_two_workers_finds_what_one_process_finds(tmp_path: Path) -> None:
    alone = run_study(tmp_path / "a", space_of(tmp_path, GRID), measure=FakeMeasure(), limits=Limits(trials=50))
    heard = Heard()
    with pool_of(2, seconds=0.02, die_on=4) as pool:
        shared = run_study(tmp_path / "b", space_of(tmp_path, GRID), pool=pool, limits=Limits(trials=50), heard=heard)

    def found(records: tuple[TrialRecord, ...]) -> set[str]:
        return {record.config_digest for record in front(records, OBJECTIVES)}

    assert found(shared.records) == found(alone.records)
    assert len({record.config_digest for record in shared.records}) == len(alone.records)
    assert [(r.number, r.attempt) for r in shared.records if r.outcome.kind != "ok"] == [(4, 0)]
    assert shared.stopped == alone.stopped
    assert len({record.provenance["placement"]["worker"] for record in shared.records if record.provenance}) >= 2
    assert not list((tmp_path / "b" / "study" / "leases").glob("*.json"))


def test_workers_that_all_fail_stop_the_study_with_the_reason(tmp_path: Path) -> None:
    with pool_of(2, fail="no such model") as pool, pytest.raises(WorkError, match="no such model"):
        run_study(tmp_path, space_of(tmp_path, GRID), pool=pool, limits=Limits(trials=5))


def test_ctrl_c_keeps_what_has_finished_and_ends_the_workers(tmp_path: Path) -> None:
    from codesign.search.interrupt import Interrupt

    interrupt = Interrupt()

    class Striking(Heard):
        def finished(self, record: TrialRecord) -> None:
            if record.number == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with interrupt.installed(), pool_of(2, seconds=0.2) as pool:
        result = run_study(
            tmp_path,
            space_of(tmp_path, GRID),
            pool=pool,
            heard=Striking(),
            interrupt=interrupt,
            limits=Limits(trials=9),
        )
        pids = pool.pids

    assert result.was_interrupted
    assert {0, 1, 2} & {record.number for record in result.records}
    assert len(result.records) < 9
    assert not any(psutil.pid_exists(pid) for pid in pids)

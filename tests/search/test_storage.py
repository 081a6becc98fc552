"""study.db deleted, truncated, torn or in disagreement; damaged records; old leases."""

import contextlib
import dataclasses
import itertools
import os
import random
import time
from pathlib import Path

import pytest

from codesign.results.ledger import read_records
from codesign.results.pareto import front
from codesign.search import lease as leases
from codesign.search import objective
from codesign.search.folder import open_study
from codesign.search.folder_store import FolderStore
from codesign.search.limits import Limits
from codesign.search.suggest import Points
from tests.search.fake_measure import OBJECTIVES, FakeMeasure, record_of
from tests.search.studies import Heard, inputs_of, optuna_trials, run_study, space_of

TRIALS = 6


def told(out: Path) -> dict[str, tuple[object, ...]]:
    return {
        trial.user_attrs["uid"]: (trial.values, trial.constraints, dict(trial.params))
        for trial in optuna_trials(out)
        if trial.state.name == "COMPLETE"
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    measure = FakeMeasure(outcome=lambda config: "oom" if config.max_batch_size == 16 else "ok")
    run_study(tmp_path, space_of(tmp_path), measure=measure, limits=Limits(trials=TRIALS))
    return tmp_path


def again(out: Path, heard: Heard | None = None) -> None:
    run_study(out, space_of(out), heard=heard, limits=Limits(trials=TRIALS))


def test_a_deleted_index_is_rebuilt_equal_and_said(study: Path) -> None:
    before, heard = told(study), Heard()
    (study / "study" / "study.db").unlink()
    again(study, heard)

    assert told(study) == before
    assert any("rebuilt" in text and "missing" in text for text in heard.said)


def test_an_index_cut_off_anywhere_is_rebuilt_with_the_same_front(study: Path) -> None:
    before = told(study)
    records = read_records(study / "study" / "trials")[0]
    expected = [record.number for record in front(records, OBJECTIVES)]
    path = study / "study" / "study.db"
    whole = path.read_bytes()
    rng = random.Random(3)
    for size in (0, 1, 100, 4096, *(rng.randrange(len(whole)) for _ in range(4))):
        path.write_bytes(whole[:size])
        again(study)

        assert told(study) == before, f"cut to {size} bytes"
    again_records = read_records(study / "study" / "trials")[0]
    assert [record.number for record in front(again_records, OBJECTIVES)] == expected


def test_an_index_full_of_garbage_is_rebuilt(study: Path) -> None:
    before, path = told(study), study / "study" / "study.db"
    data = bytearray(path.read_bytes())
    data[2000:6000] = random.Random(4).randbytes(4000)
    path.write_bytes(data)
    again(study)

    assert told(study) == before


def test_an_index_that_misses_a_record_is_rebuilt(study: Path) -> None:
    before, path = told(study), study / "study" / "study.db"
    whole = path.read_bytes()
    run_study(study, space_of(study), limits=Limits(trials=TRIALS + 2))
    path.write_bytes(whole)
    heard = Heard()
    run_study(study, space_of(study), heard=heard, limits=Limits(trials=TRIALS + 2))

    assert len(told(study)) == TRIALS + 2
    assert before.items() <= told(study).items()
    assert any("not those of the records" in text for text in heard.said)


def test_an_intact_index_is_not_rebuilt(study: Path) -> None:
    heard = Heard()
    again(study, heard)

    assert heard.said == []


def test_torn_and_foreign_records_are_put_aside_said_and_the_study_goes_on(study: Path) -> None:
    trials = study / "study" / "trials"
    records = read_records(trials)[0]
    torn, foreign = trials / f"{records[2].uid}.json", trials / "nonsense.json"
    half = torn.read_bytes()[:200]
    torn.write_bytes(half)
    foreign.write_bytes(b"\x00\xff garbage")
    heard = Heard()
    result = run_study(study, space_of(study), heard=heard, limits=Limits(trials=TRIALS))

    assert (trials / "damaged" / torn.name).read_bytes() == half
    assert (trials / "damaged" / foreign.name).exists()
    assert sum("damaged" in text for text in heard.said) >= 2
    assert len(result.records) == TRIALS
    assert sorted(told(study)) == sorted(record.uid for record in result.records)


def test_a_lease_lives_as_long_as_its_process(tmp_path: Path) -> None:
    with leases.hold(tmp_path) as lease:
        assert leases.sweep(tmp_path) == (lease,)
        leases.write(tmp_path, dataclasses.replace(lease, uid="abc"))
        assert leases.sweep(tmp_path)[0].uid == "abc"

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"boot_id": "another"}, {"pid_start_ticks": 1}, {"pid": 2**22 + 1}])
def test_a_lease_of_another_boot_or_a_reused_pid_is_dead(tmp_path: Path, change: dict[str, object]) -> None:
    with leases.hold(tmp_path) as lease:
        dead = dataclasses.replace(lease, worker="dead", **change)  # type: ignore[arg-type]
        leases.write(tmp_path, dead)

        assert not dead.is_alive
        assert [living.worker for living in leases.sweep(tmp_path)] == [lease.worker]


def test_what_runs_now_is_told_from_what_a_dead_process_left(tmp_path: Path) -> None:
    with leases.hold(tmp_path) as lease:
        now = dataclasses.replace(lease, worker="now", uid="a", number=3)
        leases.write(tmp_path, now)
        leases.write(tmp_path, dataclasses.replace(now, worker="dead", pid=2**22 + 1))
        for worker, age_s in (("elsewhere", 10), ("long ago", 1000)):
            other = dataclasses.replace(now, worker=worker, host="another", number=4)
            leases.write(tmp_path, other)
            heard_s = time.time() - age_s
            os.utime(tmp_path / f"{worker}.json", (heard_s, heard_s))

        assert [item.worker for item in leases.running_in(tmp_path)] == ["now", "elsewhere"]
        assert len(list(tmp_path.iterdir())) == 5  # a reader removes nothing


@pytest.mark.parametrize("text", ["", "[]", "{", '{"worker": 3}', "null"])
def test_a_file_that_is_no_lease_is_swept(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)

    assert leases.sweep(tmp_path) == ()
    assert list(tmp_path.iterdir()) == []


def test_the_index_holds_what_ended_and_no_trial_that_runs_or_was_given_up(tmp_path: Path) -> None:
    space = space_of(tmp_path)
    points = Points(space, max_model_len=512)
    with (
        open_study(tmp_path, "study", inputs_of(space)) as folder,
        contextlib.closing(FolderStore(folder, points=points, objectives=OBJECTIVES, say=Heard().say)) as store,
    ):
        claims = [store.claim(point, number, 0, "") for number, point in enumerate(itertools.islice(points.all(), 3))]
        for claim in claims[:2]:
            record = record_of(claim.identity, claim.point.config)
            store.finish(claim, record, objective.told(record, OBJECTIVES, []))
        assert [lease.number for lease in leases.running_in(folder.leases)] == [2]
        store.abandon(claims[2])

    trials = optuna_trials(tmp_path)
    assert [(trial.number, trial.user_attrs["uid"]) for trial in trials] == [
        (number, claim.identity.uid) for number, claim in enumerate(claims[:2])
    ]
    assert all(trial.state.is_finished() for trial in trials)

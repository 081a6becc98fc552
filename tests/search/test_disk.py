"""A full disk and a file size limit end a search with one clear message and a readable study."""

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from codesign.errors import WorkError
from codesign.results.ledger import read_records
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.disk import explained
from codesign.search.limits import Limits
from codesign.spec.engine_config import EngineConfig
from tests.search.fake_measure import FakeMeasure, OnPhase
from tests.search.studies import optuna_trials, run_study, space_of


def fill(path: Path) -> None:
    """Writes until the disk is full."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with pytest.raises(OSError, match="No space left"):
        while True:
            os.write(descriptor, b"\0" * 1024)
    os.close(descriptor)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_with_place_and_need_and_the_study_stays_readable(small_disk: Path, tmp_path: Path) -> None:
    space, filler = space_of(tmp_path), small_disk / "filler"

    def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        if identity.number == 3:
            fill(filler)
        return FakeMeasure()(identity, config, on_phase)

    with pytest.raises(WorkError) as caught:
        run_study(small_disk, space, measure=measure, limits=Limits(trials=8))

    text = str(caught.value)
    assert str(small_disk) in text
    assert "free" in text and "needs about" in text and "same command again" in text
    records, damaged = read_records(small_disk / "study" / "trials")
    assert [record.number for record in records] == [0, 1, 2]
    assert damaged == []
    filler.unlink()
    result = run_study(small_disk, space, limits=Limits(trials=8))
    assert [record.number for record in result.records] == list(range(8))
    assert all(trial.state.is_finished() for trial in optuna_trials(small_disk))


def test_a_disk_that_is_full_from_the_start_is_said_at_once(small_disk: Path, tmp_path: Path) -> None:
    fill(small_disk / "filler")

    with pytest.raises(WorkError, match="same command again"):
        run_study(small_disk, space_of(tmp_path))


@pytest.mark.parametrize("limit", [0, 700, 3_000, 40_000, 200_000])
def test_a_file_size_limit_is_said_and_the_study_stays_readable(tmp_path: Path, limit: int) -> None:
    space = space_of(tmp_path)
    run_study(tmp_path, space, limits=Limits(trials=2))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        run_study(tmp_path, space, limits=Limits(trials=6))
        message = ""
    except WorkError as error:
        message = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    assert limit > 100_000 or "same command again" in message
    records, damaged = read_records(tmp_path / "study" / "trials")
    assert damaged == []
    assert len(records) >= 2
    result = run_study(tmp_path, space, limits=Limits(trials=6))
    assert [record.number for record in result.records] == list(range(6))


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Interrupted"), explained(tmp_path):
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))

"""Ctrl-C and SIGTERM, as real signals to a real process."""

import signal
import time
from pathlib import Path

import pytest

from codesign.results.ledger import read_records
from tests.search.runner import Runner, Strike
from tests.search.studies import optuna_trials


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_the_trial_keeps_the_others_and_writes_the_report(
    runner: Runner, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    runner.run(tmp_path, trials=2)
    (tmp_path / "report").unlink()
    began_s = time.monotonic()
    ended = runner.run(tmp_path, trials=9, seconds=30, strike=Strike("search", 2.0, number))

    assert ended == status
    assert time.monotonic() - began_s < 20
    assert len(read_records(tmp_path / "study" / "trials")[0]) == 2
    assert (tmp_path / "report").exists()
    assert all(trial.state.is_finished() for trial in optuna_trials(tmp_path))


def test_the_second_signal_ends_the_process_at_once_and_the_study_goes_on_later(runner: Runner, tmp_path: Path) -> None:
    ended = runner.run(
        tmp_path, trials=3, seconds=30, deaf=True, strike=Strike("search", 2.0, signal.SIGINT, signal.SIGINT)
    )
    done = runner.run(tmp_path, trials=3)

    assert ended == 130
    assert done == 0
    assert [record.number for record in read_records(tmp_path / "study" / "trials")[0]] == [0, 1, 2]

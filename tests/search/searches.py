"""Searches as processes, what is done to them, and what must hold of their study afterwards."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from codesign.results.ledger import read_records
from codesign.results.pareto import front
from codesign.results.record import TrialRecord
from codesign.search.retry import latest
from tests.search.fake_measure import OBJECTIVES
from tests.search.postgres import Server

ROOT = Path(__file__).parents[2]


class Search:
    """One `shared_runner`."""

    def __init__(self, out: Path, url: str, *, prefix: tuple[str, ...] = (), **options: Any) -> None:
        order = json.dumps({"out": str(out), "url": url, **options})
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.acked = out, [""] * 0
        self.stopped = ""
        self.stderr = (out / "stderr").open("a+")
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.search.shared_runner", order],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            word, _, value = line.strip().partition(" ")
            if word == "acked":
                self.acked.append(value)
            elif word == "stopped":
                self.stopped = value

    @property
    def is_running(self) -> bool:
        return self.process.poll() is None

    def wait(self, timeout_s: float) -> int:
        """Its exit status; what it wrote to stderr is in `said`."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.said = (self.out / "stderr").read_text()
        self.stderr.close()
        return status

    @property
    def records(self) -> list[TrialRecord]:
        records, damaged = read_records(self.out / "study" / "trials")
        assert not damaged
        return records


def found(records: list[TrialRecord]) -> set[str]:
    """The front, by configuration."""
    return {record.config_digest for record in front(records, OBJECTIVES)}


def check_ledger(server: Server, acked: set[str], num_trials: int) -> list[TrialRecord]:
    """Nothing lost, doubled or left running in the database. Returns its records."""
    rows = server.query("SELECT uid, kind, json FROM codesign_ledger ORDER BY place")
    kinds = [kind for _, kind, _ in rows]
    assert kinds.count("study") == 1
    assert "running" not in kinds
    done = {str(uid): TrialRecord.from_json(str(text)) for uid, kind, text in rows if kind == "done"}
    assert acked <= done.keys()
    records = sorted(done.values(), key=lambda record: (record.number, record.attempt))
    good = [record for record in latest(records) if record.outcome.kind == "ok"]
    assert len(good) == num_trials
    # A configuration has one good result, whoever measured it and however often it was lost on the way.
    assert len({record.config_digest for record in records if record.outcome.kind == "ok"}) == num_trials
    assert sum(record.outcome.kind == "ok" for record in records) == num_trials
    states = dict(server.query("SELECT state, count(*) FROM trials GROUP BY state"))
    assert states.get("COMPLETE") == num_trials
    assert states.keys() <= {"COMPLETE", "FAIL"}
    assert sum(int(str(count)) for count in states.values()) == len(records)
    return records

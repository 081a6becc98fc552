"""The study loop: propose, measure, write the record, tell the sampler; until the limits say stop.

    lease -> propose -> RUNNING in the index -> measure -> record on disk (fsynced) -> tell -> report

Whatever dies at whichever arrow, the next start finds a readable study: a trial without a record never happened, a
record that was not told is told then. Only KeyboardInterrupt, a full disk and bugs of our own stop the loop; how a
trial ends is a result.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Protocol

from codesign.errors import WorkError
from codesign.results.files import write_file
from codesign.results.ledger import write_record
from codesign.results.record import Outcome, TrialIdentity, TrialRecord
from codesign.search import lease as leases
from codesign.search.advisor import Advisor
from codesign.search.folder import StudyFolder
from codesign.search.interrupt import Interrupt
from codesign.search.ledger import load
from codesign.search.limits import Limits
from codesign.search.objective import told
from codesign.search.propose import propose
from codesign.search.storage import Index, open_index
from codesign.search.suggest import Point, Points
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from codesign.spec.yaml import dump_yaml

HARNESS_RETRIES = 2
REPORT_EVERY_S = 30.0
MAX_MISFITS = 100  # predicted in a row; they cost nothing, but a space that holds nothing else must come to an end

OnPhase = Callable[[str, float | None], None]
Measure = Callable[[TrialIdentity, EngineConfig, OnPhase], TrialRecord]


@dataclasses.dataclass(frozen=True)
class Misfit:
    """Why a configuration cannot run here, known without building it.

    Attributes:
        excess: needed over available, minus 1; above 0.
    """

    detail: str
    excess: float


class Progress(Protocol):
    """Who is told how the study goes; on a terminal, a person."""

    def say(self, text: str) -> None: ...

    def begin(self, records: Sequence[TrialRecord], limits: Limits) -> None: ...

    def trial(self, identity: TrialIdentity, config: EngineConfig) -> None: ...

    def phase(self, name: str, fraction: float | None) -> None: ...

    def finished(self, record: TrialRecord, records: Sequence[TrialRecord]) -> None: ...


@dataclasses.dataclass(frozen=True)
class StudyResult:
    """Attributes:
    records: the whole ledger, by number and attempt.
    stopped: why the loop ended, for a person.
    was_interrupted: whether it ended on a signal.
    """

    records: tuple[TrialRecord, ...]
    stopped: str
    was_interrupted: bool


class Study:
    """One run of the loop in an opened study folder.

    Args:
        measure: builds and measures one configuration; every outcome is a record.
        predict: says why a configuration cannot run here, or None; such ones are recorded without being built.
        write_report: writes what people read, from the folder.
    """

    def __init__(
        self,
        folder: StudyFolder,
        *,
        points: Points,
        objectives: Sequence[Objective],
        measure: Measure,
        progress: Progress,
        interrupt: Interrupt,
        write_report: Callable[[], object],
        predict: Callable[[EngineConfig], Misfit | None] = lambda config: None,
        seed: int = 0,
    ) -> None:
        self._folder = folder
        self._points = points
        self._objectives = tuple(objectives)
        self._measure = measure
        self._progress = progress
        self._interrupt = interrupt
        self._write_report = write_report
        self._predict = predict
        self._seed = seed
        self._advisor = Advisor(points, objectives, seed)
        self._records: list[TrialRecord] = []
        self._durations_s: list[float] = []
        self._attempts: collections.Counter[int] = collections.Counter()
        self._has_worked = False

    def run(self, limits: Limits) -> StudyResult:
        """Goes on with the study until `limits`, an empty space or a signal stop it.

        Raises:
            WorkError: infrastructure fails again and again. What was finished is kept.
            OSError, optuna or sqlalchemy errors: the disk is full (`open_study` explains them).
        """
        with leases.hold(self._folder.leases) as lease:
            living = leases.sweep(self._folder.leases)
            self._records = load(self._folder.trials, self._progress.say)
            self._durations_s = [seconds(record) for record in self._records if was_built(record)]
            index = open_index(
                self._folder.index,
                name=self._folder.name,
                points=self._points,
                objectives=self._objectives,
                records=self._records,
                living=[other.worker for other in living if other.worker != lease.worker],
                say=self._progress.say,
            )
            for place, record in enumerate(self._records):
                point = self._points.located(EngineConfig.from_dict(record.config))
                self._advisor.learn(point, told(record, self._objectives, self._records[:place]))
            try:
                return self._loop(index, lease, limits)
            finally:
                index.close()

    def _loop(self, index: Index, lease: leases.Lease, limits: Limits) -> StudyResult:
        self._write_configs()
        self._progress.begin(self._records, limits)
        began_s, reported_s = time.monotonic(), -REPORT_EVERY_S
        while True:
            elapsed_s = time.monotonic() - began_s
            stopped = limits.stop(done=num_done(self._records), elapsed_s=elapsed_s, durations_s=self._durations_s)
            stopped = stopped or self._hopeless()
            if stopped is None and not self._interrupt.signal_number:
                stopped = self._one(index, lease)
            if stopped is not None or self._interrupt.signal_number:
                break
            if time.monotonic() - reported_s >= REPORT_EVERY_S:
                self._write_report()
                reported_s = time.monotonic()
        self._write_report()
        was_interrupted = bool(self._interrupt.signal_number)
        return StudyResult(tuple(self._records), "interrupted" if was_interrupted else stopped or "", was_interrupted)

    def _one(self, index: Index, lease: leases.Lease) -> str | None:
        """One trial from proposal to tell. Returns why there was none to run, or None."""
        retry = self._retry()
        if retry is not None:
            number, attempt = retry.number, retry.attempt + 1
            point: Point | None = self._points.located(EngineConfig.from_dict(retry.config))
        else:
            number, attempt = max((record.number for record in self._records), default=-1) + 1, 0
            point = propose(
                points=self._points,
                advisor=self._advisor,
                objectives=self._objectives,
                records=self._records,
                number=number,
                seed=self._seed,
            )
        if point is None:
            return "every configuration that the search space allows has been tried"
        identity = self._folder.identity(number, attempt, point.config.digest)
        leases.bind(self._folder.leases, lease, identity.uid)
        trial_id = index.start(point, lease.worker, identity.uid)
        record = self._measured(identity, point)
        if record is None:
            index.tell(trial_id, None)
            return None
        write_record(self._folder.trials, record)
        result = told(record, self._objectives, self._records)
        index.tell(trial_id, result)
        self._advisor.learn(point, result)
        self._keep(record)
        return None

    def _measured(self, identity: TrialIdentity, point: Point) -> TrialRecord | None:
        """The trial's record; None when a signal ended it."""
        misfit = self._predict(point.config)
        if misfit is not None:
            return predicted_oom(identity, point.config, misfit)
        self._progress.trial(identity, point.config)
        began_s = time.monotonic()
        try:
            with self._interrupt.waiting():
                record = self._measure(identity, point.config, self._progress.phase)
        except KeyboardInterrupt:
            return None
        if (record.uid, record.config_digest) != (identity.uid, point.config.digest):
            raise RuntimeError(f"measured {record.uid} when {identity.uid} was asked for")
        self._durations_s.append(time.monotonic() - began_s)
        return record

    def _keep(self, record: TrialRecord) -> None:
        self._records.append(record)
        self._records.sort(key=lambda item: (item.number, item.attempt))
        self._write_configs()
        self._progress.finished(record, self._records)
        self._attempts[record.number] += 1
        if record.outcome.kind != "harness":
            self._has_worked = True
        elif self._attempts[record.number] > HARNESS_RETRIES:
            if not self._has_worked:
                raise WorkError(
                    f"trial {record.number} could not be run in {self._attempts[record.number]} attempts: "
                    f"{record.outcome.detail}; nothing is wrong with the configuration, so look at the machine, then "
                    "start the same command again"
                )
            self._has_worked = False

    def _retry(self) -> TrialRecord | None:
        """The latest record of a trial that infrastructure failed and that has attempts left in this run."""
        for record in latest(self._records):
            if record.outcome.kind == "harness" and self._attempts[record.number] <= HARNESS_RETRIES:
                return record
        return None

    def _hopeless(self) -> str | None:
        tail = self._records[-MAX_MISFITS:]
        if len(tail) == MAX_MISFITS and not any(was_built(record) for record in tail):
            return f"the last {MAX_MISFITS} configurations would not fit into memory: {tail[-1].outcome.detail}"
        return None

    def _write_configs(self) -> None:
        for record in latest(self._records):
            path = self._folder.config(record.number)
            if not path.exists():
                write_file(path, dump_yaml(dict(record.config)).encode())


def latest(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The last attempt of each trial, by number."""
    by_number = {record.number: record for record in sorted(records, key=lambda item: (item.number, item.attempt))}
    return list(by_number.values())


def num_done(records: Sequence[TrialRecord]) -> int:
    """Trials that count towards the total: those that were built, and that infrastructure did not fail."""
    return sum(was_built(record) and record.outcome.kind != "harness" for record in latest(records))


def was_built(record: TrialRecord) -> bool:
    """Whether the configuration was really built, or only predicted not to fit."""
    return not record.trust.get("predicted", False)


def seconds(record: TrialRecord) -> float:
    """How long the trial took; phases with a dot in their name are parts of others."""
    return sum(duration for phase, duration in record.phases.items() if "." not in phase)


def predicted_oom(identity: TrialIdentity, config: EngineConfig, misfit: Misfit) -> TrialRecord:
    """The record of a configuration that is known not to fit without building it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return TrialRecord(
        **dataclasses.asdict(identity),
        config=config.to_dict(),
        config_digest=config.digest,
        outcome=Outcome(kind="oom", detail=f"predicted: {misfit.detail}"),
        violations={"memory": misfit.excess},
        trust={"predicted": True},
        started_at=now,
        finished_at=now,
    )

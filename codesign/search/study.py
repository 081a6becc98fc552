"""The study loop: propose, measure, write the record, tell the sampler; until the limits say stop.

    refresh -> propose -> claim (a lease) -> measure in the pool -> record durable, lease ended, told -> report

There is one such loop per `codesign search`. It starts as many trials as its pool has places and never measures itself;
with a shared store several searches work on one study, each hearing of the others' trials when it refreshes.

Whatever dies at whichever arrow, the next start finds a readable study: a trial without a record never happened, a
record that was not told is told then. Only KeyboardInterrupt, a full disk and bugs of our own stop the loop; how a
trial ends is a result.
"""

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from codesign.errors import WorkError
from codesign.results.files import write_file
from codesign.results.record import Outcome, TrialIdentity, TrialRecord
from codesign.search.advisor import Advisor
from codesign.search.folder import StudyFolder
from codesign.search.history import History, seconds, was_built
from codesign.search.interrupt import Interrupt
from codesign.search.lease import Lease
from codesign.search.limits import Limits
from codesign.search.misfit import Misfit, predicted_oom
from codesign.search.objective import Told, told
from codesign.search.pool import Pool
from codesign.search.propose import propose
from codesign.search.retry import RETRIES, to_retry
from codesign.search.store import Claim, Store
from codesign.search.suggest import Point, Points
from codesign.search.world import check_same_world, difference
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from codesign.spec.yaml import dump_yaml

REPORT_EVERY_S = 30.0
WAIT_S = 1.0  # between two looks at what the other searches of a study do
MAX_MISFITS = 100  # predicted in a row; they cost nothing, but a space that holds nothing else must come to an end


class Progress(Protocol):
    """Who is told how the study goes; on a terminal, a person."""

    def say(self, text: str) -> None: ...

    def begin(self, records: Sequence[TrialRecord], limits: Limits) -> None: ...

    def trial(self, identity: TrialIdentity, config: EngineConfig, place: str) -> None: ...

    def moved(self, uid: str, place: str) -> None: ...

    def phase(self, uid: str, name: str, fraction: float | None) -> None: ...

    def elsewhere(self, leases: Sequence[Lease]) -> None: ...

    def finished(self, record: TrialRecord) -> None: ...


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
    """One run of the loop in an opened study.

    Args:
        folder: where the configurations of the trials are written.
        store: records and leases of the study.
        pool: measures; what it is given to do and has not done is cancelled when the loop ends.
        world: provenance of what trials are measured on here, where that is known before the first.
        predict: says why a configuration cannot run here, or None; such ones are recorded without being built.
        write_report: writes what people read, from the folder.
    """

    def __init__(
        self,
        folder: StudyFolder,
        *,
        store: Store,
        pool: Pool,
        points: Points,
        objectives: Sequence[Objective],
        progress: Progress,
        interrupt: Interrupt,
        write_report: Callable[[], object],
        predict: Callable[[EngineConfig], Misfit | None] = lambda config: None,
        seed: int = 0,
        world: Mapping[str, Any] | None = None,
    ) -> None:
        self._folder = folder
        self._store = store
        self._pool = pool
        self._points = points
        self._objectives = tuple(objectives)
        self._progress = progress
        self._interrupt = interrupt
        self._write_report = write_report
        self._predict = predict
        self._seed = seed
        self._world = world or {}
        self._advisor = Advisor(points, objectives, seed)
        self._claims: dict[str, Claim] = {}
        self._history = History()
        self._durations_s: list[float] = []
        self._attempts: collections.Counter[int] = collections.Counter()
        self._has_worked = False

    def run(self, limits: Limits) -> StudyResult:
        """Goes on with the study until `limits`, an empty space or a signal stop it.

        Raises:
            InputError: its trials were measured in another world.
            WorkError: infrastructure fails again and again. What was finished is kept.
            OSError, optuna or sqlalchemy errors: the disk is full (`open_study` explains them).
        """
        for record in self._store.refresh():
            self._learn(record, self._located(record), told(record, self._objectives, self._records))
        check_same_world(self._records, self._world, self._folder.path)
        for record in self._records:
            self._write_config(record)
        self._progress.begin(self._records, limits)
        try:
            stopped = self._loop(limits)
        except KeyboardInterrupt:
            stopped = None
        finally:
            self._pool.cancel()
            for claim in self._claims.values():
                self._store.abandon(claim)
        self._write_report()
        was_interrupted = bool(self._interrupt.signal_number)
        return StudyResult(tuple(self._records), "interrupted" if was_interrupted else stopped or "", was_interrupted)

    def _loop(self, limits: Limits) -> str | None:
        """Why the study is at its end; None when a signal came."""
        began_s, reported_s = time.monotonic(), -REPORT_EVERY_S
        while not self._interrupt.signal_number:
            stopped = self._fill(limits, began_s)
            if stopped is not None and not self._claims:
                return stopped
            # What takes time is done now, while every place is busy. That `_fill` did not know the latest does no harm:
            # whoever started a trial since has taken its number, so that our claim of the same fails.
            self._hear()
            if time.monotonic() - reported_s >= REPORT_EVERY_S:
                self._write_report()
                reported_s = time.monotonic()
            for record in self._pool.wait(WAIT_S, self):
                self._finish(record)
        return None

    # Starting trials.

    def _fill(self, limits: Limits, began_s: float) -> str | None:
        """Starts trials while there are places for them. Returns why none will be started any more, or None."""
        while not self._interrupt.signal_number and (place := self._pool.free_place()) is not None:
            done, running = self._history.num_done, len(self._store.running)
            elapsed_s = time.monotonic() - began_s
            stopped = limits.stop(done=done, running=running, elapsed_s=elapsed_s, durations_s=self._durations_s)
            stopped = stopped or self._hopeless()
            if stopped is not None:
                return stopped
            if limits.trials is not None and done + running >= limits.trials:
                return None  # all that are missing are under way; one that is lost will be tried again
            if not self._start(place):
                return None if running else "every configuration that the search space allows has been tried"
        return None

    def _start(self, place: str) -> bool:
        """Starts a trial, unless another search was faster. Returns False when there is none to start."""
        retry = to_retry(self._history.unsettled, self._attempts, {lease.number for lease in self._store.running})
        if retry is not None:
            number, attempt = retry.number, retry.attempt + 1
            point: Point | None = self._located(retry)
        else:
            number, attempt = self._next_number(), 0
            running = [self._points.located(EngineConfig.from_dict(lease.config)) for lease in self._store.running]
            self._advisor.expect(running)
            point = propose(
                points=self._points,
                advisor=self._advisor,
                objectives=self._objectives,
                records=self._records,
                running=[other.config.digest for other in running],
                number=number,
                seed=self._seed,
            )
        if point is None:
            return False
        claim = self._store.claim(point, number, attempt, place)
        if claim is None:
            self._hear()
            return True
        self._claims[claim.identity.uid] = claim
        misfit = self._predict(point.config)
        if misfit is not None:
            self._finish(predicted_oom(claim.identity, point.config, misfit))
            return True
        self._progress.trial(claim.identity, point.config, place)
        self._pool.start(claim.identity, point.config)
        return True

    def _next_number(self) -> int:
        return max([self._history.next_number, *(lease.number + 1 for lease in self._store.running)])

    @property
    def _records(self) -> Sequence[TrialRecord]:
        return self._history.records

    def _located(self, record: TrialRecord) -> Point:
        return self._points.located(EngineConfig.from_dict(record.config))

    # Hearing of trials.

    def phase(self, uid: str, name: str, fraction: float | None) -> None:
        self._progress.phase(uid, name, fraction)

    def placed(self, uid: str, place: str) -> None:
        claim = self._claims.get(uid)
        if claim is not None and claim.lease.place != place:
            self._claims[uid] = self._store.moved(claim, place)
            self._progress.moved(uid, place)

    def _hear(self) -> None:
        """Takes in what the other searches of this study have done."""
        for record in self._store.refresh():
            self._keep(record, self._located(record), told(record, self._objectives, self._records))
        self._progress.elsewhere([lease for lease in self._store.running if lease.uid not in self._claims])

    def _finish(self, record: TrialRecord) -> None:
        """One of our trials has ended."""
        claim = self._claims.get(record.uid)
        if claim is None or record.config_digest != claim.point.config.digest:
            raise RuntimeError(f"measured {record.uid}, which was not asked for")
        record = self._of_this_world(record)
        result = told(record, self._objectives, self._records)
        was_ours = self._store.finish(claim, record, result)
        del self._claims[record.uid]
        if was_ours:
            self._keep(record, claim.point, result)
        else:
            self._progress.say(
                f"trial {record.number}: its lease had been given up before it ended; the result is kept aside as late"
            )

    def _of_this_world(self, record: TrialRecord) -> TrialRecord:
        """The record; without its figures when a worker measured it on something else than the study's other trials."""
        changed = difference(self._records, record.provenance)
        if changed is None:
            return record
        detail = f"measured in another world ({changed}), which cannot be compared"
        return dataclasses.replace(
            record, outcome=Outcome(kind="harness", detail=detail), metrics={}, requests=(), quality={}, violations={}
        )

    def _learn(self, record: TrialRecord, point: Point, result: Told | None) -> None:
        self._history.add(record)
        self._advisor.learn(point, result)
        if was_built(record):
            self._durations_s.append(seconds(record))

    def _keep(self, record: TrialRecord, point: Point, result: Told | None) -> None:
        self._learn(record, point, result)
        self._write_config(record)
        self._progress.finished(record)
        self._attempts[record.number] += 1
        if record.outcome.kind != "harness":
            self._has_worked = True
        elif self._attempts[record.number] > RETRIES["harness"]:
            if not self._has_worked:
                raise WorkError(
                    f"trial {record.number} could not be run in {self._attempts[record.number]} attempts: "
                    f"{record.outcome.detail}; nothing is wrong with the configuration, so look at the machine, then "
                    "start the same command again"
                )
            self._has_worked = False

    def _hopeless(self) -> str | None:
        tail = self._records[-MAX_MISFITS:]
        if len(tail) == MAX_MISFITS and not any(was_built(record) for record in tail):
            return f"the last {MAX_MISFITS} configurations would not fit into memory: {tail[-1].outcome.detail}"
        return None

    def _write_config(self, record: TrialRecord) -> None:
        path = self._folder.config(record.number)
        # Every attempt at a trial has the same. A file that a power cut left empty is written again by the next search.
        if not path.exists() or path.stat().st_size == 0:
            write_file(path, dump_yaml(dict(record.config)).encode(), is_durable=False)

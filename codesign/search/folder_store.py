"""The store of one search on one machine: the study's folder.

    lease file -> record in trials/ (fsynced) -> added to study.db -> lease file removed

One process writes, however many workers measure for it: the search holds the folder's lock and its workers only answer
over their sockets. So SQLite never has two writers, and nothing here waits for another process.
"""

import dataclasses
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from codesign.results.ledger import write_record
from codesign.results.record import TrialRecord
from codesign.search import lease as leases
from codesign.search.advisor import frozen
from codesign.search.folder import StudyFolder
from codesign.search.lease import Lease
from codesign.search.ledger import load
from codesign.search.objective import Told
from codesign.search.storage import open_index
from codesign.search.store import Claim
from codesign.search.suggest import Point, Points
from codesign.search.trial_rows import UID
from codesign.spec.metrics import Objective


class FolderStore:
    """Opens the records and the index of a folder whose lock we hold.

    Raises:
        OSError, optuna or sqlalchemy errors: the disk is full (`open_study` explains them).
    """

    def __init__(
        self, folder: StudyFolder, *, points: Points, objectives: Sequence[Objective], say: Callable[[str], None]
    ) -> None:
        self._folder = folder
        self._holding = leases.hold(folder.leases)
        self._lease = self._holding.__enter__()
        self._running: dict[str, Lease] = {}
        try:
            for other in leases.sweep(folder.leases):
                if other.worker != self._lease.worker:  # we hold the lock, so whoever wrote this is gone
                    leases.drop(folder.leases, other)
            self._fresh: Sequence[TrialRecord] = load(folder.trials, say)
            self._index = open_index(
                folder.index, name=folder.name, points=points, objectives=objectives, records=self._fresh, say=say
            )
        except BaseException:
            self._holding.__exit__(None, None, None)
            raise

    @property
    def running(self) -> Sequence[Lease]:
        return tuple(self._running.values())

    def refresh(self) -> Sequence[TrialRecord]:
        fresh, self._fresh = self._fresh, ()
        return fresh

    def claim(self, point: Point, number: int, attempt: int, place: str) -> Claim:
        identity = self._folder.identity(number, attempt, point.config.digest)
        lease = dataclasses.replace(
            self._lease,
            worker=f"{self._lease.worker}-{number}-{attempt}",
            uid=identity.uid,
            number=number,
            attempt=attempt,
            config=point.config.to_dict(),
            place=place,
            since=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        leases.write(self._folder.leases, lease)
        self._running[identity.uid] = lease
        return Claim(identity=identity, point=point, lease=lease)

    def moved(self, claim: Claim, place: str) -> Claim:
        lease = dataclasses.replace(claim.lease, place=place)
        leases.write(self._folder.leases, lease)
        self._running[claim.identity.uid] = lease
        return dataclasses.replace(claim, lease=lease)

    def finish(self, claim: Claim, record: TrialRecord, told: Told | None) -> bool:
        write_record(self._folder.trials, record)
        self._index.add(frozen(claim.point, told, **{UID: record.uid}))
        self.abandon(claim)
        return True

    def abandon(self, claim: Claim) -> None:
        leases.drop(self._folder.leases, claim.lease)
        self._running.pop(claim.identity.uid, None)

    def close(self) -> None:
        self._index.close()
        self._holding.__exit__(None, None, None)

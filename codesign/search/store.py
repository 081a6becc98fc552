"""Where a study's records and running trials are kept: what the study loop asks of it, and nothing more.

folder_store    one search on one machine: trials/*.json is the truth, study.db Optuna's index over it
sql_store       several searches on several machines: one PostgreSQL database holds both, the folder is a mirror
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.lease import Lease
from codesign.search.objective import Told
from codesign.search.suggest import Point


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim:
    """A trial that is ours to measure.

    Attributes:
        token: in a database new for every lease, so that a result that comes after the lease was given up is known as
            late; "" in a folder, which has one writer.
    """

    identity: TrialIdentity
    point: Point
    lease: Lease
    token: str = ""


class Store(Protocol):
    """An opened study's records and leases."""

    @property
    def running(self) -> Sequence[Lease]:
        """Trials that somebody measures now, ours included, as of the last `refresh`, `claim` or `finish`."""
        ...

    def refresh(self) -> Sequence[TrialRecord]:
        """Records that were not handed over yet, whoever measured them, in the order in which they were told.

        Keeps our leases alive, and turns those of dead workers into `harness` records.
        """
        ...

    def claim(self, point: Point, number: int, attempt: int, place: str) -> Claim | None:
        """Makes a trial ours; None when somebody else was faster: refresh, and choose again."""
        ...

    def moved(self, claim: Claim, place: str) -> Claim:
        """Says where the trial really runs."""
        ...

    def finish(self, claim: Claim, record: TrialRecord, told: Told | None) -> bool:
        """Makes a record durable, ends its lease and tells the index, in this order or at once.

        Returns:
            False when the lease was given up before: the record is kept aside as late, and not told.
        """
        ...

    def abandon(self, claim: Claim) -> None:
        """Ends a lease without a record: a signal came, the trial never happened."""
        ...

    def close(self) -> None: ...

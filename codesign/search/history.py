"""The records of a study as its loop needs them after each trial, at a cost that hardly grows with their number."""

import bisect
from collections.abc import Iterable, Sequence

from codesign.results.record import TrialRecord
from codesign.search.retry import is_settled


class History:
    """Args:
    records: what is known from before.
    """

    def __init__(self, records: Iterable[TrialRecord] = ()) -> None:
        self._records: list[TrialRecord] = []
        self._latest: dict[int, TrialRecord] = {}
        self._unsettled: dict[int, TrialRecord] = {}
        self._num_done = 0
        for record in records:
            self.add(record)

    def add(self, record: TrialRecord) -> None:
        bisect.insort(self._records, record, key=_place)
        before = self._latest.get(record.number)
        if before is not None and before.attempt > record.attempt:
            return
        self._latest[record.number] = record
        self._num_done += _counts(record) - (before is not None and _counts(before))
        self._unsettled.pop(record.number, None)
        if not is_settled(record):
            self._unsettled[record.number] = record

    @property
    def records(self) -> Sequence[TrialRecord]:
        """All of them, by number and attempt; a view that grows with each `add`."""
        return self._records

    @property
    def unsettled(self) -> Sequence[TrialRecord]:
        """The last attempts that say nothing about their configuration."""
        return tuple(self._unsettled.values())

    @property
    def num_done(self) -> int:
        """Trials that count towards the total: those that were built, and that will not be tried again."""
        return self._num_done

    @property
    def next_number(self) -> int:
        """One more than the highest number of a trial."""
        return self._records[-1].number + 1 if self._records else 0


def _place(record: TrialRecord) -> tuple[int, int]:
    return record.number, record.attempt


def _counts(record: TrialRecord) -> bool:
    return was_built(record) and is_settled(record)


def was_built(record: TrialRecord) -> bool:
    """Whether the configuration was really built, or only predicted not to fit."""
    return not record.trust.get("predicted", False)


def seconds(record: TrialRecord) -> float:
    """How long the trial took; phases with a dot in their name are parts of others."""
    return sum(duration for phase, duration in record.phases.items() if "." not in phase)

"""Which trials are tried again, by the cause of their end.

    harness    a lost worker, a dead node, a disk: nothing to do with the configuration     2 more attempts
    hang       a clock of the trial ran out: the machine may have been at fault              1 more attempt
    the rest   out of memory, unsupported, NaN, a crash: the same again would end the same    none

Each attempt is a record of its own (same number, next attempt), and the last one counts.
"""

from collections.abc import Collection, Mapping, Sequence

from codesign.results.record import OutcomeKind, TrialRecord

RETRIES: Mapping[OutcomeKind, int] = {"harness": 2, "hang": 1}


def is_settled(record: TrialRecord) -> bool:
    """Whether the record says something about its configuration, so that it counts and is told to the sampler."""
    return record.outcome.kind != "harness" and not (record.outcome.kind == "hang" and record.attempt == 0)


def latest(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The last attempt of each trial, by number."""
    by_number = {record.number: record for record in sorted(records, key=lambda item: (item.number, item.attempt))}
    return list(by_number.values())


def to_retry(
    records: Sequence[TrialRecord], attempts: Mapping[int, int], running: Collection[int]
) -> TrialRecord | None:
    """The latest record of a trial that has attempts left, or None.

    Args:
        attempts: number -> attempts that ended in this run; a search that is started again has a new supply.
        running: numbers of which an attempt is under way.
    """
    for record in latest(records):
        may = attempts.get(record.number, 0) <= RETRIES.get(record.outcome.kind, 0)
        if not is_settled(record) and may and record.number not in running:
            return record
    return None

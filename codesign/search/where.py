"""What runs where, in words: host, worker process, device."""

from collections.abc import Mapping, Sequence
from typing import Any

from codesign.results.record import TrialRecord
from codesign.search.lease import Lease


def where(lease: Lease) -> str:
    """`node-7, search 4711, worker 4712, cores 0-3`: of a trial that runs."""
    return ", ".join(part for part in (lease.host, f"search {lease.pid}", lease.place) if part)


def running_document(leases: Sequence[Lease]) -> list[dict[str, Any]]:
    """The same of all that run, as plain data."""
    return [
        {
            "number": lease.number,
            "attempt": lease.attempt,
            "host": lease.host,
            "search": lease.pid,
            "place": lease.place,
            "since": lease.since,
            "config": dict(lease.config),
        }
        for lease in leases
    ]


def placement_text(record: TrialRecord) -> str:
    """The same of a trial that has ended; "" where its record does not say."""
    placement: Any = record.provenance.get("placement")
    if not isinstance(placement, Mapping):
        return ""
    parts = (placement.get("host"), f"worker {placement.get('worker')}", placement.get("device"))
    return ", ".join(str(part) for part in parts if part)

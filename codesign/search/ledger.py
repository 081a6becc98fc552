"""Reading a study's ledger at the start of a run: good records in, damaged files put aside, never deleted."""

from collections.abc import Callable
from pathlib import Path

from codesign.results.ledger import quarantine, read_records
from codesign.results.record import TrialRecord


def load(folder: Path, say: Callable[[str], None]) -> list[TrialRecord]:
    """Every readable record of a ledger, by number and attempt. To be called by the only writer.

    A file that is no record is moved to `damaged/` and said aloud; its trial is measured again if the search comes by.
    """
    for left in folder.glob(".*.tmp"):  # writes that were cut off
        left.unlink(missing_ok=True)
    records, damaged = read_records(folder)
    for item in damaged:
        target = quarantine(item)
        say(f"{item.path.name} is damaged ({item.reason}); it was moved to {target}, its trial counts as not measured")
    return records

"""The ledger: one immutable, fsynced file per finished trial. It is the truth of a study; every index derives from it.

trials/<uid>.json           a record, written before anybody is told about the trial
trials/damaged/<uid>.json   what could not be read, moved there only when asked
"""

import dataclasses
import os
import re
from pathlib import Path

from codesign.errors import WorkError
from codesign.results.files import read_file, sync_folder, work_error, write_file
from codesign.results.record import TrialRecord

MAX_RECORD_BYTES = 64 * 2**20

_UID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,95}")


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A file in the ledger that is not a record, and why."""

    path: Path
    reason: str


def write_record(folder: Path, record: TrialRecord, *, is_durable: bool = True) -> Path:
    """Adds a record; when this returns, it survives a power cut. Writing the identical record again does nothing.

    Args:
        is_durable: False in a mirror, whose records are safe elsewhere: one that a power cut tears is written again.
    Raises:
        WorkError: it could not be written, the text says what to do; or another record has this uid.
        ValueError: the record holds NaN or infinity, or its uid is no file name: our own mistake.
    """
    if not _UID.fullmatch(record.uid):
        raise ValueError(f"uid must match {_UID.pattern}, got {record.uid!r}")
    data = record.to_json().encode()
    path = folder / f"{record.uid}.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        exists = os.path.lexists(path)
    except OSError as error:
        raise work_error("cannot write", path, error) from error
    if not exists:
        write_file(path, data, is_durable=is_durable)
    elif read_file(path, max_bytes=MAX_RECORD_BYTES) != data:
        raise WorkError(f"{path}: holds another record already; records are never replaced")
    elif is_durable:
        sync_folder(folder)  # the first attempt may have failed right after its rename
    return path


def read_records(folder: Path) -> tuple[list[TrialRecord], list[Damaged]]:
    """Every readable record, sorted by number and attempt, and every file that is none.

    A missing folder is an empty ledger. Temporary files of an interrupted write (names with a leading dot) are not
    records and are passed over.

    Raises:
        WorkError: the folder itself cannot be listed.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.suffix == ".json" and not path.name.startswith("."))
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise work_error("cannot list", folder, error) from error
    records: list[TrialRecord] = []
    damaged: list[Damaged] = []
    for path in paths:
        try:
            record = _read(path)
        except WorkError as error:
            damaged.append(Damaged(path, str(error)))
        else:
            records.append(record)
    return sorted(records, key=lambda record: (record.number, record.attempt, record.uid)), damaged


def quarantine(damaged: Damaged) -> Path:
    """Moves a damaged file to `damaged/` below its folder, so that it is not met again. Never deletes.

    Raises:
        WorkError: it could not be moved.
    """
    folder = damaged.path.parent / "damaged"
    try:
        folder.mkdir(exist_ok=True)
        target = folder / damaged.path.name
        count = 0
        while os.path.lexists(target):
            count += 1
            target = folder / f"{damaged.path.stem}.{count}.json"
        os.rename(damaged.path, target)
    except OSError as error:
        raise work_error("cannot move", damaged.path, error) from error
    sync_folder(folder)
    sync_folder(damaged.path.parent)
    return target


def _read(path: Path) -> TrialRecord:
    data = read_file(path, max_bytes=MAX_RECORD_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise WorkError("not a trial record: not UTF-8 text") from None
    record = TrialRecord.from_json(text)
    if record.uid != path.stem:
        raise WorkError(f"not this trial's record: it holds uid {record.uid!r}")
    return record

"""A disk that is full, a quota or a file size limit: said in one message instead of a traceback."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy

from codesign.errors import WorkError
from codesign.search.storage import is_full
from codesign.units import MIB, format_bytes

_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file size limit is met",
}
_OTHER = {
    errno.EIO: "the disk reports an error",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
}
# study.db, the page with its plotting library, and some hundred records.
STUDY_BYTES = 32 * MIB


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Turns failures to write below `folder` into a WorkError that says what, where and how much is needed."""
    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as error:
        if not is_full(error):
            raise
        raise WorkError(_message(folder, "the disk is full or fails", folder / "study.db")) from error
    except WorkError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno not in _FULL:
            raise
        raise WorkError(f"{error}. {_advice(folder)}") from error
    except OSError as error:
        reason = _FULL.get(error.errno or 0) or _OTHER.get(error.errno or 0)
        if reason is None:
            raise
        raise WorkError(_message(folder, reason, error.filename or folder)) from error


def _message(folder: Path, reason: str, where: object) -> str:
    return f"cannot write {where}: {reason}. {_advice(folder)}"


def _advice(folder: Path) -> str:
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    try:
        free = f"{format_bytes(shutil.disk_usage(there).free)} free"
    except OSError:
        free = "free space unknown"
    return (
        f"There: {free}; a study needs about {format_bytes(STUDY_BYTES)}. Every finished trial is kept in "
        f"{folder / 'trials'}; make room and start the same command again to go on"
    )

"""study.db: Optuna's index over the ledger, for Optuna's own tools, and nothing more.

The records in `trials/` are the truth, and what runs stands in `leases/`. The index holds finished trials only, each
added in one transaction after its record is on disk. It is checked against the records on every start and rebuilt from
them when it is missing, truncated or in disagreement: the search died between record and index, say. That is why its
writes are not fsynced (`synchronous=OFF` makes them ten times cheaper): after a power cut it is at worst rebuilt.
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from codesign.results.record import TrialRecord
from codesign.search.advisor import frozen
from codesign.search.objective import told
from codesign.search.suggest import Points
from codesign.search.trial_rows import UID, add_trials, uids
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective

_BUSY_TIMEOUT_S = 30
OBJECTIVES = "objectives"  # study attribute: labels, because Optuna itself stores directions only


class Index:
    """An open study.db. Its only writer is the search that holds the folder's lock, so it can count trials itself."""

    def __init__(self, study: optuna.Study, storage: optuna.storages.RDBStorage) -> None:
        self._labels = study.user_attrs.get(OBJECTIVES)
        self._study_id: int = storage.get_study_id_from_name(study.study_name)
        self._engine: sqlalchemy.Engine = storage.engine
        storage.remove_session()
        with self._engine.begin() as connection:
            self._uids = uids(connection, self._study_id)
        self._count = len(self._uids)

    def add(self, *trials: FrozenTrial) -> None:
        """Adds finished trials: all or none."""
        with self._engine.begin() as connection:
            add_trials(connection, self._study_id, self._count, trials)
        self._count += len(trials)

    def disagreement(self, objectives: Sequence[Objective], records: Sequence[TrialRecord]) -> str | None:
        """In what the index, as it was opened, differs from the ledger, or None."""
        if self._labels != [objective.label for objective in objectives]:
            return "its objectives are others"
        is_same = sorted(self._uids) == sorted(record.uid for record in records)
        return None if is_same else "its trials are not those of the records"

    def close(self) -> None:
        self._engine.dispose()


def open_index(
    path: Path,
    *,
    name: str,
    points: Points,
    objectives: Sequence[Objective],
    records: Sequence[TrialRecord],
    say: Callable[[str], None],
) -> Index:
    """The index of a study, in agreement with its records: rebuilt where necessary.

    Args:
        name: of the study.
        records: the whole ledger.
        say: told when and why the index is rebuilt.
    """
    reason = _damage(path)
    if reason is None:
        try:
            index = _connect(path, name, objectives)
            reason = index.disagreement(objectives, records)
            if reason is None:
                return index
            index.close()
        except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError, KeyError, ValueError) as error:
            if is_full(error):
                raise
            reason = f"it cannot be read ({type(error).__name__})"
    if records or path.exists():
        say(f"{path} is rebuilt from {len(records)} records: {reason}")
    return rebuild(path, name=name, points=points, objectives=objectives, records=records)


def rebuild(
    path: Path, *, name: str, points: Points, objectives: Sequence[Objective], records: Sequence[TrialRecord]
) -> Index:
    """A fresh index with one finished trial per record, in the order of the records."""
    part = path.with_name(path.name + ".part")
    for old in (part, part.with_name(part.name + "-journal")):
        old.unlink(missing_ok=True)
    index = _connect(part, name, objectives)
    index.add(*finished(records, points, objectives))
    index.close()
    # The journal of the old file first: SQLite would roll the new file back with it.
    for suffix in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    part.replace(path)
    return _connect(path, name, objectives)


def finished(
    records: Sequence[TrialRecord], points: Points, objectives: Sequence[Objective]
) -> list[optuna.trial.FrozenTrial]:
    """The trial of each record.

    Args:
        records: in the order in which they were told.
    """
    return [
        frozen(
            points.located(EngineConfig.from_dict(record.config)),
            told(record, objectives, records[:place]),
            **{UID: record.uid},
        )
        for place, record in enumerate(records)
    ]


def _connect(path: Path, name: str, objectives: Sequence[Objective]) -> Index:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
    )
    sqlalchemy.event.listen(storage.engine, "connect", _without_fsync)
    storage.engine.dispose()  # connections made while opening have not heard the listener
    directions = [objective.direction for objective in objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    if OBJECTIVES not in study.user_attrs:
        study.set_user_attr(OBJECTIVES, [objective.label for objective in objectives])
    return Index(study, storage)


def _without_fsync(connection: Any, _record: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")


def _damage(path: Path) -> str | None:
    """Why the file cannot be used, or None."""
    if not path.exists():
        return "it is missing"
    try:
        connection = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=_BUSY_TIMEOUT_S)
        try:
            answer = connection.execute("PRAGMA quick_check").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        return f"it is damaged ({error})"
    return None if answer == "ok" else f"it is damaged ({str(answer).splitlines()[0]})"


def is_full(error: BaseException) -> bool:
    """Whether SQLite could not write because the disk, quota or file size limit is reached."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, sqlite3.OperationalError) and ("disk is full" in text or "disk I/O error" in text):
            return True
        seen = seen.__cause__ or seen.__context__
    return False

"""study.db: Optuna's index over the ledger, and nothing more.

The records in `trials/` are the truth. This index shows what is running and lets Optuna's own tools open a study. It is
checked against the records on every start and rebuilt from them when it is missing, truncated or in disagreement. That
is why its writes are not fsynced (`synchronous=OFF` makes them ten times cheaper): after a power cut it is at worst
rebuilt.

    start -> RUNNING with its worker and record uid, in one transaction -> record on disk -> tell
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from codesign.results.record import TrialRecord
from codesign.search.advisor import frozen
from codesign.search.objective import Told, told
from codesign.search.suggest import Point, Points
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective

_BUSY_TIMEOUT_S = 30
_OBJECTIVES = "objectives"  # study attribute: labels, because Optuna itself stores directions only
_UID = "uid"  # trial attribute: of the record
_WORKER = "worker"  # trial attribute: name of the lease


class Index:
    """An open study.db."""

    def __init__(self, study: optuna.Study, storage: optuna.storages.RDBStorage) -> None:
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)

    def start(self, point: Point, worker: str, uid: str) -> int:
        """Adds a RUNNING trial that belongs to a worker's lease and to the record to come. Returns its id."""
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=dict(point.params),
            distributions=dict(point.distributions),
            user_attrs={_WORKER: worker, _UID: uid},
        )
        trial_id: int = self._storage.create_new_trial(self._study_id, template_trial=template)
        return trial_id

    def tell(self, trial_id: int, told: Told | None) -> None:
        """Finishes a RUNNING trial. None tells FAIL: it happened, and teaches nothing."""
        if told is None:
            self._storage.set_trial_state_values(trial_id, state=TrialState.FAIL)
            return
        trial = optuna.Trial(self._study, trial_id)
        for name, amount in told.constraints.items():
            trial.set_constraint(name, amount)
        if told.is_sentinel:
            trial.set_user_attr("sentinel", True)
        self._storage.set_trial_state_values(trial_id, state=TrialState.COMPLETE, values=told.values)

    def add(self, trial: FrozenTrial) -> None:
        """Adds a finished trial."""
        self._storage.create_new_trial(self._study_id, template_trial=trial)

    def reap(self, objectives: Sequence[Objective], records: Sequence[TrialRecord]) -> list[FrozenTrial]:
        """Finishes what dead workers left RUNNING: told where the record exists, FAIL where it does not.

        To be called before any trial of ours is started. Returns every trial as it was before.
        """
        places = {record.uid: place for place, record in enumerate(records)}
        trials: list[FrozenTrial] = self._storage.get_all_trials(self._study_id, deepcopy=False)
        for trial in trials:
            if trial.state.is_finished():
                continue
            place = places.get(trial.user_attrs.get(_UID, ""))
            self.tell(trial._trial_id, None if place is None else told(records[place], objectives, records[:place]))
        return trials

    def disagreement(
        self, objectives: Sequence[Objective], records: Sequence[TrialRecord], trials: Sequence[FrozenTrial]
    ) -> str | None:
        """In what the index differs from the ledger, or None.

        Args:
            trials: as `reap` returned them.
        """
        if self._study.user_attrs.get(_OBJECTIVES) != [objective.label for objective in objectives]:
            return "its objectives are others"
        known = {record.uid for record in records}
        # A trial that ended without a record (a signal, a kill) is FAIL here and unknown there.
        indexed = sorted(
            uid
            for trial in trials
            if (uid := trial.user_attrs.get(_UID)) and (uid in known or trial.state == TrialState.COMPLETE)
        )
        return None if indexed == sorted(known) else "its trials are not those of the records"

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()


def open_index(
    path: Path,
    *,
    name: str,
    points: Points,
    objectives: Sequence[Objective],
    records: Sequence[TrialRecord],
    say: Callable[[str], None],
) -> Index:
    """The index of a study, in agreement with its records: dead trials finished, rebuilt where necessary.

    Args:
        name: of the study.
        records: the whole ledger.
        say: told when and why the index is rebuilt.
    """
    reason = _damage(path)
    if reason is None:
        try:
            index = _connect(path, name, objectives)
            reason = index.disagreement(objectives, records, index.reap(objectives, records))
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
    for place, record in enumerate(records):
        point = points.located(EngineConfig.from_dict(record.config))
        index.add(frozen(point, told(record, objectives, records[:place]), **{_UID: record.uid}))
    index.close()
    # The journal of the old file first: SQLite would roll the new file back with it.
    for suffix in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    part.replace(path)
    return _connect(path, name, objectives)


def _connect(path: Path, name: str, objectives: Sequence[Objective]) -> Index:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": _BUSY_TIMEOUT_S}}
    )
    sqlalchemy.event.listen(storage.engine, "connect", _without_fsync)
    storage.engine.dispose()  # connections made while opening have not heard the listener
    directions = [objective.direction for objective in objectives]
    study = optuna.create_study(storage=storage, study_name=name, directions=directions, load_if_exists=True)
    if _OBJECTIVES not in study.user_attrs:
        study.set_user_attr(_OBJECTIVES, [objective.label for objective in objectives])
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

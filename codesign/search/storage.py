"""study.db: Optuna's index over the ledger, and nothing more.

The records in `trials/` are the truth. This index exists so that a sampler can be asked quickly and so that Optuna's
own tools can open a study. It is checked against the records on every start and rebuilt from them when it is missing,
truncated or in disagreement. That is why its writes are not fsynced (`synchronous=OFF` makes them ten times cheaper):
after a power cut it is at worst rebuilt.

    ask/add -> RUNNING -> claim(worker) -> bind(uid) -> record on disk -> tell
"""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial, TrialState

from codesign.results.record import TrialRecord
from codesign.search.objective import Told, told
from codesign.search.sampler import make_sampler
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

    def running(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    def finished_uids(self) -> list[str]:
        """Record uids of the trials that were told, in Optuna's order."""
        states = (TrialState.COMPLETE, TrialState.FAIL)
        trials = self._study.get_trials(deepcopy=False, states=states)
        return [trial.user_attrs[_UID] for trial in trials if trial.user_attrs.get(_UID)]

    def trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def ask(self, seed: int, *place: int) -> optuna.Trial:
        """A new RUNNING trial whose knobs the sampler will suggest."""
        self._study.sampler = make_sampler(seed, *place)
        return self._study.ask()

    def add(self, point: Point) -> optuna.Trial:
        """A new RUNNING trial with given knobs."""
        template = optuna.create_trial(
            state=TrialState.RUNNING, params=dict(point.params), distributions=dict(point.distributions)
        )
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        trial_id = self._storage.create_new_trial(study_id, template_trial=template)
        return optuna.Trial(self._study, trial_id)

    def claim(self, trial: optuna.Trial, worker: str) -> None:
        """Says which worker runs the trial. Until then it is nobody's, and the next start finishes it."""
        trial.set_user_attr(_WORKER, worker)

    def bind(self, trial: optuna.Trial, uid: str) -> None:
        """Says which record the trial will write."""
        trial.set_user_attr(_UID, uid)

    def tell(self, number: int, told: Told | None) -> None:
        """Finishes RUNNING trial `number` (Optuna's number). None tells FAIL: it happened, and teaches nothing."""
        if told is None:
            self._study.tell(number, state=TrialState.FAIL)
            return
        trial = optuna.Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number))
        for name, amount in told.constraints.items():
            trial.set_constraint(name, amount)
        trial.set_user_attr("sentinel", told.is_sentinel)
        self._study.tell(number, list(told.values))

    def reject(self, trial: optuna.Trial, told: Told | None, reason: str) -> None:
        """Finishes a trial that is not measured and has no record."""
        trial.set_user_attr("rejected", reason)
        self.tell(trial.number, told)

    def close(self) -> None:
        self._storage.remove_session()
        self._storage.engine.dispose()

    @property
    def _study_id(self) -> int:
        return self._storage.get_study_id_from_name(self._study.study_name)


def open_index(
    path: Path,
    *,
    name: str,
    points: Points,
    objectives: Sequence[Objective],
    records: Sequence[TrialRecord],
    living: Sequence[str],
    say: Callable[[str], None],
) -> Index:
    """The index of a study, in agreement with its records: dead trials finished, rebuilt where necessary.

    Args:
        name: of the study.
        records: the whole ledger.
        living: workers whose running trials are left alone.
        say: told when and why the index is rebuilt.
    """
    reason = _damage(path)
    if reason is None:
        try:
            index = _connect(path, name, objectives)
            reap(index, objectives, records, living)
            reason = _disagreement(index, objectives, records)
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
    earlier: list[TrialRecord] = []
    for record in records:
        index._study.add_trial(_frozen(record, points, told(record, objectives, earlier)))
        earlier.append(record)
    index.close()
    # The journal of the old file first: SQLite would roll the new file back with it.
    for suffix in ("-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    part.replace(path)
    return _connect(path, name, objectives)


def reap(index: Index, objectives: Sequence[Objective], records: Sequence[TrialRecord], living: Sequence[str]) -> None:
    """Finishes what dead workers left RUNNING: told where the record exists, FAIL where it does not."""
    by_uid = {record.uid: place for place, record in enumerate(records)}
    for trial in index.running():
        if trial.user_attrs.get(_WORKER) in living:
            continue
        place = by_uid.get(trial.user_attrs.get(_UID, ""))
        if place is None:
            index._study.tell(trial.number, state=TrialState.FAIL)
        else:
            index.tell(trial.number, told(records[place], objectives, records[:place]))


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


def _disagreement(index: Index, objectives: Sequence[Objective], records: Sequence[TrialRecord]) -> str | None:
    if index._study.user_attrs.get(_OBJECTIVES) != [objective.label for objective in objectives]:
        return "its objectives are others"
    if sorted(index.finished_uids()) != sorted(record.uid for record in records):
        return "its trials are not those of the records"
    return None


def _frozen(record: TrialRecord, points: Points, told: Told | None) -> FrozenTrial:
    point = points.located(EngineConfig.from_dict(record.config))
    return optuna.create_trial(
        state=TrialState.FAIL if told is None else TrialState.COMPLETE,
        values=None if told is None else list(told.values),
        params=dict(point.params),
        distributions=dict(point.distributions),
        user_attrs={_UID: record.uid} | ({} if told is None else {"sentinel": told.is_sentinel}),
        constraints=None if told is None else told.constraints,
    )


def is_full(error: BaseException) -> bool:
    """Whether SQLite could not write because the disk, quota or file size limit is reached."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        if isinstance(seen, sqlite3.OperationalError) and ("disk is full" in text or "disk I/O error" in text):
            return True
        seen = seen.__cause__ or seen.__context__
    return False

"""Optuna's index of a shared study, in the database that holds its records, for Optuna's own tools.

It holds finished trials only, each added in the transaction that ends its lease, so it cannot disagree with the ledger;
where somebody deleted it, the next trial to end or the next search to start makes it again. What runs stands in the
ledger.
"""

from collections.abc import Callable, Sequence

import optuna
import sqlalchemy
from sqlalchemy import Connection
from sqlalchemy.orm import scoped_session, sessionmaker

from codesign.results.record import TrialRecord
from codesign.search.database import Database
from codesign.search.storage import OBJECTIVES, finished
from codesign.search.suggest import Points
from codesign.search.trial_rows import add_trials, study_id_of, uids
from codesign.spec.metrics import Objective


class SqlIndex:
    """Args:
    name: of the study.
    records: every record in the order in which it was told, kept from changing by the transaction.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        points: Points,
        objectives: Sequence[Objective],
        records: Callable[[Connection], Sequence[TrialRecord]],
    ) -> None:
        self._database = database
        self._name = name
        self._points = points
        self._objectives = tuple(objectives)
        self._records = records

    def open(self) -> None:
        """Creates what is missing, and makes the index again where it is not that of the records."""
        url = self._database.url.render_as_string(hide_password=False)
        self._storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
        self._database.run(self._agree)

    def add(self, connection: Connection, number: int, trial: optuna.trial.FrozenTrial) -> None:
        """Adds a finished trial, as a part of the transaction that makes its record the `number`-th that was told."""
        study_id = study_id_of(connection, self._name)
        if study_id is None:
            self._make(connection, self._records(connection))
        else:
            add_trials(connection, study_id, number, [trial])

    def _agree(self, connection: Connection) -> None:
        records = self._records(connection)
        study_id = study_id_of(connection, self._name)
        if study_id is not None:
            self._join(connection)
            labels = [objective.label for objective in self._objectives]
            is_same = self._storage.get_study_user_attrs(study_id).get(OBJECTIVES) == labels
            if is_same and uids(connection, study_id) == [record.uid for record in records]:
                return
            self._storage.delete_study(study_id)
        self._make(connection, records)

    def _make(self, connection: Connection, records: Sequence[TrialRecord]) -> None:
        self._join(connection)
        directions = [optuna.study.StudyDirection[objective.direction.upper()] for objective in self._objectives]
        study_id = self._storage.create_new_study(directions, self._name)
        self._storage.set_study_user_attr(study_id, OBJECTIVES, [objective.label for objective in self._objectives])
        add_trials(connection, study_id, 0, finished(records, self._points, self._objectives))

    def _join(self, connection: Connection) -> None:
        """What Optuna commits from now on is a savepoint of the connection's transaction."""
        session = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
        self._storage.scoped_session = scoped_session(session)

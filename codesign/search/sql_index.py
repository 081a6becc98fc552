"""Optuna's index of a shared study, in the database that holds its records, for Optuna's own tools.

It holds finished trials only, each added in the transaction that ends its lease, so it cannot disagree with the ledger:
what Optuna commits is a savepoint of that transaction. What runs stands in the ledger.
"""

from collections.abc import Callable, Sequence

import optuna
import sqlalchemy
from sqlalchemy import Connection
from sqlalchemy.orm import scoped_session, sessionmaker

from codesign.results.record import TrialRecord
from codesign.search.advisor import frozen
from codesign.search.database import Database
from codesign.search.objective import told
from codesign.search.suggest import Points
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective

_OBJECTIVES = "objectives"  # study attribute: labels, because Optuna itself stores directions only


class SqlIndex:
    """Args:
    name: of the study.
    """

    def __init__(self, database: Database, name: str, points: Points, objectives: Sequence[Objective]) -> None:
        self._database = database
        self._name = name
        self._points = points
        self._objectives = tuple(objectives)

    def open(self, records: Callable[[Connection], Sequence[TrialRecord]]) -> None:
        """Creates what is missing, and makes the index again where it is not that of the records: somebody deleted it.

        Args:
            records: every record in the order in which it was told, kept from changing by the transaction.
        """
        url = self._database.url.render_as_string(hide_password=False)
        self._storage = optuna.storages.RDBStorage(url, engine_kwargs={"poolclass": sqlalchemy.pool.NullPool})
        self._database.run(lambda connection: self._agree(connection, records(connection)))

    def add(self, connection: Connection, trial: optuna.trial.FrozenTrial) -> None:
        """Adds a finished trial, as a part of the connection's transaction."""
        self._join(connection)
        self._storage.create_new_trial(self._storage.get_study_id_from_name(self._name), template_trial=trial)

    def _agree(self, connection: Connection, records: Sequence[TrialRecord]) -> None:
        self._join(connection)
        known = sorted(record.uid for record in records)
        labels = [objective.label for objective in self._objectives]
        studies = {study.study_name: study for study in self._storage.get_all_studies()}
        if self._name in studies:
            study = studies[self._name]
            trials = self._storage.get_all_trials(study._study_id, deepcopy=False)
            is_same = study.user_attrs.get(_OBJECTIVES) == labels
            if is_same and sorted(trial.user_attrs.get("uid", "") for trial in trials) == known:
                return
            self._storage.delete_study(study._study_id)
        directions = [optuna.study.StudyDirection[objective.direction.upper()] for objective in self._objectives]
        study_id = self._storage.create_new_study(directions, self._name)
        self._storage.set_study_user_attr(study_id, _OBJECTIVES, labels)
        for place, record in enumerate(records):
            point = self._points.located(EngineConfig.from_dict(record.config))
            result = told(record, self._objectives, records[:place])
            self.add(connection, frozen(point, result, uid=record.uid))

    def _join(self, connection: Connection) -> None:
        """What Optuna commits from now on is a part of the connection's transaction."""
        session = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
        self._storage.scoped_session = scoped_session(session)

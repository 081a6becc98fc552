"""Finished trials as rows of Optuna's tables, with one statement per table.

Optuna's own `create_new_trial` looks the trial up again for each value, parameter and attribute and counts all earlier
trials: some thirty statements, more with each trial. All that is known here. The columns and their encodings are those
of Optuna's own models; tests/search/test_trial_rows.py compares what both write.
"""

import datetime
import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy
from optuna.distributions import distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy import Connection

UID = "uid"  # user attribute of a trial: of its record

_TRIALS: sqlalchemy.Table = models.TrialModel.__table__
_ATTRIBUTES: sqlalchemy.Table = models.TrialUserAttributeModel.__table__


def add_trials(connection: Connection, study_id: int, first: int, trials: Sequence[FrozenTrial]) -> None:
    """Adds finished trials as a part of the connection's transaction.

    Args:
        first: number of the first of them in their study; the others follow.
    """
    if not trials:
        return
    rows = [
        {"study_id": study_id, "number": number, "state": trial.state,
         "datetime_start": _utc(trial.datetime_start), "datetime_complete": _utc(trial.datetime_complete)}
        for number, trial in enumerate(trials, first)
    ]  # fmt: skip
    added = sqlalchemy.insert(_TRIALS).returning(_TRIALS.c.trial_id, sort_by_parameter_order=True)
    ids = connection.execute(added, rows).scalars().all()
    parts: dict[Any, list[dict[str, Any]]] = {
        models.TrialValueModel: [],
        models.TrialParamModel: [],
        models.TrialUserAttributeModel: [],
        models.TrialSystemAttributeModel: [],
    }
    for trial_id, trial in zip(ids, trials, strict=True):
        for model, columns in _parts(trial):
            parts[model].append({"trial_id": trial_id, **columns})
    for model, rows in parts.items():
        if rows:
            connection.execute(sqlalchemy.insert(model.__table__), rows)


def _parts(trial: FrozenTrial) -> list[tuple[Any, dict[str, Any]]]:
    """(table, row without the trial's id) for everything that belongs to a trial."""
    found: list[tuple[Any, dict[str, Any]]] = []
    for objective, value in enumerate(trial.values or ()):
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        found.append((models.TrialValueModel, {"objective": objective, "value": stored, "value_type": kind}))
    for name, value in trial.params.items():
        distribution = trial.distributions[name]
        columns = {"param_name": name, "param_value": distribution.to_internal_repr(value)}
        found.append((models.TrialParamModel, columns | {"distribution_json": distribution_to_json(distribution)}))
    for model, attributes in (
        (models.TrialUserAttributeModel, trial.user_attrs),
        (models.TrialSystemAttributeModel, trial.system_attrs),
    ):
        found += [(model, {"key": key, "value_json": json.dumps(value)}) for key, value in attributes.items()]
    return found


def uids(connection: Connection, study_id: int) -> list[str]:
    """Record uids of a study's trials, by number; "" for a trial without one, which is none of ours."""
    owned = (_ATTRIBUTES.c.trial_id == _TRIALS.c.trial_id) & (_ATTRIBUTES.c.key == UID)
    query = sqlalchemy.select(_ATTRIBUTES.c.value_json).select_from(_TRIALS.outerjoin(_ATTRIBUTES, owned))
    found = connection.execute(query.where(_TRIALS.c.study_id == study_id).order_by(_TRIALS.c.number))
    return ["" if text is None else str(json.loads(text)) for text in found.scalars()]


def study_id_of(connection: Connection, name: str) -> int | None:
    """The id of the study of this name, or None."""
    named = models.StudyModel.study_name == name
    found: int | None = connection.execute(sqlalchemy.select(models.StudyModel.study_id).where(named)).scalar()
    return found


def _utc(moment: datetime.datetime | None) -> datetime.datetime | None:
    """Optuna's naive local time as the naive UTC that it stores."""
    return None if moment is None else moment.astimezone(datetime.UTC).replace(tzinfo=None)

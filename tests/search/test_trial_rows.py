"""The rows of a finished trial against those that Optuna's own `create_new_trial` writes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from codesign.search.trial_rows import add_trials, study_id_of, uids
from tests.search.postgres import Server

MIXED = optuna.create_trial(
    state=TrialState.COMPLETE,
    values=[1.5, -2e300],
    params={"batch": 3, "fraction": 0.1, "format": "int4", "switch": None, "log": 100},
    distributions={
        "batch": IntDistribution(0, 8),
        "fraction": FloatDistribution(0.0, 1.0, step=0.05),
        "format": CategoricalDistribution(("native", "int4")),
        "switch": CategoricalDistribution((True, None, 2)),
        "log": IntDistribution(1, 1000, log=True),
    },
    user_attrs={"uid": "u0", "sentinel": True},
    constraints={"failure": 0.0, "slo.tpot_ms.p99": -0.25},
)
FAILED = optuna.create_trial(
    state=TrialState.FAIL, params={"batch": 4}, distributions={"batch": IntDistribution(0, 8)}, user_attrs={"uid": "u1"}
)
INFINITE = optuna.create_trial(state=TrialState.COMPLETE, values=[float("inf"), float("-inf")])
BARE = optuna.create_trial(state=TrialState.COMPLETE, values=[0.0, 0.0], user_attrs={"uid": "u3"})
TRIALS = [MIXED, FAILED, INFINITE, BARE]
TABLES = ("trials", "trial_values", "trial_params", "trial_user_attributes", "trial_system_attributes")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'study.db'}"
        return
    server = Server()
    yield server.url.replace("postgresql", "postgresql+psycopg")
    server.close()


@pytest.fixture
def storage(url: str) -> Iterator[RDBStorage]:
    storage = RDBStorage(url)
    yield storage
    storage.remove_session()
    storage.engine.dispose()


def study(storage: RDBStorage, name: str) -> int:
    found: int = optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * 2)._study_id
    return found


def rows(storage: RDBStorage, study_id: int) -> dict[str, list[tuple[Any, ...]]]:
    """Every column of a study's trials but the numbers that the database gives out."""
    found = {}
    metadata = sqlalchemy.MetaData()
    metadata.reflect(storage.engine)
    with storage.engine.connect() as connection:
        ids = "SELECT trial_id FROM trials WHERE study_id = :study"
        order = {n: i for i, (n,) in enumerate(connection.execute(sqlalchemy.text(ids), {"study": study_id}))}
        for name in TABLES:
            table = metadata.tables[name]
            own = next(iter(table.primary_key)).name
            query = sqlalchemy.select(table).where(table.c.trial_id.in_(order)).order_by(own)
            found[name] = [
                tuple((key, order[value] if key == "trial_id" else value) for key, value in row.items()
                      if key != "study_id" and (key == "trial_id" or key != own))
                for row in connection.execute(query).mappings()
            ]  # fmt: skip
    return found


def without_ids(trials: list[FrozenTrial]) -> list[dict[str, Any]]:
    return [{**vars(trial), "_trial_id": None} for trial in trials]


def test_the_rows_are_those_that_optuna_writes_and_optuna_reads_the_same_trials(storage: RDBStorage) -> None:
    theirs, ours = study(storage, "theirs"), study(storage, "ours")
    for trial in TRIALS:
        storage.create_new_trial(theirs, template_trial=trial)
    with storage.engine.begin() as connection:
        add_trials(connection, ours, 0, TRIALS[:1])
        add_trials(connection, ours, 1, TRIALS[1:])

    assert rows(storage, ours) == rows(storage, theirs)
    read = optuna.load_study(study_name="ours", storage=storage).trials
    assert without_ids(read) == without_ids(optuna.load_study(study_name="theirs", storage=storage).trials)
    assert [trial.number for trial in read] == [0, 1, 2, 3]
    assert read[0].constraints == MIXED.constraints
    assert (read[0].params, read[0].values) == (MIXED.params, MIXED.values)
    assert (read[0].datetime_start, read[0].datetime_complete) == (MIXED.datetime_start, MIXED.datetime_complete)


def test_trials_are_known_by_the_uid_of_their_record_in_the_order_of_their_numbers(storage: RDBStorage) -> None:
    other, ours = study(storage, "other"), study(storage, "ours")
    with storage.engine.begin() as connection:
        add_trials(connection, ours, 2, TRIALS[2:])
        add_trials(connection, other, 0, [BARE])
        add_trials(connection, ours, 0, TRIALS[:2])

        assert uids(connection, ours) == ["u0", "u1", "", "u3"]
        assert study_id_of(connection, "ours") == ours
        assert study_id_of(connection, "nobody's") is None


def test_trials_of_a_transaction_that_is_rolled_back_were_never_there(storage: RDBStorage) -> None:
    ours = study(storage, "ours")
    with storage.engine.connect() as connection:
        add_trials(connection, ours, 0, TRIALS)
        connection.rollback()

    assert storage.get_n_trials(ours) == 0


def test_optuna_goes_on_in_a_study_with_such_trials(storage: RDBStorage) -> None:
    ours = study(storage, "ours")
    with storage.engine.begin() as connection:
        add_trials(connection, ours, 0, [MIXED, BARE])
    loaded = optuna.load_study(study_name="ours", storage=storage)
    asked = loaded.ask()
    loaded.tell(asked, [0.0, 1.0])

    assert asked.number == 2
    assert [trial.number for trial in loaded.best_trials] == [0, 1]


def test_a_trial_takes_one_statement_per_table_however_many_there_are(storage: RDBStorage) -> None:
    ours, statements = study(storage, "ours"), []
    with storage.engine.begin() as connection:
        add_trials(connection, ours, 0, TRIALS)
        sqlalchemy.event.listen(connection, "before_cursor_execute", lambda *event: statements.append(event[2]))
        add_trials(connection, ours, 4, [MIXED])

    assert len(statements) == len(TABLES)

"""What several files here share."""

from collections.abc import Iterator

import optuna
import pytest

from tests.search.runner import Runner


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """The process that forks searches to be killed."""
    runner = Runner()
    yield runner
    runner.close()


@pytest.fixture(autouse=True)
def quiet_optuna() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)

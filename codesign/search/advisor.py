"""The sampler with what it has learnt: Optuna over an in-memory copy of the study.

Asking needs many reads of every trial, so it is done in memory; what is durable is the ledger, and study.db beside it.
The copy is made from the records at the start of a run and learns each further result.
"""

from collections.abc import Sequence

import optuna
from optuna.trial import TrialState

from codesign.search.objective import Told
from codesign.search.sampler import make_sampler
from codesign.search.suggest import Point, Points
from codesign.spec.metrics import Objective


class Advisor:
    """Suggests points and learns results.

    Args:
        seed: of the study; the same seed and the same results give the same suggestions.
    """

    def __init__(self, points: Points, objectives: Sequence[Objective], seed: int) -> None:
        self._points = points
        self._seed = seed
        self._study = optuna.create_study(
            storage=optuna.storages.InMemoryStorage(), directions=[objective.direction for objective in objectives]
        )
        self._expected: dict[str, int] = {}  # digest of a configuration that is being measured -> number of its trial

    def suggest(self, *place: int) -> Point:
        """A point; asked twice with the same `place` it may suggest the same one."""
        self._study.sampler = make_sampler(self._seed, *place)
        trial = self._study.ask()
        point = self._points.suggested(trial)
        # Whatever becomes of the point is learnt as a trial of its own.
        self._study.tell(trial, state=TrialState.FAIL)
        return point

    def expect(self, running: Sequence[Point]) -> None:
        """Takes in what is being measured now, and that all else is not.

        TPE keeps away from running trials (its `constant_liar`), so that parallel workers are not sent to one corner.
        """
        wanted = {point.config.digest: point for point in running}
        for digest in self._expected.keys() - wanted:
            self._study.tell(self._expected.pop(digest), state=TrialState.FAIL)
        for digest in wanted.keys() - self._expected:
            self._study.add_trial(
                optuna.create_trial(
                    state=TrialState.RUNNING,
                    params=dict(wanted[digest].params),
                    distributions=dict(wanted[digest].distributions),
                )
            )
            self._expected[digest] = self._study.get_trials(deepcopy=False)[-1].number

    def learn(self, point: Point, told: Told | None) -> None:
        """Takes in how a point fared; None (infrastructure failed) teaches nothing."""
        if told is not None:
            self._study.add_trial(frozen(point, told))


def frozen(point: Point, told: Told | None, **attributes: str) -> optuna.trial.FrozenTrial:
    """A finished trial in Optuna's form: COMPLETE as told, or FAIL where there is nothing to tell.

    Args:
        attributes: user attributes to add.
    """
    return optuna.create_trial(
        state=TrialState.FAIL if told is None else TrialState.COMPLETE,
        values=None if told is None else list(told.values),
        params=dict(point.params),
        distributions=dict(point.distributions),
        user_attrs=attributes | ({"sentinel": True} if told is not None and told.is_sentinel else {}),
        constraints=None if told is None else told.constraints,
    )

"""Which configuration is tried next.

    trial 0      the unmodified configuration, always
    then         what the sampler suggests, mended where rules exclude it, unless it was measured already; after
                 NUM_DRAWS such draws a random one that was not; when there is none left the space is exhausted

A draw that cannot be mended is told to the sampler as infeasible, so that it learns the rule; a draw that was measured
before is dropped, because its result is known to the sampler already.
"""

import random
from collections.abc import Collection, Sequence

from codesign.results.record import TrialRecord
from codesign.search.advisor import Advisor
from codesign.search.mend import mended
from codesign.search.objective import FAILURE, Told, sentinel
from codesign.search.sampler import derived_seed
from codesign.search.suggest import Point, Points
from codesign.spec.metrics import Objective

NUM_DRAWS = 8
NUM_RANDOM_DRAWS = 200
MAX_LISTED = 100_000


def propose(
    *,
    points: Points,
    advisor: Advisor,
    objectives: Sequence[Objective],
    records: Sequence[TrialRecord],
    running: Collection[str] = (),
    number: int,
    seed: int,
) -> Point | None:
    """The next configuration; None when the space holds nothing new.

    Args:
        running: digests of the configurations that are being measured.
        number: of the record to come.
    """
    if number == 0:
        return points.baseline()
    measured = {record.config_digest for record in records} | set(running)
    for draw in range(NUM_DRAWS):
        point = mended(points, advisor.suggest(number, draw), random.Random(derived_seed(seed, number, draw)))
        if point.refusal is not None:
            values = tuple(sentinel(objective, records) for objective in objectives)
            advisor.learn(point, Told(values=values, constraints={FAILURE: 1.0}, is_sentinel=True))
        elif point.config.digest not in measured:
            return point
    return unmeasured(points, measured, random.Random(derived_seed(seed, number)))


def unmeasured(points: Points, measured: Collection[str], rng: random.Random) -> Point | None:
    """A random allowed point whose digest is not in `measured`; None when there is none.

    Where random draws find none, a finite space of up to MAX_LISTED points is listed to be sure.
    """

    def is_new(point: Point) -> bool:
        return point.refusal is None and point.config.digest not in measured

    for _ in range(NUM_RANDOM_DRAWS):
        point = mended(points, points.drawn(rng), rng)
        if is_new(point):
            return point
    if points.space.size is None or points.space.size > MAX_LISTED:
        return None
    left = [point for point in points.all() if is_new(point)]
    return rng.choice(left) if left else None

"""Bootstrap: the mean of stored per-sample scores with an interval that assumes no shape.

The samples are drawn again with replacement, 2000 times; the interval is that of the middle 95 % of the means (Efron,
1979; percentile method). Differences of two configurations are taken sample by sample first. Samples that are all
alike have an interval of no width: for a share use `share`, which gives Wilson's there.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from codesign.measure.summary import share_interval

RESAMPLES = 2000


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float]) -> Interval:
    """Two calls with the same values give the same interval.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value")
    array = np.array(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(array), (RESAMPLES, len(array)))
    low, high = np.quantile(array[picks].mean(1), [0.025, 0.975])
    return Interval(float(array.mean()), float(low), float(high))


def share(flags: Sequence[bool]) -> Interval:
    """The share of true ones; where all are alike, Wilson's interval instead of one without width."""
    found = bootstrap(flags)
    return Interval(found.mean, *share_interval(sum(flags), len(flags))) if len(set(flags)) == 1 else found

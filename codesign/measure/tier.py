"""Tiers: how much is measured before a number may be used for what. The tier is printed with every number.

screen    steers the search, nothing else
confirm   the Pareto front and reports
publish   claims ("x % faster"); three fresh processes each
"""

import dataclasses

from codesign.measure.suite import CONFIRM, SCREEN, SuiteSize
from codesign.results.record import Tier


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierRule:
    """When a measured window is long enough.

    Attributes:
        min_s, min_requests, min_blocks: all of them must be reached ...
        max_s: ... unless this has passed; then the record says what the sample supports.
        confidence: of the percentiles that the sample is said to support.
        settle: two consecutive warm-up blocks must agree within this share.
        warm_up_s: most time spent on warming up.
        capacity_s: most time for the search for the capacity, where it is asked for.
    """

    min_s: float
    min_requests: int
    min_blocks: int
    max_s: float
    confidence: float
    settle: float
    warm_up_s: float
    capacity_s: float
    suite: SuiteSize


RULES: dict[Tier, TierRule] = {
    "screen": TierRule(
        min_s=2.0,
        min_requests=38,
        min_blocks=3,
        max_s=20,
        confidence=0.90,
        settle=0.10,
        warm_up_s=1,
        capacity_s=60,
        suite=SCREEN,
    ),
    "confirm": TierRule(
        min_s=30,
        min_requests=93,
        min_blocks=5,
        max_s=300,
        confidence=0.95,
        settle=0.03,
        warm_up_s=10,
        capacity_s=300,
        suite=CONFIRM,
    ),
    "publish": TierRule(
        min_s=600,
        min_requests=662,
        min_blocks=5,
        max_s=3600,
        confidence=0.99,
        settle=0.02,
        warm_up_s=60,
        capacity_s=900,
        suite=CONFIRM,
    ),
}

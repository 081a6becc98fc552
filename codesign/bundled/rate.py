"""A rate of successes and its interval."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Successes in `num_samples` tries, with the 95 % interval of the rate."""

    rate: float
    low: float
    high: float
    num_samples: int

    def __str__(self) -> str:
        return f"{self.rate:.3f} [95 % {self.low:.3f}, {self.high:.3f}], n = {self.num_samples}"


def wilson(num_right: int, num_samples: int) -> Rate:
    """The rate with Wilson's 95 % interval."""
    z, rate = 1.959964, num_right / num_samples
    centre = (rate + z * z / (2 * num_samples)) / (1 + z * z / num_samples)
    spread = rate * (1 - rate) / num_samples + z * z / (4 * num_samples**2)
    half = z * math.sqrt(spread) / (1 + z * z / num_samples)
    return Rate(rate=rate, low=max(0.0, centre - half), high=min(1.0, centre + half), num_samples=num_samples)

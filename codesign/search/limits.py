"""When a search stops: the study's total of trials, and the wall time of this run."""

import dataclasses
import re
import statistics
from collections.abc import Sequence

from codesign.errors import InputError

DEFAULT_TRIALS = 24
_DURATION = re.compile(r"(\d{1,6}(?:\.\d{1,3})?)\s*(s|m|min|h|d)?", re.ASCII)
_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86_400}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Attributes:
    trials: the study's total, over all runs; None means no such limit.
    budget_s: wall time of this run; None means no such limit.
    """

    trials: int | None = DEFAULT_TRIALS
    budget_s: float | None = None

    def stop(self, *, done: int, running: int = 0, elapsed_s: float, durations_s: Sequence[float]) -> str | None:
        """Why no further trial may start, or None. The first trial of a study always may.

        Args:
            done: trials of the study so far.
            running: trials of the study that are under way.
            elapsed_s: since this run began.
            durations_s: of the trials so far, the latest last.
        """
        if self.trials is not None and done >= self.trials:
            return f"all {self.trials} trials are done"
        if done + running == 0 or self.budget_s is None:
            return None
        left_s = self.budget_s - elapsed_s
        expected_s = expected(durations_s)
        if left_s <= 0 or expected_s > left_s:
            return f"the budget is used up: {max(0.0, left_s):.0f} s left, a trial takes about {expected_s:.0f} s"
        return None


def expected(durations_s: Sequence[float]) -> float:
    """Seconds that the next trial is expected to take: the median of the latest; 0 when nothing is known."""
    return statistics.median(durations_s[-9:]) if durations_s else 0.0


def parse_duration(text: str) -> float:
    """`90`, `90s`, `20m`, `1.5h` -> seconds.

    Raises:
        InputError: anything else, or nothing at all.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _SECONDS[match[2] or "s"] if match else 0.0
    if seconds <= 0:
        raise InputError(f"must be a time such as 90s, 20m or 1.5h, got {text!r}", key="--budget")
    return seconds


def limits_of(trials: int | None, budget: str | None) -> Limits:
    """The limits that a command line asks for: 24 trials where it asks for nothing.

    Raises:
        InputError: `budget` is no time.
    """
    budget_s = None if budget is None else parse_duration(budget)
    return Limits(trials=DEFAULT_TRIALS if trials is None and budget is None else trials, budget_s=budget_s)

"""What a person sees on stderr while a study runs: trial n of N, phase, time left, the front so far.

On a terminal one live line below the messages; elsewhere (a file, CI) plain lines, one per finished trial.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from codesign.report.show import quantity, spoken
from codesign.results.pareto import front
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.limits import Limits, expected
from codesign.search.objective import value_of
from codesign.search.study import num_done, seconds, was_built
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from codesign.units import format_seconds


class ConsoleProgress:
    """Shows a study's progress on a console; use it as `with progress.shown():`."""

    def __init__(self, console: Console, objectives: Sequence[Objective], default: EngineConfig) -> None:
        self._console = console
        self._objectives = tuple(objectives)
        self._default = default
        self._limits = Limits()
        self._records: Sequence[TrialRecord] = ()
        self._durations_s: list[float] = []
        self._began_s = self._trial_began_s = time.monotonic()
        self._now = ""
        self._phase = ""
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps a live line at the bottom while the block runs, where there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._line, refresh_per_second=4, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def say(self, text: str) -> None:
        """One message for the person."""
        self._console.print(Text(text), soft_wrap=True)

    def begin(self, records: Sequence[TrialRecord], limits: Limits) -> None:
        self._limits, self._records, self._began_s = limits, records, time.monotonic()
        self._durations_s = [seconds(record) for record in records if was_built(record)]
        if records:
            self.say(f"going on after {num_done(records)} trials")

    def trial(self, identity: TrialIdentity, config: EngineConfig) -> None:
        again = f" (attempt {identity.attempt + 1})" if identity.attempt else ""
        self._now = f"trial {identity.number}{again}: {label(config, self._default)}"
        self._phase = "start"
        self._trial_began_s = time.monotonic()

    def phase(self, name: str, fraction: float | None) -> None:
        self._phase = name if fraction is None else f"{name} {fraction:.0%}"

    def finished(self, record: TrialRecord, records: Sequence[TrialRecord]) -> None:
        self._records = records
        if was_built(record):
            self._durations_s.append(time.monotonic() - self._trial_began_s)
        config = EngineConfig.from_dict(record.config)
        parts = [f"trial {record.number}", label(config, self._default), self._result(record), self._totals()]
        self.say(" | ".join(parts))
        self._now = self._phase = ""

    def _result(self, record: TrialRecord) -> str:
        if record.outcome.kind != "ok":
            return f"{record.outcome.kind}: {record.outcome.detail.splitlines()[0] if record.outcome.detail else ''}"[
                :160
            ]
        shown = [
            f"{short(objective)} {quantity(value, objective.unit)}"
            for objective in self._objectives
            if (value := value_of(record, objective)) is not None
        ]
        broken = [name for name, amount in record.violations.items() if amount > 0]
        return ", ".join(shown) + (f" (breaks {', '.join(broken)})" if broken else "")

    def _totals(self) -> str:
        found = front(self._records, self._objectives)
        best = [
            f"{'max' if objective.direction == 'maximize' else 'min'} {short(objective)} "
            + quantity(
                (max if objective.direction == "maximize" else min)(
                    value for record in found if (value := value_of(record, objective)) is not None
                ),
                objective.unit,
            )
            for objective in self._objectives
            if found
        ]
        done = num_done(self._records)
        total = f"{done}/{self._limits.trials}" if self._limits.trials is not None else f"{done}"
        left = self._time_left_s()
        parts = [f"done {total}", f"front {len(found)}" + (f" ({', '.join(best)})" if best else "")]
        if left is not None:
            parts.append(f"{format_seconds(left)} left")
        return ", ".join(parts)

    def _time_left_s(self) -> float | None:
        """Until the total or the budget is reached, whichever is first; None while nothing is known."""
        limits: list[float] = []
        if self._limits.trials is not None and self._durations_s:
            missing = max(0, self._limits.trials - num_done(self._records))
            limits.append(missing * expected(self._durations_s))
        if self._limits.budget_s is not None:
            limits.append(max(0.0, self._limits.budget_s - (time.monotonic() - self._began_s)))
        return min(limits, default=None)

    def _line(self) -> Text:
        running = f"{self._now} | {self._phase} {format_seconds(time.monotonic() - self._trial_began_s)}"
        return Text(f"{running if self._now else 'choosing'} | {self._totals()}", overflow="ellipsis", no_wrap=True)


def label(config: EngineConfig, default: EngineConfig) -> str:
    """What differs from the unmodified configuration, in a few words; knobs at their member's default are left out."""
    usual = default.flat()
    for key, (family, choice) in config.choices().items():
        usual |= {f"{key}.{choice.name}.{knob}": value for knob, value in family.knobs(choice.name).items()}
    changed = [f"{name}={value}" for name, value in config.flat().items() if name not in usual or usual[name] != value]
    return " ".join(changed) or "unmodified"


def short(objective: Objective) -> str:
    """`TPOT p50`, for one line among many."""
    return f"{spoken(objective.metric)} {objective.statistic}".strip()

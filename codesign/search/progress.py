"""What a person sees on stderr while a study runs: trial n of N, phase, time left, the front so far.

On a terminal live lines below the messages; elsewhere (a file, CI) plain lines, one per finished trial.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

from codesign.report.show import quantity, spoken
from codesign.results.pareto import front
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.history import History, seconds, was_built
from codesign.search.lease import Lease
from codesign.search.limits import Limits, expected
from codesign.search.objective import value_of
from codesign.search.where import placement_text, where
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
        self._history = History()
        self._front: list[TrialRecord] = []
        self._durations_s: list[float] = []
        self._began_s = time.monotonic()
        self._ours: dict[str, _Running] = {}
        self._elsewhere: Sequence[Lease] = ()
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Keeps a live line at the bottom while the block runs, where there is a terminal."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, get_renderable=self._lines, refresh_per_second=4, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def say(self, text: str) -> None:
        """One message for the person."""
        self._console.print(Text(text), soft_wrap=True)

    def begin(self, records: Sequence[TrialRecord], limits: Limits) -> None:
        self._limits, self._history, self._began_s = limits, History(records), time.monotonic()
        self._front = front(records, self._objectives)
        self._durations_s = [seconds(record) for record in records if was_built(record)]
        if records:
            self.say(f"going on after {self._history.num_done} trials")

    def trial(self, identity: TrialIdentity, config: EngineConfig, place: str = "") -> None:
        again = f" (attempt {identity.attempt + 1})" if identity.attempt else ""
        text = f"trial {identity.number}{again}: {label(config, self._default)}"
        self._ours[identity.uid] = _Running(text, place, time.monotonic())

    def moved(self, uid: str, place: str) -> None:
        if uid in self._ours:
            self._ours[uid].place = place

    def phase(self, uid: str, name: str, fraction: float | None) -> None:
        if uid in self._ours:
            self._ours[uid].phase = name if fraction is None else f"{name} {fraction:.0%}"

    def elsewhere(self, leases: Sequence[Lease]) -> None:
        self._elsewhere = leases

    def finished(self, record: TrialRecord) -> None:
        self._history.add(record)
        self._front = front([*self._front, record], self._objectives)
        ours = self._ours.pop(record.uid, None)
        if was_built(record):
            self._durations_s.append(seconds(record) if ours is None else time.monotonic() - ours.began_s)
        config = EngineConfig.from_dict(record.config)
        parts = [f"trial {record.number}", label(config, self._default), self._result(record), self._totals()]
        where = placement_text(record) if ours is None or ours.place else ""
        self.say(" | ".join([*parts, where] if where else parts))

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
        found = self._front
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
        done = self._history.num_done
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
            missing = max(0, self._limits.trials - self._history.num_done)
            at_once = max(1, len(self._ours) + len(self._elsewhere))
            limits.append(missing * expected(self._durations_s) / at_once)
        if self._limits.budget_s is not None:
            limits.append(max(0.0, self._limits.budget_s - (time.monotonic() - self._began_s)))
        return min(limits, default=None)

    def _lines(self) -> Text:
        """What runs where, and how far the study is."""
        now = time.monotonic()
        lines = [
            " | ".join(
                part for part in (run.text, run.place, f"{run.phase} {format_seconds(now - run.began_s)}") if part
            )
            for run in list(self._ours.values())
        ]
        for lease in self._elsewhere:
            config = EngineConfig.from_dict(lease.config)
            lines.append(f"trial {lease.number}: {label(config, self._default)} | {where(lease)}")
        totals = self._totals()
        if len(lines) > 1:
            return Text("\n".join([*lines, totals]), overflow="ellipsis", no_wrap=True)
        return Text(f"{lines[0] if lines else 'choosing'} | {totals}", overflow="ellipsis", no_wrap=True)


@dataclasses.dataclass
class _Running:
    text: str
    place: str
    began_s: float
    phase: str = "start"


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

"""How a process that is not the search's comes to measure: what to call, with which plain arguments.

Order("codesign.search.measurer:trials", {...})  --JSON-->  worker: with measurer(order) as measure: measure(...)
"""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Self

from codesign.measure.trial import TrialRunner
from codesign.measure.turn import Turn
from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.overlap import Overlap
from codesign.search.pool import Measure, OnPhase
from codesign.search.seat import taken_seat
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from codesign.spec.profile import Profile


@dataclasses.dataclass(frozen=True)
class Order:
    """Attributes:
    factory: "module:function" that makes the context manager of a `Measure`; given by code, never by a file.
    arguments: plain data for it.
    """

    factory: str
    arguments: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def measurer(order: Order) -> contextlib.AbstractContextManager[Measure]:
    """What the order asks for; entering it makes ready to measure."""
    module, _, name = order.factory.partition(":")
    made: contextlib.AbstractContextManager[Measure] = getattr(importlib.import_module(module), name)(**order.arguments)
    return made


def order_of(
    profile: Profile,
    baseline: EngineConfig,
    *,
    turn: str | None,
    cores: int | None = None,
    overlap: Overlap | None = None,
) -> Order:
    """The order to measure trials of a profile.

    Args:
        turn: name under which workers of one machine take turns; None where they do not disturb each other.
        cores: how many the worker takes for itself; None where it was given its own.
        overlap: what was measured of windows beside each other; None: they take turns.
    """
    windows = {} if overlap is None else {"may_overlap": overlap.is_allowed, "overlap": overlap.to_dict()}
    return Order(
        "codesign.search.measurer:trials",
        {
            "profile": profile.name,
            "sections": dict(profile.sections),
            "objectives": [dataclasses.asdict(objective) for objective in profile.objectives],
            "baseline": baseline.to_dict(),
            "turn": turn,
            "cores": cores,
            "windows": windows,
        },
    )


@contextlib.contextmanager
def trials(
    *,
    profile: str,
    sections: Mapping[str, Any],
    objectives: list[Mapping[str, Any]],
    baseline: Mapping[str, Any],
    turn: str | None,
    cores: int | None,
    windows: Mapping[str, Any],
) -> Iterator[Measure]:
    """Real trials on this machine."""
    known = Profile.from_sections(profile, sections)
    measured = dataclasses.replace(known, objectives=tuple(Objective(**objective) for objective in objectives))
    with contextlib.ExitStack() as stack:
        if cores is not None and turn is not None:
            stack.enter_context(taken_seat(turn, cores))
        own_turn = Turn(turn, **windows)
        runner = stack.enter_context(TrialRunner(measured, baseline=EngineConfig.from_dict(baseline), turn=own_turn))

        def measure(identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
            return runner.measure(identity, config, on_phase=on_phase)

        yield measure

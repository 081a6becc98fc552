"""Small real studies for the tests: a real space and folder, a fake measurement."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna

from codesign.results.record import TrialIdentity, TrialRecord
from codesign.search.folder import open_study
from codesign.search.folder_store import FolderStore
from codesign.search.inputs import Inputs
from codesign.search.interrupt import Interrupt
from codesign.search.lease import Lease
from codesign.search.limits import Limits
from codesign.search.misfit import Misfit
from codesign.search.pool import InlinePool, Pool
from codesign.search.study import Study, StudyResult
from codesign.search.suggest import Points
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective
from codesign.spec.space import SearchSpace, load_space
from tests.search.fake_measure import OBJECTIVES, FakeMeasure

SMALL = """
max_batch_size: [1, 2, 4, 8, 16]
max_step_tokens: [128, 256, 512, 1024, 2048]
"""


def space_of(folder: Path, text: str = SMALL) -> SearchSpace:
    path = folder / "space.yaml"
    path.write_text(text)
    return load_space(path)


@dataclasses.dataclass
class Heard:
    """A Progress that remembers."""

    said: list[str] = dataclasses.field(default_factory=list)
    phases: list[str] = dataclasses.field(default_factory=list)
    finished_records: list[TrialRecord] = dataclasses.field(default_factory=list)

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, records: Sequence[TrialRecord], limits: Limits) -> None:
        pass

    def trial(self, identity: TrialIdentity, config: EngineConfig, place: str) -> None:
        pass

    def moved(self, uid: str, place: str) -> None:
        pass

    def elsewhere(self, leases: Sequence[Lease]) -> None:
        pass

    def phase(self, uid: str, name: str, fraction: float | None) -> None:
        self.phases.append(name)

    def finished(self, record: TrialRecord) -> None:
        self.finished_records.append(record)


def sections_of(hardware: str, objectives: Sequence[Objective]) -> dict[str, Any]:
    """What `Profile.sections` holds."""
    return {
        "hardware": {"name": hardware, "device": "cpu"},
        "model": {"name": "fake", "path": "/models/fake", "seed": 0},
        "workload": {"scenario": "offline", "prompt_tokens": {"fixed": 8}, "output_tokens": {"fixed": 8}},
        "slo": {},
        "objectives": [dataclasses.asdict(objective) for objective in objectives],
    }


def inputs_of(space: SearchSpace, objectives: Sequence[Objective] = OBJECTIVES, profile: str = "p") -> Inputs:
    return Inputs(
        stem="small",
        model="fake",
        parts={"profile": sections_of(profile, objectives), "space": dict(space.plain), "target": "native"},
        objectives=tuple(objectives),
    )


def run_study(
    out: Path,
    space: SearchSpace,
    *,
    measure: Callable[..., TrialRecord] | None = None,
    pool: Pool | None = None,
    limits: Limits | None = None,
    name: str | None = "study",
    objectives: Sequence[Objective] = OBJECTIVES,
    heard: Heard | None = None,
    predict: Callable[[EngineConfig], Misfit | None] = lambda config: None,
    write_report: Callable[[], object] = lambda: None,
    interrupt: Interrupt | None = None,
    profile: str = "p",
    seed: int = 0,
) -> StudyResult:
    """One run of a study in `out`/`name`."""
    points, heard, interrupt = Points(space, max_model_len=512), heard or Heard(), interrupt or Interrupt()
    with (
        open_study(out, name, inputs_of(space, objectives, profile)) as folder,
        contextlib.closing(FolderStore(folder, points=points, objectives=objectives, say=heard.say)) as store,
    ):
        study = Study(
            folder,
            store=store,
            pool=pool or InlinePool(measure or FakeMeasure(), interrupt),
            points=points,
            objectives=objectives,
            progress=heard,
            interrupt=interrupt,
            write_report=write_report,
            predict=predict,
            seed=seed,
        )
        return study.run(limits or Limits(trials=8))


def optuna_trials(out: Path, name: str = "study") -> list[optuna.trial.FrozenTrial]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{out / name / 'study.db'}")
    trials = optuna.load_study(study_name=name, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    return trials

"""`codesign search`: from a profile's path to a finished study. Puts the parts together; each lives in its own file."""

import dataclasses
from pathlib import Path

import optuna
from rich.console import Console

from codesign.engine.models.source import resolve
from codesign.errors import InputError
from codesign.measure.provenance import provenance
from codesign.measure.trial import TrialRunner
from codesign.registry import TARGETS
from codesign.report.page import write_report
from codesign.search.folder import StudyFolder, open_study
from codesign.search.inputs import inputs_of
from codesign.search.interrupt import Interrupt
from codesign.search.ledger import load
from codesign.search.limits import Limits
from codesign.search.preflight import check_device, memory_check, say_ruled_out, study_rules, usable_objectives
from codesign.search.progress import ConsoleProgress
from codesign.search.study import Study, StudyResult
from codesign.search.suggest import Points
from codesign.search.world import check_same_world
from codesign.spec.profile import Profile, load_profile
from codesign.spec.space import load_space

NATIVE = "native"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """What stands on the command line, checked nowhere else.

    Attributes:
        model: instead of the profile's: `bundled` or a directory.
        space: instead of the profile's search space.
        name: of the study; None for the default.
        out: folder that holds studies.
    """

    profile: Path
    model: str | None = None
    space: Path | None = None
    limits: Limits
    target: str = NATIVE
    name: str | None = None
    out: Path = Path("reports")
    seed: int = 0


def run_search(request: SearchRequest, console: Console, interrupt: Interrupt) -> tuple[StudyFolder, StudyResult]:
    """Searches until the limits are reached.

    Args:
        console: for people; never stdout.
        interrupt: whose signals stop the study; to be installed by the caller.
    Raises:
        InputError, Unsupported: what was asked cannot be done; nothing was measured.
        WorkError: it went wrong on the way; what was finished is kept.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # "a new study created" is not for people
    TARGETS.check(request.target, key="--target")
    profile = load_profile(request.profile, model_override=request.model, fetch=resolve)
    check_device(profile)
    space = load_space(_space_path(profile, request))
    notes: list[str] = []
    objectives = usable_objectives(profile, notes.append)
    measured = dataclasses.replace(profile, objectives=objectives)
    points = Points(space, profile.workload.max_model_len, refuse=study_rules(measured))
    baseline = points.baseline().config
    inputs = inputs_of(profile, points.space, objectives, target=request.target, seed=request.seed)
    progress = ConsoleProgress(console, objectives, baseline)
    with open_study(request.out, request.name, inputs) as folder, progress.shown():
        for note in notes:
            progress.say(note)
        progress.say(f"study {folder.path}: {_described(profile, points)}")
        say_ruled_out(points, progress.say)
        records = load(folder.trials, progress.say)
        if records:
            check_same_world(records, provenance(profile.model_spec, profile.device), folder.path)
        with TrialRunner(measured, baseline=baseline) as runner:
            study = Study(
                folder,
                points=points,
                objectives=objectives,
                measure=lambda identity, config, on_phase: runner.measure(identity, config, on_phase=on_phase),
                progress=progress,
                interrupt=interrupt,
                write_report=lambda: write_report(folder.path),
                predict=memory_check(profile),
                seed=request.seed,
            )
            return folder, study.run(request.limits)


def _space_path(profile: Profile, request: SearchRequest) -> Path:
    path = request.space or profile.search_space
    if path is None:
        raise InputError("is missing; name one there or with --space", file=profile.path, key="search_space")
    return path


def _described(profile: Profile, points: Points) -> str:
    size = points.space.size
    count = "a continuous space" if size is None else f"{size} points"
    return (
        f"{profile.model_spec.name} on {profile.hardware.name} ({profile.device}), {profile.workload.scenario}, {count}"
    )

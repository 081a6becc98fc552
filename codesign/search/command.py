"""`codesign search`: from a profile's path to a finished study. Puts the parts together; each lives in its own file."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import optuna
from rich.console import Console

from codesign.engine.models.source import resolve
from codesign.errors import InputError
from codesign.measure.provenance import provenance
from codesign.registry import TARGETS
from codesign.report.page import write_report
from codesign.search.database import Database
from codesign.search.folder import StudyFolder, open_study
from codesign.search.folder_store import FolderStore
from codesign.search.inputs import inputs_of
from codesign.search.interrupt import Interrupt
from codesign.search.limits import Limits
from codesign.search.placing import Placing
from codesign.search.preflight import check_device, memory_check, say_ruled_out, study_rules, usable_objectives
from codesign.search.progress import ConsoleProgress
from codesign.search.sql_store import SharedStudies, SqlStore
from codesign.search.store import Store
from codesign.search.study import Study, StudyResult
from codesign.search.suggest import Points
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
        storage: URL of the database that several searches share; None for a study of this folder.
        workers: processes that measure, each with cores or GPUs of its own; None for the search itself.
        ray: where trials run as Ray tasks: `local`, or a cluster's address; None for this machine without Ray.
    """

    profile: Path
    model: str | None = None
    space: Path | None = None
    limits: Limits
    target: str = NATIVE
    name: str | None = None
    out: Path = Path("reports")
    seed: int = 0
    storage: str | None = dataclasses.field(default=None, repr=False)  # holds a password
    workers: int | None = None
    ray: str | None = None


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
    placing = Placing.of(request.workers, request.ray, is_shared=request.storage is not None, hardware=profile.hardware)
    with contextlib.ExitStack() as stack:
        database = _database(request, progress.say, interrupt, stack)
        shared = None if database is None else SharedStudies(database)
        folder = stack.enter_context(open_study(request.out, request.name, inputs, shared))
        stack.enter_context(progress.shown())
        for note in notes:
            progress.say(note)
        progress.say(f"study {folder.path}: {_described(profile, points)}{placing.described}")
        say_ruled_out(points, progress.say)
        store: Store
        if database is None:
            store = FolderStore(folder, points=points, objectives=objectives, say=progress.say)
        else:
            store = SqlStore(database, folder, points=points, objectives=objectives, say=progress.say)
        stack.callback(store.close)
        study = Study(
            folder,
            store=store,
            pool=placing.pool(measured, baseline, interrupt, stack, progress.say),
            points=points,
            objectives=objectives,
            progress=progress,
            interrupt=interrupt,
            write_report=lambda: write_report(folder.path),
            predict=memory_check(profile),
            seed=request.seed,
            world=placing.world(provenance(profile.model_spec, profile.device, profile.hardware.cores)),
        )
        return folder, study.run(request.limits)


def _database(
    request: SearchRequest, say: Callable[[str], None], interrupt: Interrupt, stack: contextlib.ExitStack
) -> Database | None:
    if request.storage is None:
        return None
    database = Database(request.storage, say=say, is_interrupted=lambda: bool(interrupt.signal_number))
    stack.callback(database.close)
    database.check()
    return database


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

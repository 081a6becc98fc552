"""`codesign measure`: one configuration, measured with more care than a search has time for."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from rich.console import Console

from codesign.engine.models.source import resolve
from codesign.errors import InputError
from codesign.measure.trial import TrialRunner
from codesign.results.files import write_file
from codesign.results.record import Tier, TrialIdentity, TrialRecord
from codesign.search.inputs import identity_hash
from codesign.search.limits import Limits
from codesign.search.preflight import check_device, usable_objectives
from codesign.search.progress import ConsoleProgress
from codesign.search.suggest import Points
from codesign.spec.engine_config import EngineConfig, load_config
from codesign.spec.profile import Profile, load_profile
from codesign.spec.space import load_space


def measure_one(
    profile_path: Path, config_path: Path, *, tier: str, model: str | None, out: Path | None, console: Console
) -> tuple[Path, TrialRecord]:
    """Measures one configuration and writes its record, by default below `reports/measured/`.

    Raises:
        InputError, Unsupported: what was asked cannot be done; nothing was measured.
        WorkError: the record cannot be written.
    """
    checked = next((known for known in get_args(Tier) if known == tier), None)
    if checked is None:
        raise InputError(f"unknown tier {tier!r}", key="--tier", got=tier, known=get_args(Tier))
    profile = load_profile(profile_path, model_override=model, fetch=resolve)
    config = load_config(config_path).resolve(file=config_path)
    check_device(profile)
    baseline = unmodified(profile)
    objectives = usable_objectives(profile, console.print)
    started = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = out or Path("reports", "measured", f"{profile.name}-{config.digest[:6]}-{started}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    uid = identity_hash("measured", profile.digest, config.digest, started)
    identity = TrialIdentity(study="measured", number=0, uid=uid)
    progress = ConsoleProgress(console, objectives, baseline)
    progress.begin((), Limits(trials=1))
    with (
        progress.shown(),
        TrialRunner(dataclasses.replace(profile, objectives=objectives), baseline=baseline) as runner,
    ):
        progress.trial(identity, config)
        record = runner.measure(
            identity, config, tier=checked, on_phase=lambda name, share: progress.phase(identity.uid, name, share)
        )
    write_file(path, record.to_json().encode())
    return path, record


def unmodified(profile: Profile) -> EngineConfig:
    """The configuration that quality is compared with: the search space's default where the profile names a space."""
    length = profile.workload.max_model_len
    if profile.search_space is None:
        return EngineConfig(max_model_len=length).resolve()
    return Points(load_space(profile.search_space), length).baseline().config

"""Which trial of a study a person means: by its number, or by the name of a pick."""

from pathlib import Path

from codesign.errors import InputError
from codesign.report.study import Study
from codesign.results.record import TrialRecord


def chosen(folder: Path, *, trial: int | None, pick: str | None) -> TrialRecord:
    """The record that is meant, always one of a trial that ended well.

    Raises:
        InputError: neither or both are given, there is no such trial or pick, or the trial failed.
    """
    if (trial is None) == (pick is None):
        raise InputError("give one of --trial N and --pick NAME", key="--trial")
    study = Study.load(folder)
    if pick is not None:
        if pick not in study.picks:
            raise InputError(f"the study has no pick {pick!r}", file=folder, key="--pick", got=pick, known=study.picks)
        trial = study.picks[pick]
    numbers = {record.number for record in study.records}
    if trial not in numbers:
        known = f"0 to {max(numbers)}" if numbers else "none yet"
        raise InputError(f"the study has no trial {trial} (trials: {known})", file=folder, key="--trial")
    record = study.trial(trial)
    if record.outcome.kind != "ok":
        raise InputError(
            f"trial {trial} failed ({record.outcome.kind}: {record.outcome.detail}), so there is nothing to deploy",
            file=folder,
            key="--trial" if pick is None else "--pick",
        )
    return record

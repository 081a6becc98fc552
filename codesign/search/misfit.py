"""A configuration that is known not to fit before it is built, and its record."""

import dataclasses
from datetime import UTC, datetime

from codesign.results.record import Outcome, TrialIdentity, TrialRecord
from codesign.spec.engine_config import EngineConfig


@dataclasses.dataclass(frozen=True)
class Misfit:
    """Why a configuration cannot run here, known without building it.

    Attributes:
        excess: needed over available, minus 1; above 0.
    """

    detail: str
    excess: float


def predicted_oom(identity: TrialIdentity, config: EngineConfig, misfit: Misfit) -> TrialRecord:
    """The record of a configuration that is known not to fit without building it."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return TrialRecord(
        **dataclasses.asdict(identity),
        config=config.to_dict(),
        config_digest=config.digest,
        outcome=Outcome(kind="oom", detail=f"predicted: {misfit.detail}"),
        violations={"memory": misfit.excess},
        trust={"predicted": True},
        started_at=now,
        finished_at=now,
    )

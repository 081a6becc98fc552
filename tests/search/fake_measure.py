"""A measurement that costs nothing: figures follow from the configuration alone, and nothing is written."""

import dataclasses
import time
from collections.abc import Callable
from datetime import UTC, datetime

from codesign.results.record import MetricValue, Outcome, OutcomeKind, TrialIdentity, TrialRecord
from codesign.spec.engine_config import EngineConfig
from codesign.spec.metrics import Objective

OBJECTIVES = (Objective.of("throughput_tokens_per_s"), Objective.of("peak_memory_bytes"))

OnPhase = Callable[[str, float | None], None]


def figures(config: EngineConfig) -> dict[str, MetricValue]:
    """Bigger batches are faster and need more memory; longer steps are a little faster and need more memory."""
    batch, step = config.max_batch_size, config.max_step_tokens
    return {
        "throughput_tokens_per_s": MetricValue(value=100.0 * batch**0.5 + step / 64, unit="tokens/s"),
        "peak_memory_bytes": MetricValue(value=1e9 * batch + 1e7 * step, unit="bytes"),
    }


def record_of(
    identity: TrialIdentity, config: EngineConfig, kind: OutcomeKind = "ok", detail: str = "", seconds: float = 0.0
) -> TrialRecord:
    now = datetime.now(UTC).isoformat()
    return TrialRecord(
        **dataclasses.asdict(identity),
        config=config.to_dict(),
        config_digest=config.digest,
        outcome=Outcome(kind=kind, detail=detail),
        metrics=figures(config) if kind == "ok" else {},
        phases={"measure": seconds},
        started_at=now,
        finished_at=now,
    )


@dataclasses.dataclass
class FakeMeasure:
    """Attributes:
    outcome: configuration -> how its trial ends.
    calls: every identity and configuration that was measured, in order.
    """

    seconds: float = 0.0
    outcome: Callable[[EngineConfig], OutcomeKind] = lambda config: "ok"
    calls: list[tuple[TrialIdentity, EngineConfig]] = dataclasses.field(default_factory=list)

    def __call__(self, identity: TrialIdentity, config: EngineConfig, on_phase: OnPhase) -> TrialRecord:
        self.calls.append((identity, config))
        on_phase("measure", 0.5)
        time.sleep(self.seconds)
        return record_of(identity, config, self.outcome(config), seconds=self.seconds)

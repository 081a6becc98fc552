"""TrialRecord: the one immutable document per finished trial. It is the truth; tables and figures derive from it."""

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from codesign.errors import WorkError

SCHEMA_VERSION = 1

OutcomeKind = Literal[
    "ok",
    "oom",
    "unsupported",
    "numerical",
    "cuda_fatal",
    "hang",
    "killed_by_os",
    "crashed",
    "protocol",
    "harness",
]
Tier = Literal["screen", "confirm", "publish"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. Everything but "ok" is a result too: it is shown, and told to the sampler as infeasible.

    `harness` is our own or the machine's fault and says nothing about the configuration.
    """

    kind: OutcomeKind
    detail: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricValue:
    """One number with what it rests on.

    Attributes:
        value: in `unit`.
        statistic: "p50", "mean", "total" (a rate: counts and seconds summed over blocks); "" for a single reading.
        num_samples: how many independent samples (requests, sequences, blocks) stand behind it.
        low, high: 95 % interval where the sample supports one, else None; of a capacity the highest rate that passed
            and the lowest that failed.
    """

    value: float
    unit: str
    statistic: str = ""
    num_samples: int = 1
    low: float | None = None
    high: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSample:
    """One measured request; times from the parent's clock, from the scheduled arrival.

    Attributes:
        itl_ms: gaps between successive output tokens.
        tpot_ms: (e2e - ttft) / (output tokens - 1); None for a single token.
    """

    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    ttft_ms: float
    e2e_ms: float
    tpot_ms: float | None
    itl_ms: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialIdentity:
    """Which trial this is, decided by the study before anything is measured.

    Attributes:
        number: the record's number in the study, from 0; trial 0 is the unmodified configuration.
        uid: names the record's file; hash of study uid, number, attempt and config digest.
        attempt: 0, or how often infrastructure failed before.
    """

    study: str
    number: int
    uid: str
    attempt: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrialRecord(TrialIdentity):
    """Attributes beside the identity:
    config: the resolved EngineConfig as plain data; config_digest is its digest.
    resolved: what the build derived from it, e.g. kv_budget_tokens per layer, num_slots.
    violations: constraint -> amount over the limit (> 0 breaks it), e.g. {"slo.tpot_ms.p99": 0.2} is 20 % over.
    metrics: name in spec.metrics.METRICS -> value; absent where it was not measured, never guessed.
    requests: every measured request.
    quality: per-sample scores behind the quality metrics.
    bytes: part -> bytes (weights, kv, kv_staging, workspace, peak, ...).
    monitor: what the device monitor saw (source, power, clocks, temperature, throttle reasons, foreign processes).
    phases: phase -> seconds (spawn, load, quantize, warm_up, measure, quality, close).
    kernels: part -> kernel that ran.
    trust: what the numbers can carry: num_blocks, warmup_steps, warmup_settled, disturbed windows,
        percentile_supported, percentiles with their bounds, late_ms of the client, what was cut of a trace, the probes
        of the capacity; preemptions, prefix_hit_rate and kv_use (median and most over readings) of a paged cache;
        graphs_captured, steps_replayed and steps_not_replayed with kernels.graphs.
    provenance: machine, versions, profile, seed, model digest, prompt digest, commit.
    warnings: said aloud to the person, kept with the numbers.
    """

    config: Mapping[str, Any]
    config_digest: str
    resolved: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outcome: Outcome
    tier: Tier = "screen"
    violations: Mapping[str, float] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, MetricValue] = dataclasses.field(default_factory=dict)
    requests: tuple[RequestSample, ...] = ()
    quality: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    monitor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    kernels: Mapping[str, str] = dataclasses.field(default_factory=dict)
    trust: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    started_at: str = ""
    finished_at: str = ""
    schema_version: int = SCHEMA_VERSION

    @property
    def is_feasible(self) -> bool:
        return self.outcome.kind == "ok" and all(amount <= 0 for amount in self.violations.values())

    def to_json(self) -> str:
        """One JSON document. Raises ValueError on NaN or infinity: those are never results."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote.

        Raises:
            WorkError: not such a document, or one of another schema version.
        """
        try:
            plain = json.loads(text, parse_constant=_refuse_constant)
            version = plain.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise WorkError(
                    f"schema_version {version} is not {SCHEMA_VERSION}, which this version of codesign reads"
                )
            plain["outcome"] = Outcome(**plain["outcome"])
            if plain["outcome"].kind not in get_args(OutcomeKind):
                raise WorkError(f"unknown outcome {plain['outcome'].kind!r}")
            plain["metrics"] = {name: MetricValue(**value) for name, value in plain["metrics"].items()}
            plain["requests"] = tuple(
                RequestSample(**{**item, "itl_ms": tuple(item["itl_ms"])}) for item in plain["requests"]
            )
            plain["warnings"] = tuple(plain["warnings"])
            record = cls(**plain)
            record._check()
            return record
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise WorkError(f"not a trial record: {error or type(error).__name__}") from error

    def _check(self) -> None:
        """Raises ValueError where a field that others calculate with is of another type."""
        for name in ("study", "uid", "config_digest", "started_at", "finished_at"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text")
        for name in ("number", "attempt"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0")
        for name in _MAPPINGS:
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name} must be a mapping")
        if self.tier not in get_args(Tier):
            raise ValueError(f"unknown tier {self.tier!r}")
        values = [*self.violations.values(), *self.bytes.values(), *self.phases.values()]
        for metric in self.metrics.values():
            values += [value for value in (metric.value, metric.low, metric.high) if value is not None]
        for sample in self.requests:
            values += [sample.ttft_ms, sample.e2e_ms, *sample.itl_ms]
        for value in values:
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"a measured value must be a finite number, got {value!r}")


_MAPPINGS = (
    "config",
    "resolved",
    "violations",
    "quality",
    "bytes",
    "monitor",
    "phases",
    "kernels",
    "trust",
    "provenance",
)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")

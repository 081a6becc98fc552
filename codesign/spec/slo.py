"""Slo: the service level a configuration must keep to be feasible, and the flat list of limits it comes to."""

import dataclasses
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from codesign.spec.metrics import METRICS, STATISTIC, STATISTICS_ALLOWED
from codesign.spec.section import NotNegative, Positive, Section, Share
from codesign.units import GIB

Side = Literal["at_most", "at_least"]
Bounds = dict[str, Positive]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound.

    Attributes:
        key: dotted key in the profile, e.g. "slo.tpot_ms.p99"; names the violation in records.
        statistic: "" where the metric is one number per trial.
        side: whether the value may be at most or must be at least `bound`.
        bound: in the metric's unit.
    """

    key: str
    metric: str
    statistic: str
    side: Side
    bound: float

    def violation(self, value: float) -> float:
        """How far `value` is over the limit, as a share of the bound; at or below 0 keeps it."""
        over = value - self.bound if self.side == "at_most" else self.bound - value
        return over / self.bound if self.bound > 0 else over


class Quality(Section):
    """Least quality against the unmodified model."""

    max_kl: NotNegative | None = None
    min_top1_agreement: Share | None = None
    max_perplexity: Positive | None = None
    min_retrieval: Share | None = None


class Slo(Section):
    """Every key is optional. Times are {percentile: milliseconds} over requests, e.g. `ttft_ms: {p99: 200}`."""

    ttft_ms: Annotated[Bounds, Field(min_length=1)] | None = None
    tpot_ms: Annotated[Bounds, Field(min_length=1)] | None = None
    itl_ms: Annotated[Bounds, Field(min_length=1)] | None = None
    e2e_ms: Annotated[Bounds, Field(min_length=1)] | None = None
    quality: Quality = Quality()
    memory_gib: Positive | None = None
    power_w: Positive | None = None
    min_prefix_hit_rate: Share | None = None
    max_preemptions_per_request: NotNegative | None = None

    @model_validator(mode="after")
    def _statistics_are_known(self) -> Self:
        for metric in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
            for statistic in getattr(self, metric) or {}:
                if not STATISTIC.fullmatch(statistic):
                    raise ValueError(f"{metric}: unknown statistic {statistic[:40]!r}; allowed: {STATISTICS_ALLOWED}")
        return self

    def time_limits(self) -> tuple[Limit, ...]:
        """The bounds on times of requests, which is what a request can keep or break by itself."""
        return tuple(
            Limit(key=f"slo.{metric}.{statistic}", metric=metric, statistic=statistic, side="at_most", bound=bound)
            for metric in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
            for statistic, bound in (getattr(self, metric) or {}).items()
        )

    def limits(self) -> tuple[Limit, ...]:
        """Every bound that is set, in the order of the fields."""
        found = list(self.time_limits())
        single: tuple[tuple[str, str, float | None, float], ...] = (
            ("quality.max_kl", "kl_divergence", self.quality.max_kl, 1),
            ("quality.min_top1_agreement", "top1_agreement", self.quality.min_top1_agreement, 1),
            ("quality.max_perplexity", "perplexity", self.quality.max_perplexity, 1),
            ("quality.min_retrieval", "retrieval_accuracy", self.quality.min_retrieval, 1),
            ("memory_gib", "peak_memory_bytes", self.memory_gib, GIB),
            ("power_w", "power_w", self.power_w, 1),
            ("min_prefix_hit_rate", "prefix_hit_rate", self.min_prefix_hit_rate, 1),
            ("max_preemptions_per_request", "preemptions_per_request", self.max_preemptions_per_request, 1),
        )
        for key, metric, bound, scale in single:
            if bound is not None:
                side: Literal["at_most", "at_least"] = (
                    "at_least" if METRICS[metric].direction == "maximize" else "at_most"
                )
                found.append(Limit(key=f"slo.{key}", metric=metric, statistic="", side=side, bound=bound * scale))
        return tuple(found)

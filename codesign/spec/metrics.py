"""The metrics a study can show or optimise: name, unit, direction, and the statistic used when none is named."""

import dataclasses
import re
from typing import Literal, Self

from codesign.errors import InputError
from codesign.units import MIB

Direction = Literal["minimize", "maximize"]
Needs = Literal["", "quality", "energy", "price", "slo"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """Attributes:
    unit: of the value; "" for counts and ratios.
    statistic: default over requests ("p50"), or "" where the value is one number per trial.
    resolution: differences below this are rounding, of the arithmetic or the allocator, and decide nothing; 0: none.
    needs: what must exist for it: "quality" (real weights), "energy" (a counter), "price", "slo", or "" (always there).
    """

    name: str
    unit: str
    direction: Direction
    statistic: str
    needs: Needs
    title: str
    resolution: float = 0.0

    @property
    def is_timed(self) -> bool:
        """Whether it is about time, or the energy and money that go with it: what an emulation cannot tell."""
        return self.needs != "quality" and self.unit != "bytes"


# The unmodified engine measured against itself shows 8e-15 nat (Zen 3, 2026-11-23), and an allocator grows in arenas.
_RESOLUTION = {"kl_divergence": 1e-6, "perplexity": 1e-3, "peak_memory_bytes": float(MIB)}


def _table(*rows: tuple[str, str, Direction, str, Needs, str]) -> dict[str, Metric]:
    return {
        name: Metric(
            name=name,
            unit=unit,
            direction=direction,
            statistic=statistic,
            needs=needs,
            title=title,
            resolution=_RESOLUTION.get(name, 0.0),
        )
        for name, unit, direction, statistic, needs, title in rows
    }


METRICS: dict[str, Metric] = _table(
    ("throughput_tokens_per_s", "tokens/s", "maximize", "", "", "output tokens over wall time"),
    ("goodput_requests_per_s", "requests/s", "maximize", "", "slo", "requests per second that meet every SLO"),
    ("capacity_requests_per_s", "requests/s", "maximize", "", "slo", "highest request rate that meets the SLO"),
    ("ttft_ms", "ms", "minimize", "p50", "", "request sent to first output token"),
    ("tpot_ms", "ms", "minimize", "p50", "", "time per output token after the first"),
    ("itl_ms", "ms", "minimize", "p50", "", "gap between successive output tokens"),
    ("e2e_ms", "ms", "minimize", "p50", "", "whole request"),
    ("kl_divergence", "nat/token", "minimize", "", "quality", "KL to the unmodified model"),
    ("top1_agreement", "", "maximize", "", "quality", "share of tokens where the best guess is the unmodified one"),
    ("perplexity", "", "minimize", "", "quality", "perplexity on held-out text"),
    ("retrieval_accuracy", "", "maximize", "", "quality", "share of planted facts recalled"),
    ("energy_per_token_j", "J/token", "minimize", "", "energy", "device energy over output tokens"),
    ("power_w", "W", "minimize", "", "energy", "mean device power"),
    ("cost_per_mtok", "1/Mtok", "minimize", "", "price", "price of a million output tokens"),
    ("peak_memory_bytes", "bytes", "minimize", "", "", "peak memory of the trial"),
    ("weights_bytes", "bytes", "minimize", "", "", "resident weights, a draft's included"),
    ("kv_bytes", "bytes", "minimize", "", "", "resident KV cache, a draft's included"),
    ("prefix_hit_rate", "", "maximize", "", "", "share of prompt tokens found in the prefix cache"),
    ("preemptions_per_request", "", "minimize", "", "", "how often a request lost its memory and was computed anew"),
    ("kv_fragmentation", "", "minimize", "", "", "share of the rows in used cache blocks that hold no token"),
    ("kv_shared_bytes", "bytes", "maximize", "", "", "what sequences save by sharing cache blocks"),
)

STATISTICS_ALLOWED = "a percentile such as p50, p99, p99.9, or mean, max"
STATISTIC = re.compile(r"p(?!0+(\.0*)?$)[0-9]{1,2}(\.[0-9]{1,2})?|mean|max")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """One thing a study optimises.

    Attributes:
        statistic: over requests ("p50", "p90", "mean", "max"), or "" where the metric is one number per trial.
    """

    metric: str
    statistic: str
    direction: Direction
    unit: str

    @classmethod
    def of(cls, metric: str, statistic: str = "") -> Self:
        """The objective for a metric, with its default statistic unless another is named.

        Raises:
            InputError: no such metric or statistic; the key in the error is relative (the metric's name).
        """
        if metric not in METRICS:
            raise InputError(f"unknown metric {metric!r}", got=metric, known=METRICS)
        found = METRICS[metric]
        if statistic and not found.statistic:
            raise InputError(f"{metric} is one number per trial and takes no statistic, got {statistic!r}", key=metric)
        if statistic and not STATISTIC.fullmatch(statistic):
            raise InputError(
                f"unknown statistic {statistic!r}; allowed: {STATISTICS_ALLOWED}",
                key=metric,
            )
        return cls(metric=metric, statistic=statistic or found.statistic, direction=found.direction, unit=found.unit)

    @property
    def label(self) -> str:
        """`tpot_ms p90`, or the bare metric."""
        return f"{self.metric} {self.statistic}".strip()

"""Percentiles of a trial's times, each with what the sample can say about it; what it cannot support is absent."""

from collections.abc import Iterable

from codesign.results.measurement import PERCENTILES, percentile, percentile_interval, percentile_upper, statistic
from codesign.results.record import RequestSample

TIMES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def request_values(samples: Iterable[RequestSample], name: str) -> list[float]:
    """One value per request; the gaps between a request's tokens are summarised by their median first."""
    if name == "itl_ms":
        return [statistic(sample.itl_ms, "p50") for sample in samples if sample.itl_ms]
    return [value for sample in samples if (value := getattr(sample, name)) is not None]


def percentiles(samples: Iterable[RequestSample], *, confidence: float) -> dict[str, dict[str, dict[str, float]]]:
    """Metric -> "p90" -> value, early-stopping bound, and 95 % interval where there is one; times in ms.

    The bound is named with its confidence, `upper_c95`: at or above the true percentile at least that surely. It is
    there for every percentile that is, since a percentile that cannot be bounded is not shown.
    """
    kept = list(samples)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for metric in TIMES:
        values = request_values(kept, metric)
        for q in PERCENTILES:
            upper = percentile_upper(values, q, confidence=confidence)
            if upper is None:
                continue
            entry = {"value": percentile(values, q), f"upper_c{round(confidence * 100)}": upper}
            interval = percentile_interval(values, q)
            if interval is not None:
                entry |= {"low": interval[0], "high": interval[1]}
            found.setdefault(metric, {})[f"p{q:g}"] = entry
    return found

"""Capacity against queues whose true capacity is known, in virtual time."""

import dataclasses
import random
from typing import Any

import pytest

from codesign.measure.capacity import Bounds, Capacity, Probe, at_rate, find_capacity
from codesign.measure.load import Load
from codesign.results.measurement import percentile
from codesign.spec.request import Request, SamplingParams
from codesign.spec.slo import Slo
from tests.measure.queue_endpoint import QueueEndpoint, VirtualClock

LONG = Bounds(max_s=3000.0, max_probes=24)


def poisson(probe: int, count: int, *, tokens: int = 2) -> Load:
    rng = random.Random(probe)
    arrivals_s = [0.0]
    for _ in range(count - 1):
        arrivals_s.append(arrivals_s[-1] + rng.expovariate(1.0))
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True)
    requests = tuple(
        Request(request_id=f"{probe}-{index}", prompt_token_ids=(1,), sampling=sampling) for index in range(count)
    )
    return Load(requests=requests, arrivals_s=tuple(arrivals_s))


def search(slo: dict[str, Any], *, start: float = 1.0, bounds: Bounds = LONG, **server: Any) -> Capacity:
    clock = VirtualClock()
    limits = Slo.model_validate(slo).limits()
    endpoint = QueueEndpoint(clock, **server)
    return find_capacity(endpoint, poisson, limits, start_per_s=start, bounds=bounds, clock=clock)


def queue_p90_ms(rate: float, service_s: float, count: int = 200_000) -> float:
    """True p90 of the time to the last token of a queue with Poisson arrivals, by Lindley's recursion."""
    rng, wait_s, times = random.Random(1), 0.0, []
    for _ in range(count):
        times.append((wait_s + service_s) * 1e3)
        wait_s = max(0.0, wait_s + service_s - rng.expovariate(rate))
    return percentile(times, 90)


def true_capacity(bound_ms: float, service_s: float) -> float:
    low, high = 0.0, 1 / service_s
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if queue_p90_ms(middle, service_s, 20_000) <= bound_ms else (low, middle)
    return low


@pytest.mark.parametrize("start", [0.3, 5.0, 60.0])
def test_the_capacity_of_a_queue_is_found_from_below_and_from_above(start: float) -> None:
    true = true_capacity(400, 0.1)
    found = search({"e2e_ms": {"p90": 400}}, start=start)

    assert 0.8 * true <= found.rate_per_s <= 1.1 * true
    assert found.failed_per_s is not None
    assert found.rate_per_s < found.failed_per_s <= found.rate_per_s * 1.05
    assert found.broke == "slo.e2e_ms.p90"
    assert found.stopped == "resolved"


def test_the_answer_is_right_whatever_the_requests() -> None:
    true = true_capacity(400, 0.1)
    limits = Slo.model_validate({"e2e_ms": {"p90": 400}}).limits()
    found = []
    for seed in range(8):
        clock = VirtualClock()

        def fresh(probe: int, count: int, seed: int = seed) -> Load:
            return poisson(1000 * seed + probe, count)

        found.append(
            find_capacity(QueueEndpoint(clock), fresh, limits, start_per_s=2.0, bounds=LONG, clock=clock).rate_per_s
        )

    assert all(0.8 * true <= rate <= 1.15 * true for rate in found)
    assert 0.9 * true <= sorted(found)[4] <= 1.1 * true


def test_a_limit_on_the_time_per_token_alone_is_held_to_what_can_be_sustained() -> None:
    """Between two tokens of this server are 50 ms at any rate; at 10 requests a second it is the queue that breaks."""
    found = search({"tpot_ms": {"p90": 100}})

    assert 8 <= found.rate_per_s <= 11
    assert found.broke == "backlog"


def test_an_endpoint_that_fails_at_the_lowest_rate_has_none() -> None:
    found = search({"e2e_ms": {"p90": 90}})

    assert found.rate_per_s == 0
    assert found.failed_per_s is not None
    assert found.failed_per_s < 0.25 / 0.1
    assert (found.broke, found.stopped) == ("slo.e2e_ms.p90", "floor")
    assert found.verdict.startswith("below ") and "slo.e2e_ms.p90 breaks" in found.verdict


def test_an_endpoint_that_never_fails_has_at_least_the_highest_rate_tried() -> None:
    found = search({"e2e_ms": {"p90": 400}}, bounds=dataclasses.replace(LONG, max_probes=9), servers=301)

    assert found.rate_per_s == 2**8
    assert (found.failed_per_s, found.broke, found.stopped) == (None, "", "probes")
    assert found.verdict == "at least 256 requests/s; the search ran out of probes first"
    assert len(found.probes) == 9


def test_rejected_requests_break_a_rate() -> None:
    found = search({"ttft_ms": {"p50": 100_000}}, queue=3)

    assert found.broke == "rejected"
    assert found.rate_per_s <= 10
    assert next(probe for probe in found.probes if probe.broke).num_unanswered > 0


@pytest.mark.parametrize("start", [1.0, 5000.0])
def test_the_search_ends_within_its_seconds_and_one_probe(start: float) -> None:
    clock = VirtualClock()
    endpoint = QueueEndpoint(clock)
    limits = Slo.model_validate({"e2e_ms": {"p99": 400}}).limits()
    begin_s = clock()
    found = find_capacity(endpoint, poisson, limits, start_per_s=start, bounds=Bounds(max_s=60), clock=clock)

    assert clock() - begin_s <= 60 + 3 * 60 / 6 + 10
    assert found.stopped in ("seconds", "probes", "resolved")
    assert found.probes


def test_one_hiccup_does_not_end_the_doubling() -> None:
    calm = search({"e2e_ms": {"p90": 400}})
    clock = VirtualClock()
    endpoint = QueueEndpoint(clock)
    seen: list[Probe] = []

    def stumble(probe: Probe) -> None:
        seen.append(probe)
        if len(seen) == 1:
            endpoint.free_s = [clock() + 60.0]

    limits = Slo.model_validate({"e2e_ms": {"p90": 400}}).limits()
    found = find_capacity(endpoint, poisson, limits, start_per_s=1.0, bounds=LONG, clock=clock, on_probe=stumble)

    assert seen[1].broke == "slo.e2e_ms.p90"
    assert found.rate_per_s > seen[1].rate_per_s
    assert found.rate_per_s == pytest.approx(calm.rate_per_s, rel=0.1)


def test_a_rate_passes_by_the_upper_bound_and_not_by_the_sample() -> None:
    found = search({"e2e_ms": {"p90": 400}})
    passed = [probe for probe in found.probes if not probe.broke]

    assert passed
    assert all(probe.unbounded == () and probe.values["slo.e2e_ms.p90"] <= 400 for probe in passed)
    assert all(probe.num_requests >= 103 for probe in passed)


def test_what_too_few_requests_cannot_bound_is_named() -> None:
    found = search({"e2e_ms": {"p99.9": 400}}, bounds=Bounds(max_s=30))

    assert found.probes[0].unbounded == ("slo.e2e_ms.p99.9",)


def test_a_load_is_stretched_to_exactly_the_rate() -> None:
    load = at_rate(poisson(0, 41), 8.0)

    assert load.arrivals_s is not None
    assert load.arrivals_s[-1] == pytest.approx(40 / 8.0)
    assert load.arrivals_s[7] / load.arrivals_s[-1] == pytest.approx(
        poisson(0, 41).arrivals_s[7] / poisson(0, 41).arrivals_s[-1]  # type: ignore[index]
    )


def test_requests_that_came_at_once_are_spread_evenly() -> None:
    load = at_rate(dataclasses.replace(poisson(0, 5), arrivals_s=(0.0,) * 5), 2.0)

    assert load.arrivals_s == (0.0, 0.5, 1.0, 1.5, 2.0)


def test_the_failure_that_the_answer_rests_on_was_seen_twice() -> None:
    found = search({"e2e_ms": {"p90": 400}})

    assert sum(probe.rate_per_s == found.failed_per_s for probe in found.probes) == 2


def test_a_capacity_needs_a_limit_on_a_time() -> None:
    with pytest.raises(ValueError, match="limit"):
        find_capacity(QueueEndpoint(VirtualClock()), poisson, (), start_per_s=1.0, bounds=LONG)


def test_a_rate_too_low_for_the_seconds_is_not_tried_and_not_called_zero() -> None:
    found = search({"e2e_ms": {"p90": 400}}, start=0.1, bounds=Bounds(max_s=10))

    assert (found.probes, found.stopped) == ((), "seconds")
    assert found.verdict == "too few seconds for a single probe"

import pytest

from codesign.measure.counters import memory_events, memory_metrics, replayed_steps
from codesign.measure.session import TrialFailed

BEFORE = {"preemptions": 2, "blocks": 9, "blocks_used": 4, "prompt_tokens": 100, "prefix_hit_tokens": 64}


def test_what_grew_is_counted_and_the_hit_rate_is_of_tokens() -> None:
    after = {**BEFORE, "preemptions": 5, "blocks_used": 0, "prompt_tokens": 300, "prefix_hit_tokens": 160}

    assert memory_events(BEFORE, after) == {"preemptions": 3, "prefix_hit_rate": 96 / 200}


def test_what_cannot_happen_is_absent() -> None:
    assert memory_events({"preemptions": 0}, {"preemptions": 0}) == {}
    assert memory_events({}, {"preemptions": 0, "blocks": 9}) == {"preemptions": 0}
    assert memory_events(BEFORE, BEFORE) == {"preemptions": 0}, "no prompt, no rate"


@pytest.mark.parametrize(
    "lie",
    [
        {"preemptions": 1},
        {"prompt_tokens": 50},
        {"prefix_hit_tokens": 65},
        {"prompt_tokens": 101, "prefix_hit_tokens": 3},
    ],
)
def test_counters_that_cannot_be_are_not_believed(lie: dict[str, int]) -> None:
    with pytest.raises(TrialFailed, match="protocol: counters that cannot be"):
        memory_events(BEFORE, {**BEFORE, **lie})


def test_steps_are_counted_where_they_are_replayed() -> None:
    before = {**BEFORE, "graphs_captured": 2, "steps_replayed": 40, "steps_not_replayed": 9}
    after = {**before, "graphs_captured": 3, "steps_replayed": 140, "steps_not_replayed": 12}

    assert replayed_steps(before, after) == {
        "graphs_captured": 1,
        "steps_replayed": 100,
        "steps_not_replayed": 3,
    }
    assert replayed_steps(BEFORE, BEFORE) == {}


def test_what_happened_becomes_metrics_per_request_and_medians_with_their_count() -> None:
    use = {"num_samples": 40, "fragmentation": {"p50": 0.2, "max": 0.9}, "shared_bytes": {"p50": 64, "max": 96}}

    found = memory_metrics(
        {"preemptions": 3, "prefix_hit_rate": 0.5, "kv_use": use}, num_requests=12, asked=frozenset[str]()
    )

    assert {name: (value.value, value.num_samples) for name, value in found.items()} == {
        "prefix_hit_rate": (0.5, 12),
        "preemptions_per_request": (0.25, 12),
        "kv_fragmentation": (0.2, 40),
        "kv_shared_bytes": (64, 40),
    }


def test_a_cache_that_takes_nothing_back_and_shares_nothing_has_zeros_for_who_asks() -> None:
    assert memory_metrics({}, num_requests=3, asked=frozenset[str]()) == {}
    asked = memory_metrics({}, num_requests=3, asked={"preemptions_per_request", "kv_fragmentation"})

    assert {name: value.value for name, value in asked.items()} == {"preemptions_per_request": 0.0}

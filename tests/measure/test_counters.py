import pytest

from codesign.measure.counters import memory_events
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

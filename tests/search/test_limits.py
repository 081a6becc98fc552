import pytest

from codesign.errors import InputError
from codesign.search.limits import DEFAULT_TRIALS, Limits, expected, limits_of, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("20m", 1200), ("20min", 1200), ("1.5h", 5400), ("1d", 86400)]
)
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5m", "5 weeks", "1e3", "nan", "inf", "m", "20 m 3", "9999999", "٣m"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(InputError, match="20m"):
        parse_duration(text)


def test_the_expected_duration_is_the_median_of_the_latest() -> None:
    assert expected([]) == 0
    assert expected([100.0] * 20 + [1.0] * 9) == 1.0


def test_a_budget_alone_lifts_the_default_total() -> None:
    assert limits_of(None, None) == Limits(trials=DEFAULT_TRIALS)
    assert limits_of(None, "1m") == Limits(trials=None, budget_s=60)
    assert limits_of(5, "1m") == Limits(trials=5, budget_s=60)


@pytest.mark.parametrize(
    ("done", "elapsed_s", "stops"), [(0, 1e9, False), (1, 50, False), (1, 51, True), (1, 61, True), (9, 0, False)]
)
def test_no_trial_starts_that_would_not_end_in_time(done: int, elapsed_s: float, stops: bool) -> None:
    limits = Limits(trials=None, budget_s=60)

    assert (limits.stop(done=done, elapsed_s=elapsed_s, durations_s=[10.0]) is not None) is stops

import random

import pytest

from codesign.measure.bootstrap import bootstrap, share


def test_the_interval_covers_what_it_says() -> None:
    rng = random.Random(1)
    samples = [[rng.expovariate(1.0) for _ in range(30)] for _ in range(300)]
    intervals = [bootstrap(sample) for sample in samples]
    covered = sum(found.low <= 1.0 <= found.high for found in intervals)

    assert 0.87 <= covered / len(samples) <= 0.97  # skewed samples of 30 are known to cover a little less than 95 %


def test_the_same_values_give_the_same_interval_around_their_mean() -> None:
    found = bootstrap([0.0, 1.0, 2.0, 5.0])

    assert found == bootstrap([0.0, 1.0, 2.0, 5.0])
    assert found.low < found.mean == 2.0 < found.high


def test_a_share_of_samples_that_are_all_alike_is_not_certain() -> None:
    none, all_of_them = share([False] * 16), share([True] * 16)

    assert (none.mean, none.low) == (0.0, 0.0) and 0.1 < none.high < 0.3
    assert (all_of_them.mean, all_of_them.high) == (1.0, 1.0) and 0.7 < all_of_them.low < 0.9


def test_a_share_of_mixed_samples_is_bootstrapped() -> None:
    assert share([True, False] * 8) == bootstrap([1.0, 0.0] * 8)


def test_no_values_have_no_interval() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap([])

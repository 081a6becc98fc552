import itertools
from collections.abc import Iterator

import pytest

from codesign.measure.samples import Samples


@pytest.mark.parametrize("turns", [0, 1, 7, 8, 9, 16, 17, 1000])
def test_readings_are_few_and_evenly_spread_however_long_it_takes(turns: int) -> None:
    samples = Samples[int](8)
    for turn in range(turns):
        samples.turn(lambda turn=turn: turn)  # type: ignore[misc]

    kept = samples.take()
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert len(kept) <= 8 and len(kept) >= min(turns, 4)
    assert kept[:1] == [0][:turns] and len(gaps) <= 1
    assert not kept or turns - kept[-1] <= max(gaps, default=1)


def test_what_was_taken_starts_anew() -> None:
    numbers: Iterator[int] = iter(range(100))
    samples = Samples[int](4)
    for _ in range(20):
        samples.turn(lambda: next(numbers))
    samples.take()
    samples.turn(lambda: -1)
    samples.turn(lambda: -2)

    assert samples.take() == [-1, -2]

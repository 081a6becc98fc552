import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.spec.lengths import Empirical, Lengths, LogNormal
from codesign.spec.workload import Arrival, SharedPrefix, Workload

MANY = 20_000

TOKENS = st.integers(1, 5000)
LENGTHS = (
    st.builds(Lengths, fixed=TOKENS)
    | st.tuples(TOKENS, TOKENS).map(lambda pair: Lengths(uniform=(min(pair), max(pair))))
    | st.lists(TOKENS, min_size=1, max_size=5).map(lambda values: Lengths(choices=tuple(values)))
    | st.tuples(st.lists(TOKENS, min_size=1, max_size=5), st.booleans()).map(
        lambda pair: Lengths(empirical=Empirical(lengths=tuple(pair[0]), in_order=pair[1]))
    )
    | st.lists(TOKENS, min_size=3, max_size=3, unique=True)
    .map(sorted)
    .map(lambda values: Lengths(lognormal=LogNormal(median=values[0], p90=values[1], max=values[2])))
)


@given(LENGTHS, st.integers(0, 2**32))
def test_lengths_stay_within_bounds_and_repeat_by_seed(lengths: Lengths, seed: int) -> None:
    drawn = lengths.sample(random.Random(seed), 50)

    assert all(1 <= length <= lengths.max for length in drawn)
    assert drawn == lengths.sample(random.Random(seed), 50)


def test_lognormal_lengths_have_the_median_and_p90_that_were_asked_for() -> None:
    drawn = Lengths(lognormal=LogNormal(median=300, p90=900, max=100_000)).sample(random.Random(0), MANY)

    assert statistics.median(drawn) == pytest.approx(300, rel=0.03)
    assert statistics.quantiles(drawn, n=10)[-1] == pytest.approx(900, rel=0.05)


def test_uniform_lengths_reach_both_ends() -> None:
    drawn = Lengths(uniform=(3, 6)).sample(random.Random(0), 1000)

    assert set(drawn) == {3, 4, 5, 6}


def test_a_value_listed_twice_comes_twice_as_often() -> None:
    drawn = Lengths(choices=(1, 1, 2)).sample(random.Random(0), MANY)

    assert drawn.count(1) / MANY == pytest.approx(2 / 3, abs=0.02)


def test_a_bare_number_means_that_length_every_time() -> None:
    workload = Workload.model_validate(
        {"scenario": "offline", "prompt_tokens": 7, "output_tokens": {"fixed": 3}, "num_requests": 1}
    )

    assert workload.prompt_tokens.sample(random.Random(0), 3) == (7, 7, 7)
    assert workload.max_model_len == 10


@pytest.mark.parametrize(
    ("arrival", "variation"),
    [
        (Arrival(process="poisson", rate_per_s=4), 1.0),
        (Arrival(process="constant", rate_per_s=4), 0.0),
        (Arrival(process="gamma", rate_per_s=4, burstiness=4), 4.0),
        (Arrival(process="gamma", rate_per_s=4, burstiness=0.25), 0.25),
    ],
)
def test_gaps_have_the_rate_and_burstiness_that_were_asked_for(arrival: Arrival, variation: float) -> None:
    gaps = arrival.gaps_s(random.Random(0), MANY)
    mean = statistics.fmean(gaps)

    assert mean == pytest.approx(0.25, rel=0.05)
    assert statistics.pvariance(gaps) / mean**2 == pytest.approx(variation, rel=0.1, abs=1e-9)


def test_a_conversation_needs_room_for_all_its_turns() -> None:
    plain = {"scenario": "interactive", "concurrency": 2, "prompt_tokens": 100, "output_tokens": {"uniform": [5, 10]}}
    talk = {"turns": 3, "user_tokens": {"choices": [4, 20]}}
    workload = Workload.model_validate({**plain, "conversation": talk, "num_requests": 6})

    assert workload.max_model_len == 100 + 10 + 2 * (20 + 10)


@given(share=st.floats(0, 1), length=st.integers(1, 10_000))
def test_the_last_token_of_a_prompt_is_its_own(share: float, length: int) -> None:
    assert 0 <= SharedPrefix(num_groups=1, share=share).of(length) < length
    assert 0 <= SharedPrefix(num_groups=1, tokens=500).of(length) == min(500, length - 1)


def test_observed_lengths_are_drawn_as_often_as_they_were_observed() -> None:
    drawn = Lengths(empirical=Empirical(lengths=(7, 7, 7, 30))).sample(random.Random(0), MANY)

    assert set(drawn) == {7, 30}
    assert drawn.count(30) / MANY == pytest.approx(0.25, abs=0.02)

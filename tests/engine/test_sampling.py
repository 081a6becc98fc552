import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.sampling import sample, token_law
from codesign.errors import NumericalError
from codesign.spec.request import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.5, 0.0, 2.5, -9.0, 1.5])


def params(**values: float | int) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1, "temperature": 1.0, **values})  # type: ignore[arg-type]


def slow_law(logits: list[float], *, temperature: float, top_k: int, top_p: float) -> list[float]:
    """The same law in plain Python, token by token."""
    best = max(logits)
    mass = [math.exp((value - best) / temperature) for value in logits]
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    ranked = ranked[: top_k or len(ranked)]
    total = math.fsum(mass[i] for i in ranked)
    kept, held = [], 0.0
    for i in ranked:
        kept.append(i)
        held += mass[i] / total
        if held >= top_p and top_p < 1:
            break
    total = math.fsum(mass[i] for i in kept)
    return [mass[i] / total if i in kept else 0.0 for i in range(len(logits))]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(
        st.tuples(
            st.lists(st.integers(-40, 40).map(lambda n: n / 4), min_size=12, max_size=12),
            st.floats(0.05, 5.0),
            st.integers(0, 14),
            # None is a fraction that equal tokens could add up to: there the last bit would decide.
            st.sampled_from([1.0, 0.9987, 0.9137, 0.5123, 0.0131, 1e-9]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_law_is_that_of_the_slow_oracle(rows: list[tuple[list[float], float, int, float]]) -> None:
    settings_of = [params(temperature=t, top_k=k, top_p=p) for _, t, k, p in rows]

    law = token_law(torch.tensor([logits for logits, *_ in rows]), settings_of)

    expected = [slow_law(logits, temperature=t, top_k=k, top_p=p) for logits, t, k, p in rows]
    assert torch.allclose(law, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert torch.equal(law > 0, torch.tensor(expected, dtype=torch.float64) > 0)


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = law * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    return float(((counts - expected)[seen] ** 2 / expected[seen]).sum())


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"top_k": 5, "top_p": 0.7, "temperature": 2.0},
    ],
)
def test_tokens_are_drawn_from_the_law(values: dict[str, float]) -> None:
    """Chi-square with 7 degrees of freedom exceeds 29.9 once in ten thousand; the seed is fixed."""
    one, num_draws = params(**values), 20_000
    stream = random.Random(1)

    tokens = sample(LOGITS.expand(num_draws, -1), [one] * num_draws, [stream] * num_draws)

    counts = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)).double()
    assert chi_square(counts, token_law(LOGITS[None], [one])[0]) < 29.9


def test_chi_square_sees_a_temperature_that_is_off_by_a_tenth() -> None:
    one, num_draws = params(temperature=1.1), 20_000
    tokens = sample(LOGITS.expand(num_draws, -1), [one] * num_draws, [random.Random(1)] * num_draws)

    counts = torch.bincount(torch.tensor(tokens), minlength=len(LOGITS)).double()

    assert chi_square(counts, token_law(LOGITS[None], [params()])[0]) > 29.9


def test_top_k_of_one_and_a_tiny_temperature_equal_greedy() -> None:
    logits = torch.randn(50, 97, generator=torch.Generator().manual_seed(0))
    streams = [random.Random(index) for index in range(50)]
    greedy = sample(logits, [params(temperature=0.0)] * 50, streams)

    assert greedy == logits.argmax(dim=-1).tolist()
    assert sample(logits, [params(temperature=5.0, top_k=1)] * 50, streams) == greedy
    assert sample(logits, [params(temperature=1e-30)] * 50, streams) == greedy
    assert sample(logits, [params(top_p=1e-12)] * 50, streams) == greedy


def test_equal_logits_keep_exactly_k_lowest_ids() -> None:
    law = token_law(torch.zeros(1, 10), [params(top_k=4)])[0]

    assert law.tolist() == [0.25] * 4 + [0.0] * 6


def test_top_k_beyond_the_vocabulary_keeps_all() -> None:
    assert torch.allclose(token_law(LOGITS[None], [params(top_k=10**9)]), token_law(LOGITS[None], [params()]))


def test_a_row_draws_the_same_whoever_else_is_in_the_batch() -> None:
    logits = torch.randn(6, 1000, generator=torch.Generator().manual_seed(0))
    mixed = [
        params(temperature=0.0),
        params(temperature=0.7),
        params(top_k=50),
        params(top_p=0.9),
        params(temperature=2.0),
        params(temperature=1.3, top_k=400, top_p=0.95),
    ]
    alone = [sample(logits[i : i + 1], [mixed[i]], [random.Random(i)])[0] for i in range(6)]

    assert sample(logits, mixed, [random.Random(i) for i in range(6)]) == alone


def test_greedy_takes_nothing_from_the_stream() -> None:
    stream = random.Random(3)
    before = stream.getstate()

    sample(LOGITS[None], [params(temperature=0.0)], [stream])

    assert stream.getstate() == before


class LastMoment(random.Random):
    """The largest number that a stream can give."""

    def random(self) -> float:
        return math.nextafter(1.0, 0.0)


def test_largest_uniform_number_still_gives_a_token_of_positive_probability() -> None:
    logits = torch.cat((torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.full((9,), -torch.inf)))

    for one in (params(), params(top_k=7), params(top_p=0.5)):
        (token,) = sample(logits[None], [one], [LastMoment()])
        assert token_law(logits[None], [one])[0, token] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_numerical_errors(value: float, temperature: float) -> None:
    logits = torch.zeros(3, 50)
    logits[1, 17] = value

    with pytest.raises(NumericalError):
        sample(logits, [params(temperature=temperature)] * 3, [random.Random(0)] * 3)


def test_row_of_minus_infinity_is_a_numerical_error() -> None:
    with pytest.raises(NumericalError):
        sample(torch.full((1, 5), -torch.inf), [params()], [random.Random(0)])

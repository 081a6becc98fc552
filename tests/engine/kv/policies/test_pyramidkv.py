import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.kv.policies.pyramidkv import PyramidKV


@given(
    num_layers=st.integers(1, 48),
    window=st.integers(1, 64),
    sinks=st.integers(0, 8),
    extra=st.integers(1, 3000),
    room=st.integers(0, 3000),
    beta=st.one_of(st.integers(1, 60), st.floats(1, 60)),
)
def test_budgets_sum_exactly_decline_and_stay_within_their_limits(
    num_layers: int, window: int, sinks: int, extra: int, room: int, beta: float
) -> None:
    kv_budget = window + sinks + extra
    max_model_len = kv_budget + room
    policy = PyramidKV(kv_budget=kv_budget, window_tokens=window, num_sink_tokens=sinks, beta=beta)

    budgets = policy.budgets(num_layers=num_layers, max_model_len=max_model_len)

    assert sum(budgets) == num_layers * kv_budget
    assert all(window + sinks < budget <= max_model_len for budget in budgets)
    assert list(budgets) == sorted(budgets, reverse=True)


@pytest.mark.parametrize(
    ("kv_budget", "window", "max_model_len", "first", "last"),
    [
        (128, 8, 8192, 242, 14),  # released code: 242 .. 25, whose mean is 133.5
        (128, 32, 8192, 219, 37),  # released code: 220 .. 65, whose mean is 142.5; w + c/beta = 36.8
        (2048, 32, 8192, 3963, 133),
    ],
)
def test_a_deep_model_gets_the_pyramid_of_the_paper_with_the_nominal_mean(
    kv_budget: int, window: int, max_model_len: int, first: int, last: int
) -> None:
    policy = PyramidKV(kv_budget=kv_budget, window_tokens=window, beta=20)

    budgets = policy.budgets(num_layers=32, max_model_len=max_model_len)

    assert (budgets[0], budgets[-1]) == (first, last)
    assert sum(budgets) / 32 == kv_budget


@pytest.mark.parametrize("kv_budget", [0.12, 0.25, 1024, 983])
def test_small_budgets_never_become_uniform(kv_budget: int | float) -> None:
    """kvpress falls back to equal budgets below beta x window = 1280 kept tokens, without a word."""
    budgets = PyramidKV(kv_budget=kv_budget).budgets(num_layers=32, max_model_len=8192)

    assert budgets[0] > 1.8 * budgets[-1]


def test_beta_one_is_flat() -> None:
    assert set(PyramidKV(kv_budget=100, beta=1).budgets(num_layers=7, max_model_len=512)) == {100}


def test_a_prompt_too_short_for_the_first_layers_gives_their_mass_to_the_others() -> None:
    budgets = PyramidKV(kv_budget=100, window_tokens=8, beta=20).budgets(num_layers=8, max_model_len=120)

    assert budgets[0] == 120 and sum(budgets) == 800


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"beta": 0.5}, "beta must be a number of at least 1"),
        ({"beta": float("nan")}, "beta"),
        ({"beta": "steep"}, "beta"),
        ({"kernel_size": 4}, "odd"),
    ],
)
def test_wrong_knobs_are_refused_with_what_is_allowed(knobs: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PyramidKV(**knobs)  # type: ignore[arg-type]

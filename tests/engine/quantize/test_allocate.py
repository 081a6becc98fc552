import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.engine.quantize.allocate import Option, allocate

LAYER = st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=4, unique_by=lambda pair: pair[0])
LAYERS = st.lists(LAYER, min_size=1, max_size=4)


def options(layers: list[list[tuple[int, float]]]) -> dict[str, list[Option]]:
    return {
        f"layer {number}": [Option(f"{size} bytes", size, loss) for size, loss in own]
        for number, own in enumerate(layers)
    }


def totals(chosen: dict[str, Option]) -> tuple[int, float]:
    return sum(o.num_bytes for o in chosen.values()), sum(o.loss for o in chosen.values())


@given(LAYERS, st.integers(1, 200))
def test_the_budget_is_kept_and_every_layer_has_one_of_its_options(
    layers: list[list[tuple[int, float]]], max_bytes: int
) -> None:
    own = options(layers)
    if max_bytes < sum(min(o.num_bytes for o in some) for some in own.values()):
        with pytest.raises(ValueError, match="the smallest choice takes"):
            allocate(own, max_bytes=max_bytes)
        return

    chosen = allocate(own, max_bytes=max_bytes)

    assert totals(chosen)[0] <= max_bytes
    assert chosen.keys() == own.keys()
    assert all(chosen[name] in own[name] for name in own)


@given(LAYERS, st.integers(1, 200))
def test_what_is_lost_is_within_one_step_of_the_best(layers: list[list[tuple[int, float]]], max_bytes: int) -> None:
    """The relaxed optimum differs from the whole one by less than the largest single step."""
    own = options(layers)
    fitting = [
        sum(o.loss for o in choice)
        for choice in itertools.product(*own.values())
        if sum(o.num_bytes for o in choice) <= max_bytes
    ]
    if not fitting:
        return

    lost = totals(allocate(own, max_bytes=max_bytes))[1]

    largest_step = max(max(o.loss for o in some) - min(o.loss for o in some) for some in own.values())
    assert min(fitting) - 1e-9 <= lost <= min(fitting) + largest_step + 1e-9


@given(LAYERS, st.floats(0, 4))
def test_the_loss_limit_is_kept_where_it_can_be(layers: list[list[tuple[int, float]]], max_loss: float) -> None:
    own = options(layers)
    least = sum(min(o.loss for o in some) for some in own.values())
    if max_loss < least - 1e-9:
        with pytest.raises(ValueError, match="the largest choice loses"):
            allocate(own, max_loss=max_loss)
    elif max_loss > least + 1e-9:
        assert totals(allocate(own, max_loss=max_loss))[1] <= max_loss + 1e-9


def test_bytes_go_where_they_save_most() -> None:
    own = {
        "fragile": [Option("int2", 2, 10.0), Option("int4", 4, 1.0)],
        "robust": [Option("int2", 2, 0.2), Option("int4", 4, 0.1)],
    }

    chosen = allocate(own, max_bytes=6)

    assert {layer: option.name for layer, option in chosen.items()} == {"fragile": "int4", "robust": "int2"}


def test_more_bytes_never_lose_more() -> None:
    own = options([[(2, 0.9), (3, 0.5), (4, 0.1)], [(2, 0.6), (4, 0.3), (8, 0.0)], [(3, 0.2), (5, 0.1)]])

    losses = [totals(allocate(own, max_bytes=limit))[1] for limit in range(7, 20)]

    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("limits", [{}, {"max_bytes": 3, "max_loss": 0.1}])
def test_one_limit_is_needed(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        allocate(options([[(1, 0.0)]]), **limits)  # type: ignore[arg-type]

"""What every pruner owes, over the registry."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.prune.pruner import Pruner, lower_half_of_fours
from codesign.engine.prune.pruners.magnitude import Magnitude
from codesign.engine.prune.pruners.wanda import Wanda
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear
from codesign.errors import Unsupported
from codesign.registry import PRUNERS
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, request

SCORING = [name for name in PRUNERS.names() if name != "none"]
CONFIG = EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=64)


def inputs(num_in: int = 64, seed: int = 0) -> InputStats:
    x = torch.randn(200, num_in, generator=torch.Generator().manual_seed(seed)) * torch.logspace(-2, 2, num_in)
    stats = InputStats(num_in)
    stats.add(x)
    return stats


def dense(num_out: int = 24, num_in: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(seed))


def weights_of(config: EngineConfig, spec: ModelSpec | None = None) -> dict[str, Tensor]:
    engine = build_engine(spec or tiny_spec(), config)
    return {
        f"{index} {name}": part.dequantize()
        for index, layer in enumerate(engine.parts.model.layers)
        for name, part in layer.named_modules()
        if isinstance(part, Linear)
    }


@pytest.mark.parametrize("name", SCORING)
@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 1000))
def test_exactly_the_share_asked_for_becomes_zero_and_the_rest_stays(name: str, sparsity: float, seed: int) -> None:
    weight = dense(seed=seed)

    found = PRUNERS.create(name, sparsity=sparsity).prune(weight, inputs())

    per_row = int(sparsity * 64)
    wanted = per_row * 24 if name == "wanda" else int(sparsity * weight.numel())
    assert int((found == 0).sum()) == wanted
    assert torch.equal(found[found != 0], weight[found != 0])


@pytest.mark.parametrize("name", SCORING)
def test_two_of_four_leaves_two_of_every_four_neighbouring_inputs(name: str) -> None:
    found = PRUNERS.create(name, pattern="two_of_four").prune(dense(), inputs())

    assert ((found.view(24, 16, 4) != 0).sum(-1) == 2).all()


@given(st.lists(st.integers(0, 3), min_size=8, max_size=8))
def test_two_of_four_drops_the_lowest_scores_also_among_equals(values: list[int]) -> None:
    score = torch.tensor([values], dtype=torch.float32)

    dropped = lower_half_of_fours(score)

    for part in (slice(0, 4), slice(4, 8)):
        assert int(dropped[0, part].sum()) == 2
        assert score[0, part][dropped[0, part]].max() <= score[0, part][~dropped[0, part]].min()


def test_magnitude_ranks_the_whole_matrix_and_wanda_each_row() -> None:
    weight = dense()
    weight[0] *= 1e-3

    by_magnitude = Magnitude().prune(weight, None)
    by_wanda = Wanda().prune(weight, inputs())

    assert (by_magnitude[0] == 0).all()
    assert ((by_wanda == 0).sum(1) == 32).all()


def test_wanda_keeps_small_weights_on_large_inputs() -> None:
    weight = torch.tensor([[1.0, 0.1]])
    stats = InputStats(2)
    stats.add(torch.tensor([[1.0, 100.0], [1.0, -100.0]]))

    assert Wanda().prune(weight, stats).tolist() == [[0.0, pytest.approx(0.1)]]
    assert Magnitude().prune(weight, None).tolist() == [[1.0, 0.0]]


def test_wanda_loses_less_output_than_magnitude_on_uneven_inputs() -> None:
    weight = dense(64, 64)
    x = torch.randn(500, 64) * torch.logspace(-2, 2, 64)
    stats = InputStats(64)
    stats.add(x)

    errors = {
        type(pruner).__name__: float(((weight - pruner.prune(weight, stats)) @ x.t()).norm())
        for pruner in (Wanda(), Magnitude())
    }

    assert errors["Wanda"] < 0.5 * errors["Magnitude"]


@pytest.mark.parametrize("name", PRUNERS.names())
def test_pruners_leave_the_weight_alone(name: str) -> None:
    weight = dense()
    kept = weight.clone()
    member: Pruner = PRUNERS.create(name)

    found = member.prune(weight, inputs())

    assert torch.equal(weight, kept)
    assert found.shape == weight.shape
    assert dataclasses.is_dataclass(member)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"pattern": "one_of_two"}, "pattern must be one of unstructured, two_of_four"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity must be in \[0, 1\)"),
        ({"pattern": "two_of_four", "sparsity": 0.6}, "two_of_four is a sparsity of 0.5"),
    ],
)
def test_knobs_out_of_range_are_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wanda(**knobs)  # type: ignore[arg-type]


def test_an_input_size_that_is_no_multiple_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        lower_half_of_fours(torch.zeros(2, 6))


@pytest.mark.parametrize("name", SCORING)
@pytest.mark.parametrize("weights", [Choice("native"), Choice.of("int4", group_size=32, symmetric=True)])
def test_a_built_engine_holds_the_zeros(name: str, weights: Choice) -> None:
    config = dataclasses.replace(CONFIG, prune=Choice.of(name, pattern="two_of_four"), weights=weights)

    for weight in weights_of(config).values():
        assert ((weight.view(weight.shape[0], -1, 4) == 0).sum(-1) >= 2).all()
    assert len(generate(build_engine(tiny_spec(), config), request("one", 10, 5))["one"]) == 5


def test_no_sparsity_changes_nothing() -> None:
    plain = weights_of(CONFIG)
    pruned = weights_of(dataclasses.replace(CONFIG, prune=Choice.of("wanda", sparsity=0.0)))

    for name, weight in plain.items():
        assert torch.equal(pruned[name], weight)


def test_pruned_weights_have_entries_of_their_own_in_the_cache(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = dataclasses.replace(CONFIG, weights=Choice("int8"))
    pruned = dataclasses.replace(config, prune=Choice.of("wanda", sparsity=0.9))
    build_engine(tiny_spec(), config)

    found = weights_of(pruned)
    again = weights_of(pruned)

    assert all((weight == 0).float().mean() > 0.8 for weight in found.values())
    assert all(torch.equal(again[name], weight) for name, weight in found.items())


def test_gptq_is_refused_because_it_would_fill_the_zeros() -> None:
    config = dataclasses.replace(CONFIG, prune=Choice("wanda"), weights=Choice.of("int4", method="gptq"))

    with pytest.raises(Unsupported, match="gptq pushes rounding errors into pruned weights"):
        build_engine(tiny_spec(), config)

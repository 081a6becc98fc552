"""mixed: the budget is kept by what is really held, and spent where it saves most."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.caches import cache_folder
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.formats.mixed import Mixed
from codesign.engine.quantize.linear import Linear, Workspace, weight_bytes
from codesign.engine.quantize.plan import Plan, make_plan
from codesign.engine.quantize.sensitivity import Sensitivity
from codesign.errors import InputError, Unsupported
from codesign.spec.engine_config import Choice, EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, request

BUNDLED = ModelSpec(name="bundled", path=str(target_path()))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def build(spec: ModelSpec, **knobs: object) -> Engine:
    weights = Choice.of("mixed", **knobs)  # type: ignore[arg-type]
    return build_engine(spec, EngineConfig(max_batch_size=1, max_model_len=64, weights=weights))


def linears(engine: Engine) -> list[Linear]:
    return [part for layer in engine.parts.model.layers for part in layer.modules() if isinstance(part, Linear)]


def bits(engine: Engine) -> float:
    parts = linears(engine)
    return 8 * sum(map(weight_bytes, parts)) / sum(part.in_features * part.out_features for part in parts)


@pytest.mark.parametrize("budget", [3.0, 3.5, 5.0])
def test_what_is_held_is_within_the_budget_and_close_to_it(budget: float) -> None:
    engine = build(tiny_spec("Qwen2ForCausalLM", hidden_size=128, intermediate_size=256), bits=budget, group_size=32)

    assert budget - 0.6 < bits(engine) <= budget
    assert len({part.kernel for part in linears(engine)} | {type(part) for part in linears(engine)}) > 1
    assert len(generate(engine, request("one", 10, 6))["one"]) == 6


def test_a_second_build_measures_no_sensitivity_again_whatever_its_budget_and_method() -> None:
    build(tiny_spec(), bits=4.5, group_size=32)
    (file,) = cache_folder("sensitivity").iterdir()
    written = file.stat().st_mtime_ns

    build(tiny_spec(), bits=5.5, group_size=32)
    build(tiny_spec(), bits=5.5, group_size=32, method="gptq")

    assert [(f.name, f.stat().st_mtime_ns) for f in cache_folder("sensitivity").iterdir()] == [(file.name, written)]
    assert len(list(cache_folder("weights").iterdir())) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"losses": 3, "num_weights": 1}', '{"losses": [[1]]}'])
def test_a_damaged_file_of_sensitivities_is_measured_again(content: str) -> None:
    build(tiny_spec(), bits=4.5, group_size=32)
    (file,) = cache_folder("sensitivity").iterdir()
    whole = file.read_text()
    file.write_text(content)

    build(tiny_spec(), bits=5.0, group_size=32)

    assert set(json.loads(file.read_text())) == set(json.loads(whole))


def test_sensitivities_fall_with_bits_and_survive_json() -> None:
    build(BUNDLED, bits=4.5)
    (file,) = cache_folder("sensitivity").iterdir()
    found = Sensitivity.from_json(json.loads(file.read_text()))

    assert len(found.losses) == 4 * 10
    assert Sensitivity.from_json(json.loads(json.dumps(found.to_json()))) == found
    for own in found.losses.values():
        assert [own[name][0] for name in ("int2", "int3", "int4", "int8")] == sorted(size for size, _ in own.values())
        assert own["int2"][1] > own["int4"][1] > own["int8"][1] >= 0


def test_a_budget_below_the_smallest_format_is_refused() -> None:
    with pytest.raises(Unsupported, match="the smallest choice takes"):
        build(tiny_spec(), bits=2.1, group_size=32)


@pytest.mark.parametrize("bad", [2.0, 17, True, -1.0])
def test_a_budget_that_makes_no_sense_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="bits must be above 2"):
        Mixed(bits=bad)


LOSSES = st.lists(
    st.tuples(st.floats(0, 1), st.floats(0, 0.3), st.floats(0, 0.1), st.floats(0, 0.01)), min_size=1, max_size=6
)
LIMITS = st.floats(1e-3, 8)
SIZES = {"int2": 200, "int3": 300, "int4": 400, "int8": 800}


def sensitivity_of(losses: list[tuple[float, ...]]) -> Sensitivity:
    """One weight of 800 a row, whose KLs in int2, int3, int4 and int8 these are."""
    found = {
        (layer, "qkv"): {name: (SIZES[name], loss) for name, loss in zip(SIZES, row, strict=True)}
        for layer, row in enumerate(losses)
    }
    return Sensitivity(found, 800 * len(losses))


def totals(plan: Plan, sensitivity: Sensitivity) -> tuple[int, float]:
    """(bytes, summed KL) of a plan."""
    held = [sensitivity.losses[layer, linear][name] for layer, linear, name in plan.names]
    return sum(size for size, _ in held), sum(loss for _, loss in held)


@given(LOSSES, LIMITS, LIMITS)
def test_a_plan_within_a_kl_keeps_it_and_a_larger_one_never_takes_more_bytes(
    losses: list[tuple[float, ...]], one: float, other: float
) -> None:
    sensitivity, (small, large) = sensitivity_of(losses), sorted((one, other))
    if small < sum(map(min, losses)) + 1e-9:
        return

    few, many = (make_plan(Mixed(max_kl=limit), sensitivity) for limit in (large, small))

    assert totals(many, sensitivity)[1] <= small + 1e-9
    assert totals(few, sensitivity)[1] <= large + 1e-9
    assert totals(few, sensitivity)[0] <= totals(many, sensitivity)[0]


def test_no_byte_is_spent_that_the_kl_does_not_ask_for() -> None:
    sensitivity = sensitivity_of([(0.5, 0.2, 0.05, 0.0), (0.5, 0.2, 0.05, 0.0)])

    plan = make_plan(Mixed(max_kl=0.25), sensitivity)

    assert sorted(name for _, _, name in plan.names) == ["int3", "int4"]


def test_a_kl_below_what_the_largest_formats_lose_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the largest choice loses 0\.02, the limit is 0\.01"):
        make_plan(Mixed(max_kl=0.01), sensitivity_of([(0.5, 0.2, 0.05, 0.02)]))
    with pytest.raises(Unsupported, match="weights mixed: the largest choice loses"):
        build(tiny_spec(), max_kl=1e-12, group_size=32)


def test_an_engine_within_a_kl_is_smaller_the_more_it_may_lose() -> None:
    build(tiny_spec(), bits=4.5, group_size=32)
    (file,) = cache_folder("sensitivity").iterdir()
    most = sum(own["int2"][1] for own in Sensitivity.from_json(json.loads(file.read_text())).losses.values())

    held = [bits(build(tiny_spec(), max_kl=share * most, group_size=32)) for share in (0.01, 0.2, 1.01)]

    assert held == sorted(held, reverse=True)
    assert len(set(held)) == 3


def test_sensitivities_are_measured_once_for_both_kinds_of_budget() -> None:
    build(tiny_spec(), bits=4.5, group_size=32)
    build(tiny_spec(), max_kl=0.5, group_size=32)
    build(tiny_spec(), max_kl=0.6, group_size=32, method="gptq")

    assert len(list(cache_folder("sensitivity").iterdir())) == 1


def test_two_budgets_are_one_too_many() -> None:
    with pytest.raises(InputError, match=r"bits 4\.5 and max_kl 0\.1 are two budgets") as caught:
        EngineConfig.from_dict({"weights": {"name": "mixed", "bits": 4.5, "max_kl": 0.1}}).resolve()
    assert caught.value.key == "weights"


@pytest.mark.parametrize("bad", [0.0, -0.1, True, float("nan"), float("inf")])
def test_a_kl_that_makes_no_sense_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="max_kl must be above 0"):
        Mixed(max_kl=bad)


def test_a_weight_by_itself_has_no_kl_to_keep() -> None:
    with pytest.raises(ValueError, match="needs bits"):
        Mixed(max_kl=0.1).pack(torch.randn(64, 128), None, dtype=torch.bfloat16, workspace=Workspace())


def test_a_weight_by_itself_gets_the_largest_format_that_fits() -> None:
    weight = torch.randn(64, 128)
    held = [
        weight_bytes(Mixed(bits=budget).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())) * 8 / 64 / 128
        for budget in (2.6, 3.6, 4.6, 8.3)
    ]

    assert held == sorted(held)
    assert all(found <= budget for found, budget in zip(held, (2.6, 3.6, 4.6, 8.3), strict=True))
    assert len(set(held)) == 4

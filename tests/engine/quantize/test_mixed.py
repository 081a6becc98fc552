"""mixed: the budget is kept by what is really held, and spent where it saves most."""

import json
from pathlib import Path

import pytest
import torch

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.caches import cache_folder
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.formats.mixed import Mixed
from codesign.engine.quantize.linear import Linear, Workspace, weight_bytes
from codesign.engine.quantize.sensitivity import Sensitivity
from codesign.errors import Unsupported
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


def test_a_weight_by_itself_gets_the_largest_format_that_fits() -> None:
    weight = torch.randn(64, 128)
    held = [
        weight_bytes(Mixed(bits=budget).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())) * 8 / 64 / 128
        for budget in (2.6, 3.6, 4.6, 8.3)
    ]

    assert held == sorted(held)
    assert all(found <= budget for found, budget in zip(held, (2.6, 3.6, 4.6, 8.3), strict=True))
    assert len(set(held)) == 4

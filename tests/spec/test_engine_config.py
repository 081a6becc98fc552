from pathlib import Path
from typing import Any

import pytest

from codesign.errors import InputError
from codesign.registry import Family
from codesign.spec.engine_config import (
    FAMILIES,
    PLAIN_FIELDS,
    Choice,
    EngineConfig,
    KernelsConfig,
    KVConfig,
    ParallelConfig,
    load_config,
)
from codesign.spec.yaml import dump_yaml
from tests.spec.hostile import CONFIG


def test_plain_data_comes_back_equal() -> None:
    config = EngineConfig(
        dtype="fp16",
        kv_memory_bytes=2**30,
        weights=Choice.of("int4", group_size=32),
        kv=KVConfig(policy=Choice.of("h2o", kv_budget=0.2)),
        kernels=KernelsConfig(fused=True),
        parallel=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3, num_micro_batches=6),
    )

    assert EngineConfig.from_dict(config.to_dict()) == config


def test_a_name_is_a_choice_without_knobs() -> None:
    config = EngineConfig.from_dict({"weights": "int8", "kv": {"policy": "full"}, "attention": {"name": "eager"}})

    assert (config.weights, config.kv.policy, config.attention) == (Choice("int8"), Choice("full"), Choice("eager"))
    assert (config.kv.codec, config.kv.place) == (Choice("native"), Choice("device"))


def test_nothing_said_is_the_default() -> None:
    assert EngineConfig.from_dict({}) == EngineConfig()


def test_every_default_choice_is_a_neutral_member_that_exists() -> None:
    for key, (family, choice) in EngineConfig().choices().items():
        assert choice.name in family.names(), key
        assert FAMILIES[key] is family


def test_resolving_fills_in_every_knob_and_keeps_what_was_said() -> None:
    config = EngineConfig.from_dict({"weights": "int4", "kv": {"policy": {"name": "h2o", "kv_budget": 100}}}).resolve()

    assert config.weights == Choice.of("int4", group_size=64, method="rtn", shadow=False, symmetric=False)
    assert config.kv.policy.knob_dict["kv_budget"] == 100
    assert set(config.kv.policy.knob_dict) == set(FAMILIES["kv.policy"].knobs("h2o"))
    assert config.resolve() == config


def test_one_engine_has_one_digest_however_it_is_written() -> None:
    short = EngineConfig.from_dict({"weights": "int4"}).resolve()
    long = EngineConfig.from_dict({"weights": {"group_size": 64, "name": "int4"}, "max_batch_size": 8}).resolve()

    assert short.digest == long.digest
    assert short.digest != EngineConfig.from_dict({"weights": {"name": "int4", "group_size": 32}}).resolve().digest


@pytest.mark.parametrize(
    ("written", "resolved"),
    [
        ({}, {"bits": 4.5}),
        ({"bits": 4.5}, {"bits": 4.5}),
        ({"bits": 3}, {"bits": 3}),
        ({"max_kl": 0.1}, {"max_kl": 0.1}),
    ],
)
def test_a_knob_that_is_absent_stays_out_of_the_document(
    written: dict[str, float], resolved: dict[str, float], tmp_path: Path
) -> None:
    config = EngineConfig.from_dict({"weights": {"name": "mixed", **written}}).resolve()
    path = tmp_path / "c.yaml"
    path.write_text(dump_yaml(config.to_dict()))

    assert config.to_dict()["weights"] == {"name": "mixed", "method": "rtn", "group_size": 64, **resolved}
    assert config.resolve() == EngineConfig.from_dict(config.to_dict()) == load_config(path) == config
    assert load_config(path).digest == config.digest


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "fp32"},
        {"max_batch_size": 7},
        {"max_model_len": 7},
        {"kv_memory_bytes": 7},
        {"max_step_tokens": 7},
        {"weights": "int8"},
        {"kv": {"policy": "h2o"}},
        {"attention": "eager"},
        {"kernels": {"fused": True}},
        {"kernels": {"graphs": True}},
    ],
)
def test_every_field_changes_the_digest(change: dict[str, Any]) -> None:
    assert EngineConfig.from_dict(change).digest != EngineConfig().digest


def test_flat_keeps_knobs_of_different_members_apart() -> None:
    flat = EngineConfig.from_dict(CONFIG).flat()

    assert flat["weights"] == "int4" and flat["weights.int4.group_size"] == 64
    assert flat["kv.policy.h2o.kv_budget"] == 0.2 and flat["kv_memory_bytes"] is None
    assert flat["kernels.fused"] is True
    assert set(flat) >= {*PLAIN_FIELDS, *FAMILIES}


def test_an_empty_group_is_its_defaults() -> None:
    assert EngineConfig.from_dict({"kernels": {}, "kv": {}}) == EngineConfig()
    assert EngineConfig().kernels == KernelsConfig(fused=False, graphs=False)


@pytest.mark.parametrize("name", ["fused", "graphs"])
@pytest.mark.parametrize("value", [1, 0, "true", None, [True]])
def test_a_flag_is_true_or_false(value: Any, name: str) -> None:
    with pytest.raises(InputError, match="must be true or false") as caught:
        EngineConfig.from_dict({"kernels": {name: value}}, file="record.json")
    assert (caught.value.file, caught.value.key) == ("record.json", f"kernels.{name}")


def test_a_written_file_loads_as_the_resolved_configuration(tmp_path: Path) -> None:
    config = EngineConfig.from_dict(CONFIG).resolve()
    path = tmp_path / "trial-1.yaml"
    path.write_text(dump_yaml(config.to_dict()))

    assert load_config(path) == config


def test_a_mistake_in_a_file_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dtype: fp32\nkv:\n  policy:\n    name: h2o\n    kv_budgt: 0.2\n")

    with pytest.raises(InputError, match="did you mean 'kv_budget'") as caught:
        load_config(path)
    assert (caught.value.file, caught.value.key) == (f"{path}:3", "kv.policy")


def test_the_file_is_said_when_plain_data_is_wrong() -> None:
    with pytest.raises(InputError, match="must be a whole number") as caught:
        EngineConfig.from_dict({"max_batch_size": "many"}, file="record.json")
    assert (caught.value.file, caught.value.key) == ("record.json", "max_batch_size")


@pytest.mark.parametrize("value", [0, -1, 2**51, 1.0, True, "8", None, [8]])
def test_sizes_are_whole_numbers_in_bounds(value: Any) -> None:
    with pytest.raises(InputError, match="whole number"):
        EngineConfig(max_batch_size=value)


def test_a_configuration_is_hashable() -> None:
    assert len({EngineConfig(), EngineConfig.from_dict({}), EngineConfig(max_batch_size=2)}) == 2


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_member_resolves_from_its_bare_name(family: Family) -> None:
    for name in family.names():
        assert family.create(name) is not None


def test_one_rank_is_the_default_and_ranks_multiply() -> None:
    flat = EngineConfig().flat()

    assert EngineConfig().parallel.num_ranks == 1
    assert ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=3).num_ranks == 6
    assert [flat[f"parallel.{name}"] for name in ("tensor_parallel_size", "num_micro_batches")] == [1, 1]


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "2", None, 10**9])
def test_a_degree_is_a_number_of_ranks(value: Any) -> None:
    with pytest.raises(InputError, match="whole number from 1 to 1024") as caught:
        EngineConfig.from_dict({"parallel": {"tensor_parallel_size": value}}, file="record.json")
    assert (caught.value.file, caught.value.key) == ("record.json", "parallel.tensor_parallel_size")

import dataclasses
import subprocess
import sys

import pytest

from codesign.errors import InputError
from codesign.registry import KV_POLICIES, WEIGHT_FORMATS, Family
from codesign.spec.engine_config import FAMILIES


def test_listing_names_and_hints_never_loads_torch() -> None:
    script = """
import sys
from codesign.errors import InputError
from codesign.spec.engine_config import EngineConfig, FAMILIES
assert all(family.names() for family in FAMILIES.values())
EngineConfig.from_dict({"weights": {"name": "int4", "group_size": 64}, "kv": {"policy": "h2o"}})
try:
    EngineConfig.from_dict({"weights": "int5"})
except InputError:
    pass
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr


def test_names_are_the_file_names() -> None:
    assert KV_POLICIES.names() == tuple(sorted(KV_POLICIES.names()))
    assert {"full", "h2o", "pyramidkv", "streaming_llm"} <= set(KV_POLICIES.names())
    assert {"native", "int8", "int4"} <= set(WEIGHT_FORMATS.names())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_member_is_one_frozen_dataclass_of_plain_knobs(family: Family) -> None:
    for name in family.names():
        member = family.member(name)
        assert member.__dataclass_params__.frozen
        for knob, default in family.knobs(name).items():
            is_absent = default is None or default is dataclasses.MISSING
            assert is_absent or isinstance(default, int | float | str | bool), f"{name}.{knob}"


@pytest.mark.parametrize("name", ["", "h20", "__init__", "../errors", "h2o.py", "H2O", "a" * 500])
def test_an_unknown_member_is_refused_before_anything_is_imported(name: str) -> None:
    with pytest.raises(InputError, match="unknown KV policy"):
        KV_POLICIES.create(name)


def test_an_unknown_knob_names_the_nearest() -> None:
    with pytest.raises(InputError, match="has no knob 'kv_bugdet'; did you mean 'kv_budget'"):
        KV_POLICIES.create("h2o", kv_bugdet=0.1)


def test_a_knob_of_a_member_without_knobs_says_there_are_none() -> None:
    with pytest.raises(InputError, match=r"has no knob 'kv_budget' \(known: none\)"):
        KV_POLICIES.create("full", kv_budget=0.1)


def test_what_the_member_refuses_is_an_input_error_with_its_words() -> None:
    with pytest.raises(InputError, match=r"f.yaml: kv: KV policy 'h2o': kv_budget must be"):
        KV_POLICIES.create("h2o", file="f.yaml", key="kv", kv_budget=7.5)

import pytest

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.kv.policies.dynamic import Dynamic
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.policies.snapkv import SnapKV
from codesign.engine.models.tiny import tiny_spec
from codesign.errors import InputError, Unsupported
from codesign.registry import KV_POLICIES
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import generate, request

KNOBS = {"kv_budget": 12, "full_share": 0.25, "under_pressure": "streaming_llm"}


def engine(policy: object, *, batch: int = 4, **changes: object) -> Engine:
    config = {"dtype": "fp32", "max_batch_size": batch, "max_model_len": 160, "kv": {"policy": policy}, **changes}
    return build_engine(tiny_spec(), EngineConfig.from_dict(config))


@pytest.mark.parametrize(
    ("num_slots", "full_share", "num_full"), [(8, 0.25, 2), (8, 0.3, 2), (1, 0.25, 1), (3, 0.01, 1), (4, 0.9, 4)]
)
def test_first_slots_are_whole_rounded_and_never_none(num_slots: int, full_share: float, num_full: int) -> None:
    classes = Dynamic(full_share=full_share, kv_budget=0.5).slot_policies(num_slots)

    assert classes[0] == (num_full, Full())
    assert classes[1:] == (() if num_full == num_slots else ((num_slots - num_full, SnapKV(kv_budget=0.5)),))


def test_allocated_bytes_are_those_of_whole_and_bounded_slots() -> None:
    whole, small = engine("full", batch=1), engine({"name": "streaming_llm", "kv_budget": 12}, batch=1)
    mixed = engine({"name": "dynamic", **KNOBS}, batch=4)

    sizes = [one.parts.attention.kv_bytes for one in (whole, small, mixed)]
    assert sizes[2] == sizes[0] + 3 * sizes[1]
    assert mixed.facts()["resolved"]["kv_budget_tokens"] == [12] * len(mixed.facts()["resolved"]["kv_budget_tokens"])


def test_who_comes_while_whole_slots_are_free_is_served_as_by_full_and_who_comes_later_as_by_the_other_policy() -> None:
    requests = [request(f"r{index}", 60 + 10 * index, 30, ignore_eos=True) for index in range(4)]
    found = generate(engine({"name": "dynamic", **KNOBS, "full_share": 0.5}), *requests)
    full = generate(engine("full"), *requests)
    small = generate(engine({"name": "streaming_llm", "kv_budget": 12}), *requests)

    assert [found[name] == full[name] for name in ("r0", "r1", "r2", "r3")] == [True, True, False, False]
    assert [found[name] == small[name] for name in ("r0", "r1", "r2", "r3")] == [False, False, True, True]


def test_pressure_gone_means_whole_slots_again() -> None:
    dynamic = engine({"name": "dynamic", **KNOBS})
    generate(dynamic, *[request(f"r{index}", 60, 10, ignore_eos=True) for index in range(4)])
    late = request("late", 80, 30, ignore_eos=True)

    assert generate(dynamic, late) == generate(engine("full"), late)


def test_memory_for_fewer_whole_sequences_holds_more_slots() -> None:
    """Room for three whole sequences of 160 tokens: one whole, and as many of 13 rows as fit into two."""
    whole = engine("full", batch=1).parts.attention.kv_bytes
    small = engine({"name": "streaming_llm", "kv_budget": 12}, batch=1).parts.attention.kv_bytes
    policy = {"name": "dynamic", **KNOBS, "full_share": 0.01}

    assert engine("full", batch=16, kv_memory_bytes=3 * whole).num_slots == 3
    mixed = engine(policy, batch=64, kv_memory_bytes=3 * whole)
    assert mixed.num_slots == 1 + 2 * whole // small > 3
    assert mixed.parts.attention.kv_bytes <= 3 * whole
    with pytest.raises(Unsupported, match=f"needs {whole}"):
        engine(policy, kv_memory_bytes=whole - 1)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kv_budget": 0}, "kv_budget"),
        ({"full_share": 0.0}, "full_share must be between 0 and 1"),
        ({"full_share": 1}, "full_share"),
        ({"under_pressure": "dynamic"}, "under_pressure must be one of .*h2o"),
        ({"under_pressure": "full"}, "under_pressure must be one of"),
    ],
)
def test_wrong_knobs_are_refused_with_what_is_allowed(knobs: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        KV_POLICIES.create("dynamic", **knobs)

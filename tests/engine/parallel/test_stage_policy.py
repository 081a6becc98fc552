import pytest

from codesign.engine.kv.policy import KVPolicy
from codesign.engine.parallel.stage_policy import of_layers
from codesign.registry import KV_POLICIES

BOUNDED = [name for name in KV_POLICIES.names() if "kv_budget" in KV_POLICIES.knobs(name)]


def policy(name: str) -> KVPolicy:
    knobs = {"kv_budget": 96} if name in BOUNDED else {}
    found: KVPolicy = KV_POLICIES.create(name, **knobs)
    return found


@pytest.mark.parametrize("name", KV_POLICIES.names())
def test_stages_together_have_the_budgets_of_the_model(name: str) -> None:
    whole = policy(name)
    stages = [range(0, 3), range(3, 4), range(4, 9)]

    for (count, own), *parts in zip(
        whole.slot_policies(8),
        *(of_layers(whole, layers, num_layers=9).slot_policies(8) for layers in stages),
        strict=True,
    ):
        budgets = [
            budget
            for layers, (part_count, part) in zip(stages, parts, strict=True)
            for budget in part.budgets(num_layers=len(layers), max_model_len=256)
        ]
        assert [part_count for part_count, _ in parts] == [count] * len(stages)
        assert tuple(budgets) == own.budgets(num_layers=9, max_model_len=256)


def test_the_policy_itself_is_left_as_it_was() -> None:
    whole = policy("pyramidkv")
    before = whole.budgets(num_layers=4, max_model_len=256)

    part = of_layers(whole, range(1, 2), num_layers=4)

    assert type(part) is type(whole) and part == whole
    assert whole.budgets(num_layers=4, max_model_len=256) == before
    assert part.budgets(num_layers=1, max_model_len=256) == before[1:2]

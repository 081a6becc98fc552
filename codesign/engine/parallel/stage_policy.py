"""A KV policy as one pipeline stage sees it: the same policy, with the budgets of the stage's layers."""

import copy

from codesign.engine.kv.policy import KVPolicy


def of_layers(policy: KVPolicy, layers: range, *, num_layers: int) -> KVPolicy:
    """A copy of `policy` whose budgets are those that it gives `layers` of a model of `num_layers`.

    A policy that divides one budget among layers (pyramidkv) must see all of them, a store only has its own.
    """
    own = copy.copy(policy)

    def budgets(*, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        del num_layers  # the store's
        return policy.budgets(num_layers=whole, max_model_len=max_model_len)[layers.start : layers.stop]

    def slot_policies(num_slots: int) -> tuple[tuple[int, KVPolicy], ...]:
        classes = policy.slot_policies(num_slots)
        return tuple((count, of_layers(part, layers, num_layers=whole)) for count, part in classes)

    whole = num_layers
    # Members are frozen dataclasses; what is set on the copy alone hides the two methods of its class.
    object.__setattr__(own, "budgets", budgets)
    object.__setattr__(own, "slot_policies", slot_policies)
    return own

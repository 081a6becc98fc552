"""dynamic: everything is kept while slots are plenty; sequences that come under pressure get a budget.

The first `full_share` of the slots hold whole sequences, the others `kv_budget` rows under another policy. Schedulers
give the lowest free slot, so the slot numbers of a plan carry the pressure: a sequence gets a budget exactly when all
whole slots are taken as it enters. It keeps what it got, so a plan can be replayed and every rank decides alike.

    S slots of n tokens cost   full_share · S · n + (1 - full_share) · S · kv_budget   rows, allocated once:
    with a quarter whole and a budget of n / 5, 0.4 of the full cache; the first S / 4 sequences lose nothing

Nothing is freed while running: under a dense allocation a switch inside one slot could save reading, never memory. What
is saved is saved when slots are made. Quality depends on how many sequences run at once: it holds for the load at which
it was measured. The idea and its limits are ours.
"""

import dataclasses

from codesign.engine.kv.budget import check_kv_budget
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.policy import KVPolicy
from codesign.registry import KV_POLICIES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dynamic(KVPolicy):
    """Args:
    kv_budget: tokens kept per layer and head of a sequence that comes under pressure, or a fraction of max_model_len.
    full_share: share of the slots that keep everything, in (0, 1); rounded, at least one.
    under_pressure: name of the policy of the others, with its other knobs at their defaults.
    """

    kv_budget: int | float = 0.25
    full_share: float = 0.25
    under_pressure: str = "snapkv"

    def __post_init__(self) -> None:
        check_kv_budget(self.kv_budget)
        if not isinstance(self.full_share, float) or not 0 < self.full_share < 1:
            raise ValueError(f"full_share must be between 0 and 1, both excluded, got {self.full_share!r}")
        known = [name for name in KV_POLICIES.names() if name not in ("dynamic", "full")]
        if self.under_pressure not in known:
            raise ValueError(f"under_pressure must be one of {', '.join(known)}, got {self.under_pressure!r}")

    @property
    def bounded(self) -> KVPolicy:
        """The policy under pressure."""
        policy: KVPolicy = KV_POLICIES.create(self.under_pressure, kv_budget=self.kv_budget)
        return policy

    def slot_policies(self, num_slots: int) -> tuple[tuple[int, KVPolicy], ...]:
        num_full = max(1, int(self.full_share * num_slots + 0.5))
        classes = ((num_full, Full()), (num_slots - num_full, self.bounded))
        return tuple((count, policy) for count, policy in classes if count)

    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        """Those under pressure: what a sequence gets at the least."""
        return self.bounded.budgets(num_layers=num_layers, max_model_len=max_model_len)

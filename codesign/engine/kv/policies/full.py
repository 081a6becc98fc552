"""full: every row stays. The neutral policy."""

import dataclasses

from codesign.engine.kv.policy import KVPolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(KVPolicy):
    def budgets(self, *, num_layers: int, max_model_len: int) -> tuple[int, ...]:
        return (max_model_len,) * num_layers

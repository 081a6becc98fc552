"""none: every weight stays. The neutral pruner."""

import dataclasses

from torch import Tensor

from codesign.engine.prune.pruner import Pruner
from codesign.engine.quantize.inputs import InputStats


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPruning(Pruner):
    @property
    def prunes(self) -> bool:
        return False

    def prune(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        return weight

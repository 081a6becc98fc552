"""rtn: every weight to the nearest value of its grid. The neutral method: no data, no search."""

import dataclasses

from torch import Tensor

from codesign.engine.quantize.grid import Grid, Quantized
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.method import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rtn(Method):
    def quantize(
        self, weight: Tensor, grid: Grid, inputs: InputStats | None, *, num_unclipped_rows: int = 0
    ) -> Quantized:
        return grid.quantize(weight, grid.fit(weight))

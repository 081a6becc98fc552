"""int2: 2-bit weights in groups along the input, 16-bit activations; 2 + 32 / group_size bits a weight.

Four values a group: rounding alone destroys a model; gptq on small groups is the least that is of use.
"""

import dataclasses
from typing import ClassVar

from codesign.engine.quantize.bit_packed import BitPackedFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int2(BitPackedFormat):
    bits: ClassVar[int] = 2
    group_size: int = 32

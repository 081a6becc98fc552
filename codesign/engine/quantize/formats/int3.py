"""int3: 3-bit weights in groups along the input, 16-bit activations; 3 + 32 / group_size bits a weight."""

import dataclasses
from typing import ClassVar

from codesign.engine.quantize.bit_packed import BitPackedFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int3(BitPackedFormat):
    bits: ClassVar[int] = 3

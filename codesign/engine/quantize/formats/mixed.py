"""mixed: every linear layer in the format that it can bear, within a budget of bits or of KL for all of them together.

Each layer's loss in each format is measured alone, as the KL that rounding just this one adds to the model's output on
calibration text (`sensitivity.py`). A budget of bits then goes where it saves most; within one of KL the fewest bytes
are taken (`allocate.py`). The sum over layers that `max_kl` bounds is a forecast: what all of them cost together is
measured on the built engine, as for any other format.
"""

import dataclasses
import math

import torch
from torch import Tensor

from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.formats.int2 import Int2
from codesign.engine.quantize.formats.int3 import Int3
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.formats.int8 import Int8
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace, weight_bytes
from codesign.engine.quantize.method import Method

_DEFAULT_BITS = 4.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixed(WeightFormat):
    """Args:
    bits: most bits per weight, scales included, on average over all linear layers of the decoder; 4.5 where neither
        budget is given.
    max_kl: instead of `bits`, the most that the layers may lose, each alone and summed, in nats per token.
    method: how codes are chosen, in every format.
    group_size: of int4, int3 and int2.
    """

    bits: float | None = None
    max_kl: float | None = None
    method: str = "rtn"
    group_size: int = 64

    def __post_init__(self) -> None:
        if self.bits is not None and self.max_kl is not None:
            raise ValueError(f"bits {self.bits!r} and max_kl {self.max_kl!r} are two budgets; give one of them")
        if self.bits is None and self.max_kl is None:
            # Filled in here so that the configuration that names no budget resolves to the same one as bits: 4.5.
            object.__setattr__(self, "bits", _DEFAULT_BITS)
        if self.bits is not None and (isinstance(self.bits, bool) or not 2 < self.bits <= 16):
            raise ValueError(f"bits must be above 2 and at most 16, got {self.bits!r}")
        if self.max_kl is not None and (isinstance(self.max_kl, bool) or not 0 < self.max_kl < math.inf):
            raise ValueError(f"max_kl must be above 0 nats per token, got {self.max_kl!r}")
        _ = self.candidates

    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        """A weight by itself gets the largest format that a budget of bits has room for."""
        if self.bits is None:
            raise ValueError("max_kl is shared out over the layers of a model; a weight by itself needs bits")
        fitting = []
        for member in self.candidates.values():
            packed = member.pack(
                weight, bias, dtype=dtype, workspace=workspace, inputs=inputs, num_unclipped_rows=num_unclipped_rows
            )
            if weight_bytes(packed) * 8 <= self.bits * weight.numel():
                fitting.append(packed)
        if not fitting:
            raise ValueError(f"no format holds it in {self.bits} bits a weight")
        return fitting[-1]

    @property
    def method_member(self) -> Method:
        return self.candidates["int4"].method_member

    @property
    def candidates(self) -> dict[str, GridFormat]:
        """What a layer can be held in, by name."""
        groups = {"method": self.method, "group_size": self.group_size}
        symmetric_method = "rtn" if self.method == "hqq" else self.method  # int8 has no offset for hqq to move
        return {
            "int2": Int2(**groups),  # type: ignore[arg-type]
            "int3": Int3(**groups),  # type: ignore[arg-type]
            "int4": Int4(**groups),  # type: ignore[arg-type]
            "int8": Int8(method=symmetric_method),
        }

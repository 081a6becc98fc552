"""gptq: the layout of AutoGPTQ and GPTQModel, versions 1 and 2.

qweight [in b / 32, out] int32     codes of an output, packed along the inputs
qzeros  [groups, out b / 32] int32 zero points packed along the outputs; version 1 stores them minus 1
scales  [groups, out] fp16         g_idx [in] int32: the group of each input (act-order scatters them)
"""

from dataclasses import dataclass
from typing import Self

import torch

from codesign.engine.models.config_values import ConfigValues
from codesign.engine.quantize.layout import CheckpointLayout, Imported, Tensors, unpack_stream


@dataclass(frozen=True, kw_only=True)
class Gptq(CheckpointLayout):
    """Args:
    zero_offset: what is added to a stored zero point.
    """

    bits: int
    group_size: int | None
    zero_offset: int

    @classmethod
    def of(cls, config: ConfigValues) -> Self:
        bits = config.integer("bits", low=2, high=8)
        if bits not in (2, 3, 4, 8):
            raise config.error("bits", f"must be 2, 3, 4 or 8, got {bits}")
        group_size = config.integer("group_size", -1, low=-1, high=2**20)
        kind = config.text("checkpoint_format", "gptq")
        if kind not in ("gptq", "gptq_v2"):
            raise config.error("checkpoint_format", f"must be gptq or gptq_v2, got {kind!r}")
        return cls(bits=bits, group_size=group_size if group_size > 0 else None, zero_offset=int(kind == "gptq"))

    def tensors(self, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
        groups = self.num_groups(num_in)
        return {
            "qweight": (num_in * self.bits // 32, num_out),
            "qzeros": (groups, num_out * self.bits // 32),
            "scales": (groups, num_out),
            "g_idx": (num_in,),
        }

    def decode(self, tensors: Tensors, num_out: int, num_in: int) -> Imported:
        codes = unpack_stream(tensors["qweight"].t(), self.bits, num_in)
        stored = unpack_stream(tensors["qzeros"], self.bits, num_out)
        zero = ((stored + self.zero_offset) & (2**self.bits - 1)).t().contiguous()
        scale, groups = tensors["scales"].t().contiguous(), tensors["g_idx"].long()
        size = num_in // self.num_groups(num_in)
        if torch.equal(groups, torch.arange(num_in, device=groups.device) // size):
            return Imported(codes, scale, zero)
        order = groups.argsort(stable=True)
        if not torch.equal(groups[order], torch.arange(num_in, device=groups.device) // size):
            raise ValueError(f"g_idx does not hold {size} inputs of every group")
        return Imported(codes[:, order], scale, zero, order)

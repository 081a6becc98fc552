"""awq: the `gemm` layout of AutoAWQ: 4 bits, eight outputs in a word, in the order 0, 2, 4, 6, 1, 3, 5, 7.

qweight [in, out / 8] int32    qzeros [groups, out / 8] int32    scales [groups, out] fp16
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from codesign.engine.models.config_values import ConfigValues
from codesign.engine.quantize.layout import CheckpointLayout, Imported, Tensors
from codesign.errors import Unsupported

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, kw_only=True)
class Awq(CheckpointLayout):
    group_size: int | None
    bits: int = 4

    @classmethod
    def of(cls, config: ConfigValues) -> Self:
        bits = config.integer("bits", 4, low=1, high=16)
        if bits != 4:
            raise config.error("bits", f"must be 4, got {bits}")
        version = config.text("version", "gemm")
        if version.lower() != "gemm":
            raise Unsupported(f"{config.file}: awq version {version!r} is not read here (supported: gemm)")
        group_size = config.integer("group_size", 128, low=-1, high=2**20)
        return cls(group_size=group_size if group_size > 0 else None)

    def tensors(self, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
        groups = self.num_groups(num_in)
        return {"qweight": (num_in, num_out // 8), "qzeros": (groups, num_out // 8), "scales": (groups, num_out)}

    def decode(self, tensors: Tensors, num_out: int, num_in: int) -> Imported:
        codes, zero = (_unpack(tensors[name]).t().contiguous() for name in ("qweight", "qzeros"))
        return Imported(codes, tensors["scales"].t().contiguous(), zero)


def _unpack(words: Tensor) -> Tensor:
    """[rows, words] int32 -> [rows, 8 words] uint8 in the order of the outputs."""
    codes = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for place, output in enumerate(_ORDER):
        codes[..., output] = ((words >> (4 * place)) & 15).to(torch.uint8)
    return codes.flatten(1)

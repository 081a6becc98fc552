"""compressed_tensors: the `pack-quantized` layout of the compressed-tensors library, as llm-compressor writes it.

weight_packed [out, ceil(in b / 32)] int32       codes + 2^(b-1), packed along the inputs
weight_scale [out, groups]                       weight_zero_point [ceil(out b / 32), groups] int32 if asymmetric
weight_shape [2] int64                           weight_g_idx [in] int32 if act-order scatters the groups
"""

from dataclasses import dataclass
from typing import Self

import torch

from codesign.engine.models.config_values import ConfigValues
from codesign.engine.quantize.layout import CheckpointLayout, Imported, Tensors, unpack_stream
from codesign.errors import Unsupported


@dataclass(frozen=True, kw_only=True)
class CompressedTensors(CheckpointLayout):
    """Args:
    symmetric: no zero points are stored.
    has_group_index: weight_g_idx is stored.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    has_group_index: bool = False

    @classmethod
    def of(cls, config: ConfigValues) -> Self:
        kind = config.text("format", "pack-quantized")
        if kind != "pack-quantized":
            raise Unsupported(f"{config.file}: compressed-tensors format {kind!r} is not read here (pack-quantized is)")
        groups = config.mapping("config_groups")
        if len(groups.keys()) != 1:
            raise Unsupported(f"{config.file}: {len(groups.keys())} config_groups; one is supported")
        weights = groups.mapping(groups.keys()[0]).mapping("weights")
        bits = weights.integer("num_bits", low=1, high=16)
        if bits not in (2, 3, 4, 8):
            raise weights.error("num_bits", f"must be 2, 3, 4 or 8, got {bits}")
        strategy = weights.text("strategy", "group")
        if strategy not in ("group", "channel"):
            raise Unsupported(f"{config.file}: weights of strategy {strategy!r} are not read here (group, channel)")
        group_size = weights.integer("group_size", low=1, high=2**20) if strategy == "group" else None
        act_order = weights.text("actorder", "") if weights.has("actorder") else ""
        return cls(
            bits=bits,
            group_size=group_size,
            symmetric=weights.flag("symmetric", True),
            has_group_index=act_order.lower() == "group",
        )

    def tensors(self, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
        groups = self.num_groups(num_in)
        found: dict[str, tuple[int, ...]] = {
            "weight_packed": (num_out, -(-num_in * self.bits // 32)),
            "weight_scale": (num_out, groups),
            "weight_shape": (2,),
        }
        if not self.symmetric:
            found["weight_zero_point"] = (-(-num_out * self.bits // 32), groups)
        if self.has_group_index:
            found["weight_g_idx"] = (num_in,)
        return found

    def decode(self, tensors: Tensors, num_out: int, num_in: int) -> Imported:
        if tensors["weight_shape"].tolist() != [num_out, num_in]:
            raise ValueError(f"weight_shape says {tensors['weight_shape'].tolist()}, config.json {[num_out, num_in]}")
        codes = unpack_stream(tensors["weight_packed"], self.bits, num_in)
        scale = tensors["weight_scale"]
        if self.symmetric:
            zero = torch.full(scale.shape, 2 ** (self.bits - 1), dtype=torch.uint8, device=scale.device)
        else:
            zero = unpack_stream(tensors["weight_zero_point"].t(), self.bits, num_out).t().contiguous()
        if not self.has_group_index:
            return Imported(codes, scale, zero)
        groups = tensors["weight_g_idx"].long()
        order = groups.argsort(stable=True)
        size = num_in // self.num_groups(num_in)
        if not torch.equal(groups[order], torch.arange(num_in, device=groups.device) // size):
            raise ValueError(f"weight_g_idx does not hold {size} inputs of every group")
        return Imported(codes[:, order], scale, zero, order)

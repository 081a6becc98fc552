"""Where ATen's CPU int4 packing puts each code, so that unpacking needs no second copy of the weight.

    packed [out, in / 2] uint8 is really, block of outputs after block:   [in, block / 2] bytes,
    byte j of input k = code(out = j, in = k) | code(out = block / 2 + j, in = k) << 4

with block = 64 outputs where ATen runs AVX-512 code and 32 where it runs AVX2. Outputs beyond the last whole block (a
multiple of 16) pair neighbours instead: byte j = code(2 j) | code(2 j + 1) << 4. The layout is not documented, so
`pack` reads every weight back and compares; nothing here is trusted on a CPU where that fails.
"""

import torch
from torch import Tensor

from codesign.engine.quantize import cpu

GROUP_SIZES = (32, 64, 128, 256)
OUT_MULTIPLE = 16
_SLICE_BLOCKS = 8


def block_rows() -> int:
    """Outputs that ATen packs together on this CPU."""
    return 64 if cpu.capability() == "AVX512" else 32


def pack(codes: Tensor) -> tuple[Tensor, bool]:
    """Packs through ATen.

    Args:
        codes: [out, in] uint8 in 0..15 on the CPU; `out` a multiple of 16, `in` even.
    Returns:
        packed [out, in / 2] uint8; whether `unpack` gives exactly `codes` back.
    """
    parts, is_readable = [], True
    for rows in torch.split(codes, _SLICE_BLOCKS * block_rows()):  # blocks do not know of each other; ATen wants int32
        part = torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(rows.int(), 1)
        found = torch.empty(rows.shape[1], rows.shape[0], dtype=torch.int8)
        unpack(part, 0, rows.shape[0], found)
        is_readable = is_readable and torch.equal(found.t() + 8, rows)
        parts.append(part)
    return torch.cat(parts), is_readable


def unpack(packed: Tensor, start: int, stop: int, out: Tensor) -> None:
    """Writes code - 8 (-8..7) of outputs start..stop, transposed.

    Args:
        packed: [out_features, in / 2] uint8 as `pack` gives it.
        start: a multiple of `block_rows()`; stop too, or `out_features`.
        out: [in, stop - start], any signed dtype.
    """
    block, num_in = block_rows(), 2 * packed.shape[1]
    pairs_halves = cpu.capability() in ("AVX2", "AVX512")
    whole = start + (stop - start) // block * block
    if whole > start:
        blocks = packed[start:whole].view(-1, num_in, block // 2).permute(1, 0, 2)
        target = out[:, : whole - start]
        if pairs_halves:
            _write_nibbles(blocks, *target.view(num_in, -1, 2, block // 2).unbind(2))
        else:
            _write_nibbles(blocks, *target.view(num_in, -1, block // 2, 2).unbind(3))
    if stop > whole:
        tail = packed[whole:stop].view(num_in, (stop - whole) // 2)
        _write_nibbles(tail, *out[:, whole - start :].view(num_in, -1, 2).unbind(2))


def _write_nibbles(packed: Tensor, low: Tensor, high: Tensor) -> None:
    low.copy_((packed & 15).view(torch.int8).sub_(8))
    high.copy_((packed >> 4).view(torch.int8).sub_(8))

"""Quantised checkpoints value by value, as their specifications say: slow and plain."""

import torch
from torch import Tensor


def words_of(values: list[int], bits: int) -> list[int]:
    """One stream of bits, lowest first, cut into signed 32-bit words; slow and plain."""
    stream = sum(value << (bits * place) for place, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    words = [(stream >> (32 * place)) & 0xFFFFFFFF for place in range(count)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


def rows_packed(codes: Tensor, bits: int) -> Tensor:
    return torch.tensor([words_of(row, bits) for row in codes.tolist()], dtype=torch.int32)


def gptq(codes: Tensor, zero: Tensor, scale: Tensor, g_idx: Tensor, *, bits: int, version: int) -> dict[str, Tensor]:
    stored = (zero.int() - (1 if version == 1 else 0)) & (2**bits - 1)
    return {
        "qweight": rows_packed(codes, bits).t().contiguous(),
        "qzeros": rows_packed(stored.t().to(torch.uint8), bits),
        "scales": scale.t().half().contiguous(),
        "g_idx": g_idx.int(),
    }


def awq(codes: Tensor, zero: Tensor, scale: Tensor) -> dict[str, Tensor]:
    def packed(values: Tensor) -> Tensor:
        rows = values.t().tolist()
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        words = [[words_of([row[at + o] for o in order], 4)[0] for at in range(0, len(row), 8)] for row in rows]
        return torch.tensor(words, dtype=torch.int32)

    return {"qweight": packed(codes), "qzeros": packed(zero), "scales": scale.t().half().contiguous()}


def compressed(
    codes: Tensor, zero: Tensor | None, scale: Tensor, *, bits: int, g_idx: Tensor | None = None
) -> dict[str, Tensor]:
    found = {
        "weight_packed": rows_packed(codes, bits),
        "weight_scale": scale.half(),
        "weight_shape": torch.tensor(codes.shape),
    }
    if zero is not None:
        found["weight_zero_point"] = rows_packed(zero.t().contiguous(), bits).t().contiguous()
    if g_idx is not None:
        found["weight_g_idx"] = g_idx.int()
    return found

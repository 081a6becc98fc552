"""How an attention over many rows is cut: rows read at once, queries of a program, and runs of rows done apart."""

import dataclasses
import functools

import torch
from torch import Tensor

MAX_SPLITS = 64
MAX_QUERIES = 64
"""Of a program; more of them read K and V again."""

_PROGRAMS_PER_PROCESSOR = 4  # two fit on one at a time, so that this is two rounds
_INTERPRETED_PROCESSORS = 2
_LEAST_SIDE = 16  # of a product


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Sizes are powers of two from 16 on; `rows_per_split` is a multiple of `block_r`."""

    block_m: int
    block_r: int
    rows_per_split: int
    num_splits: int
    num_warps: int = 4
    num_stages: int = 3

    def __str__(self) -> str:
        return (
            f"{self.block_m}x{self.block_r}, {self.num_splits} splits, {self.num_warps} warps, {self.num_stages} stages"
        )

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def config_for(query: Tensor, num_rows: int, *, most_at_once: int = 64) -> DecodeConfig:
    """The rule for queries [B, H_kv, M, D] over at most `num_rows` rows, on the device they are on."""
    num_batch, num_heads, num_queries, head_dim = query.shape
    return decode_config(
        num_planes=num_batch * num_heads,
        num_queries=num_queries,
        num_rows=num_rows,
        head_dim=head_dim,
        dtype=query.dtype,
        num_processors=num_processors(query.device),
        most_at_once=most_at_once,
    )


def decode_config(
    *,
    num_planes: int,
    num_queries: int,
    num_rows: int,
    head_dim: int,
    dtype: torch.dtype,
    num_processors: int,
    most_at_once: int = 64,
) -> DecodeConfig:
    """A rule: enough splits to give every multiprocessor work, whole blocks each. For bf16 rows within 2 % of the best
    that was tried on an H200 at 4096 rows of 32 sequences, in blocks 3 % (reports/benchmarks/gpu.md).

    Args:
        num_planes: sequences times KV heads.
        num_queries: query group times tokens.
        most_at_once: rows.
    """
    block_m, block_r, num_stages = min(MAX_QUERIES, max(16, power_of_two(num_queries))), 64, 3
    if dtype == torch.float32:  # products by FMA: larger blocks spill
        block_m, block_r, num_stages = 16, 16, 2
    elif head_dim > 128 or block_m > 32:
        block_r = 32
    block_r = min(most_at_once, block_r)
    tiles = num_planes * -(-num_queries // block_m)
    blocks = max(1, -(-num_rows // block_r))
    wanted = -(-_PROGRAMS_PER_PROCESSOR * num_processors // tiles)
    blocks_per_split = -(-blocks // min(wanted, MAX_SPLITS, blocks))
    return DecodeConfig(
        block_m=block_m,
        block_r=block_r,
        rows_per_split=blocks_per_split * block_r,
        num_splits=-(-blocks // blocks_per_split),
        num_stages=num_stages,
    )


@functools.cache
def num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROCESSORS
    found: int = torch.cuda.get_device_properties(device).multi_processor_count
    return found


def power_of_two(number: int) -> int:
    """The smallest one that is not less."""
    return 1 << (number - 1).bit_length()


def int4_is_read(*, head_dim: int, group_size: int, channels: int) -> bool:
    """Whether `attend_int4` can: sizes are powers of two, groups whole products that lie in one half of a head."""
    is_whole = head_dim == power_of_two(head_dim) and group_size == power_of_two(group_size)
    return is_whole and group_size >= _LEAST_SIDE and head_dim >= 2 * _LEAST_SIDE and head_dim % (2 * channels) == 0

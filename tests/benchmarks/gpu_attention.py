"""The part `attention` of gpu_campaign.py: decode attention over native, int8 and fp8 rows, beside SDPA and a copy.

One query token for each of B sequences, Llama-3.1-8B's heads (8 KV heads, groups of 4, 128 channels) over rows in bf16,
or in codes with a scale a row, one after the other or (`paged`) in shuffled blocks found through a table. Each way is
compared with float64 attention over the rows that it holds before it is timed, as `gpu_weights.py` times: CUDA events,
L2 overwritten in between, median of 25. The copy moves as many bytes (half of them read, half written) as attention
reads. `bar` is what has to hold: 70 % of the copy's bandwidth at 4096 rows of 32 sequences in bf16, in both layouts. In
the time that is left other blocks and splits are tried there, for each codec and layout; `tried` is for changing the
rule.
"""

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from gpu_weights import Timer, cuda_times  # beside this script
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from codesign.engine.kernels.triton import available
from codesign.engine.kernels.triton.attend import attend
from codesign.engine.kernels.triton.splits import MAX_SPLITS, DecodeConfig, config_for
from codesign.registry import KV_CODECS

CODECS = ("native", "int8", "fp8")
NUM_KV_HEADS, NUM_GROUPS, HEAD_DIM = 8, 4, 128
CONTEXTS, BATCHES = (1024, 4096, 16384), (1, 8, 32)
BAR = {"rows": 4096, "batch": 32, "least_share_of_copy": 0.7}
LAYOUTS = ("", " paged")
BAR_WAYS = ("triton native", "triton native paged")
SCALE = HEAD_DIM**-0.5
BLOCK_ROWS = 32  # as the paged store has them
MAX_ERROR = 6e-3  # of bf16 results, whose weights are rounded to bf16 too

Attend = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Keys and values [B, H_kv, R, D] as they are stored: one part, or codes and scales."""

    codec: str
    key: tuple[Tensor, ...]
    value: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in (*self.key, *self.value))

    def decoded(self, parts: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        decoded: Tensor = KV_CODECS.create(self.codec).decode(parts, dtype)
        return decoded.to(dtype)  # native rows are handed on as they are

    def expected(self, query: Tensor) -> Tensor:
        """In float64, one sequence at a time."""
        out = torch.empty_like(query, dtype=torch.float64)
        for own in range(query.shape[0]):
            key, value = (
                self.decoded(tuple(part[own] for part in parts), torch.float64) for parts in (self.key, self.value)
            )
            out[own] = (query[own].double() @ key.mT * SCALE).softmax(dim=-1) @ value
        return out


def in_blocks(parts: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Parts [B, H_kv, R, X] as blocks [num_blocks, H_kv, 32, X] in random order, and their table [B, H_kv, n] int32."""
    num_batch, num_heads, num_rows, _ = parts[0].shape
    num_blocks = -(-num_rows // BLOCK_ROWS)
    generator = torch.Generator(parts[0].device).manual_seed(0)
    ids = torch.randperm(num_batch * num_blocks, generator=generator, device=parts[0].device)
    stored = []
    for part in parts:
        blocks = part.new_zeros(num_batch * num_blocks, num_heads, BLOCK_ROWS, part.shape[3])
        padded = pad(part, (0, 0, 0, num_blocks * BLOCK_ROWS - num_rows))
        blocks[ids] = padded.unflatten(2, (num_blocks, BLOCK_ROWS)).transpose(1, 2).flatten(0, 1)
        stored.append(blocks)
    return tuple(stored), ids.to(torch.int32).view(num_batch, 1, num_blocks).expand(-1, num_heads, -1)


def draw(batch: int, num_rows: int, device: str) -> Iterator[Rows]:
    generator = torch.Generator(device).manual_seed(0)
    shape = (2, batch, NUM_KV_HEADS, num_rows, HEAD_DIM)
    key, value = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    for name in CODECS:
        codec = KV_CODECS.create(name)
        yield Rows(name, codec.encode(key), codec.encode(value))


def ways(rows: Rows) -> Iterator[tuple[str, Attend]]:
    for layout in LAYOUTS:
        yield f"triton {rows.codec}{layout}", configured(rows, layout)

    def sdpa(query: Tensor) -> Tensor:
        key, value = (rows.decoded(parts, query.dtype) for parts in (rows.key, rows.value))
        return scaled_dot_product_attention(query, key, value, scale=SCALE)

    yield f"{'' if rows.codec == 'native' else 'decode + '}sdpa {rows.codec}", sdpa


def attention(
    seconds: float,
    *,
    device: str = "cuda",
    contexts: tuple[int, ...] = CONTEXTS,
    batches: tuple[int, ...] = BATCHES,
    bar: dict[str, Any] = BAR,
    timer: Timer = cuda_times,
) -> dict[str, Any]:
    """The table, whether the bar is passed, and other configs at its place; `exit_status` 1 where it is not passed."""
    deadline_s = time.monotonic() + seconds
    missing = available.missing_attention(torch.device(device))
    if missing is not None:
        return {"exit_status": 1, "error": missing.reason}
    timed: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    order = sorted(((r, b) for r in contexts for b in batches), key=lambda own: own != (bar["rows"], bar["batch"]))
    for num_rows, batch in order:  # the bar's first
        if time.monotonic() > deadline_s:
            timed.append({"rows": num_rows, "batch": batch, "absent": "no time left"})
            continue
        where = {"rows": num_rows, "batch": batch}
        query = torch.randn(batch, NUM_KV_HEADS, NUM_GROUPS, HEAD_DIM, device=device).bfloat16()
        for rows in draw(batch, num_rows, device):
            copied = copy_gb_per_s(rows.num_bytes, query, timer)
            expected = rows.expected(query)
            for name, way in ways(rows):
                timed.append({**where, "way": name, **measure(way, query, expected, rows.num_bytes, copied, timer)})
            if where.items() <= bar.items():
                for config, layout in itertools.product(candidates(config_for(query, num_rows)), LAYOUTS):
                    if time.monotonic() > deadline_s - seconds / 2:
                        break
                    way = configured(rows, layout, config)
                    figures = measure(way, query, expected, rows.num_bytes, copied, timer)
                    tried.append({"way": f"triton {rows.codec}{layout}", "config": str(config), **figures})
    reached = {
        row["way"]: row.get("share_of_copy", 0.0)
        for row in timed
        if (row["rows"], row["batch"]) == (bar["rows"], bar["batch"]) and row.get("way") in BAR_WAYS
    }
    is_passed = min(reached.get(way, 0.0) for way in BAR_WAYS) >= bar["least_share_of_copy"]
    is_right = not any("wrong" in row or "failed" in row for row in timed)
    return {
        "exit_status": 0 if is_passed and is_right else 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "bar": {**bar, "share_of_copy": reached, "passed": is_passed},
        "timed": timed,
        "tried": tried,
    }


def copy_gb_per_s(num_bytes: int, query: Tensor, timer: Timer) -> float:
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=query.device)
    target = torch.empty_like(source)
    return num_bytes / statistics.median(timer(lambda _: target.copy_(source), query)) / 1e6


def measure(
    way: Attend, query: Tensor, expected: Tensor, num_bytes: int, copied_gb_per_s: float, timer: Timer
) -> dict[str, Any]:
    """Nothing is timed that is wrong."""
    try:
        error = float((way(query).double() - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            return {"wrong": f"relative error {error:.3g}", "relative_error": error}
        times = sorted(timer(way, query))
    except (RuntimeError, triton.TritonError) as failure:  # a block may ask for more than this device has
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"}
    median = statistics.median(times)
    return {
        "relative_error": error,
        "median_ms": median,
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[-1 - len(times) // 10],
        "repetitions": len(times),
        "gb_per_s": num_bytes / median / 1e6,
        "copy_gb_per_s": copied_gb_per_s,
        "share_of_copy": num_bytes / median / 1e6 / copied_gb_per_s,
    }


def configured(rows: Rows, layout: str, config: DecodeConfig | None = None) -> Attend:
    """Our kernel; `config` instead of the rule's."""
    how: dict[str, Any] = {"codec": rows.codec, "scale": SCALE, "config": config}
    if not layout:
        return lambda query: attend(query, rows.key, rows.value, **how)[0]
    (key, table), (value, _) = in_blocks(rows.key), in_blocks(rows.value)
    num_batch, _, num_rows, _ = rows.key[0].shape
    counts = torch.full((num_batch,), num_rows, dtype=torch.int32, device=table.device)
    return lambda query: attend(query, key, value, counts=counts, table=table, **how)[0]


def candidates(first: DecodeConfig) -> list[DecodeConfig]:
    """The rule's, then other splits, blocks, warps and stages."""
    found = [first]
    for factor in (2, 4, 8):
        rows_per_split = -(-first.rows_per_split // factor // first.block_r) * first.block_r
        num_splits = -(-first.rows_per_split * first.num_splits // rows_per_split)
        if num_splits <= MAX_SPLITS:
            found.append(dataclasses.replace(first, rows_per_split=rows_per_split, num_splits=num_splits))
    whole = first.rows_per_split * first.num_splits
    found.append(dataclasses.replace(first, rows_per_split=whole, num_splits=1))
    changes: list[dict[str, int]] = [{"num_stages": 2}, {"num_stages": 4}, {"num_warps": 2}, {"num_warps": 8}]
    changes += [{"block_r": 128, "num_stages": 2}, {"block_r": 128}, {"block_r": 32}, {"block_r": 32, "num_stages": 5}]
    for change in changes:
        block_r = change.get("block_r", first.block_r)
        rows_per_split = -(-first.rows_per_split // block_r) * block_r
        found.append(dataclasses.replace(first, rows_per_split=rows_per_split, **change))
    return found

"""How a weight kernel cuts its work: a rule, a small set to try, and what was fastest where somebody tried.

A choice and not `triton.autotune`: that measures inside the process that is being measured, so two trials of one
configuration could run different kernels, whose sums differ, and a busy moment decides. Here the trying is a command of
its own (the part `weights` of tests/benchmarks/gpu_campaign.py), and what it found stands in `tuned.json`:

    {device name: {"w4a16 bf16 g128 4096x14336 M<=16": "16x64x128 split 4, 4 warps, 4 stages"}}

What is not in there gets the rule's, and `Plan.note` says so.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path

ROW_BUCKETS = (16, 64, 1024)
"""Rows up to which one config serves; the last serves all more."""

_TARGET_PROGRAMS = 256  # about two for each SM of an A100 or H100
_MAX_SPLIT_ROWS = 64
_MIN_BLOCKS = 4  # of inputs for a split, so that its loads overlap

Tuned = Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Tile of y, inputs read at once, runs of inputs that are added apart; all powers of two but `num_stages`."""

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4

    def __str__(self) -> str:
        tile = f"{self.block_m}x{self.block_n}x{self.block_k}"
        return f"{tile} split {self.split_k}, {self.num_warps} warps, {self.num_stages} stages"

    @classmethod
    def parse(cls, text: str) -> "Config":
        """What `str` gave. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+) split (\d+), (\d+) warps, (\d+) stages", text)
        if found is None:
            raise ValueError(f"not a kernel config: {text!r}")
        names = (field.name for field in dataclasses.fields(cls))
        return cls(**dict(zip(names, map(int, found.groups()), strict=True)))

    def constants(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "SPLIT_K": self.split_k}

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a config is chosen for.

    Attributes:
        kernel: "w8a16", "w4a16", "w3a16", "w2a16" or "nf4".
        dtype: of x: "bf16", "fp16" or "fp32".
        group_size: inputs that share a scale; None for a whole row. A block of inputs never crosses groups.
    """

    kernel: str
    dtype: str
    num_out: int
    num_in: int
    group_size: int | None = None

    def key(self, bucket: int) -> str:
        group = "" if self.group_size is None else f" g{self.group_size}"
        return f"{self.kernel} {self.dtype}{group} {self.num_out}x{self.num_in} M<={bucket}"


def default(problem: Problem, bucket: int) -> Config:
    """The rule. Not measured: it fills the device when M is small and spills no registers on sm_80 and sm_90."""
    if problem.dtype == "fp32":  # products by FMA: wide blocks of inputs spill
        config = Config(block_m=16, block_n=64, block_k=32)
    elif bucket <= 16:  # unpacking takes registers
        config = Config(block_m=16, block_n=64 if problem.group_size is None else 32, block_k=128)
    elif bucket <= 64:
        config = Config(block_m=64, block_n=64, block_k=64, num_stages=3)
    else:
        config = Config(block_m=64, block_n=128, block_k=64, num_warps=8, num_stages=3)
    return _split(problem, bucket, config)


def candidates(problem: Problem, bucket: int) -> list[Config]:
    """The rule's first, then what is worth trying beside it on a device."""
    first = default(problem, bucket)
    changes: list[dict[str, int]] = [
        {"block_n": 32},
        {"block_n": 64},
        {"block_n": 128},
        {"block_k": 64},
        {"block_k": 128},
        {"num_stages": 3},
        {"num_stages": 5},
        {"num_warps": 8},
    ]
    if problem.dtype == "fp32":
        changes = [{"block_n": 32}, {"num_stages": 3}]
    tried = [first]
    for change in changes:
        tried.append(_split(problem, bucket, dataclasses.replace(first, **change)))
    tried += [dataclasses.replace(first, split_k=split) for split in (1, 2 * first.split_k)]
    return list(dict.fromkeys(tried))


def _split(problem: Problem, bucket: int, config: Config) -> Config:
    """With the fewest splits that fill the device with one tile of rows; none where there may be many."""
    block_k = config.block_k if problem.group_size is None else min(config.block_k, problem.group_size)
    tiles, blocks, splits = -(-problem.num_out // config.block_n), -(-problem.num_in // block_k), 1
    while bucket <= _MAX_SPLIT_ROWS and tiles * splits < _TARGET_PROGRAMS and blocks >= 2 * splits * _MIN_BLOCKS:
        splits *= 2
    return dataclasses.replace(config, block_k=block_k, split_k=splits)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes:
    steps: (largest M, config), ascending.
    note: the same in words, and where it comes from.
    """

    steps: tuple[tuple[int, Config], ...]
    note: str

    def config(self, num_rows: int) -> Config:
        return next((config for most, config in self.steps if num_rows <= most), self.steps[-1][1])


def plan(problem: Problem, *, max_rows: int, device_name: str, tuned: Tuned | None = None) -> Plan:
    """Configs for M up to `max_rows`.

    Args:
        tuned: instead of `tuned.json`.
    """
    known = (load_tuned() if tuned is None else tuned).get(device_name, {})
    steps, words, measured = [], [], set()
    for bucket in ROW_BUCKETS:
        found = known.get(problem.key(bucket))
        config = default(problem, bucket) if found is None else Config.parse(found)
        steps.append((bucket, config))
        words.append(f"{config} to M={min(bucket, max_rows)}")
        measured.add(found is not None)
        if bucket >= max_rows:
            break
    source = {
        frozenset({True}): f"tuned on {device_name}",
        frozenset({False}): f"not tuned on {device_name}",
    }.get(frozenset(measured), f"in part tuned on {device_name}")
    return Plan(tuple(steps), f"{'; '.join(words)}; {source}")


@functools.cache
def load_tuned() -> Tuned:
    found: Tuned = json.loads(Path(__file__).with_name("tuned.json").read_text())
    return found

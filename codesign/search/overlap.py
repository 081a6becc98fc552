"""Whether timing windows of this machine's workers may overlap: measured when a search with several of them begins.

    each worker's cores read memory   alone, then all workers at once          as much as nobody's cache holds
    and once more                     the same                                 what one last-level cache just holds

Cores can be shared out; memory bandwidth and caches cannot, where workers sit on the same ones. Only where no worker
reads measurably less beside the others than alone (two sockets, say) may windows overlap; a machine that is busy while
this is measured looks shared, and then windows take turns.
"""

import dataclasses
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from codesign.search.seat import Seat
from codesign.units import MIB

LEAST = 0.95  # of what a worker reads alone, and of its core that a reader must have
_ROUNDS, _SECONDS = 3, 0.1
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_READER = """
import os, sys, time
import numpy as np
os.sched_setaffinity(0, [int(sys.argv[1])])
data = {size: np.ones(int(size) // 8) for size in sys.argv[2:]}
print("ready", flush=True)
for line in sys.stdin:
    size, seconds = line.split()
    own, count, begin, busy = data[size], 0, time.perf_counter(), time.process_time()
    while (now := time.perf_counter()) < begin + float(seconds):
        own.sum()
        count += 1
    print(count * own.nbytes / (now - begin), (time.process_time() - busy) / (now - begin), flush=True)
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """Attributes:
    beside_over_alone: by what is read; of the worker that loses most.
    alone_gb_per_s, beside_gb_per_s: of that worker.
    core_share: least share of its core that a reader had.
    """

    beside_over_alone: Mapping[str, float]
    alone_gb_per_s: Mapping[str, float]
    beside_gb_per_s: Mapping[str, float]
    core_share: float

    @property
    def is_allowed(self) -> bool:
        return min(self.core_share, *self.beside_over_alone.values()) >= LEAST

    @classmethod
    def of(
        cls, alone: Mapping[str, Sequence[float]], beside: Mapping[str, Sequence[float]], *, core_share: float
    ) -> Self:
        """From bytes per second of each worker, by what is read."""
        worst = {
            what: min(range(len(own)), key=lambda seat: beside[what][seat] / own[seat]) for what, own in alone.items()
        }
        return cls(
            beside_over_alone={what: round(beside[what][seat] / alone[what][seat], 3) for what, seat in worst.items()},
            alone_gb_per_s={what: round(alone[what][seat] / 1e9, 2) for what, seat in worst.items()},
            beside_gb_per_s={what: round(beside[what][seat] / 1e9, 2) for what, seat in worst.items()},
            core_share=round(core_share, 3),
        )

    def to_dict(self) -> dict[str, Any]:
        return {"windows": "overlap" if self.is_allowed else "take turns", **dataclasses.asdict(self)}

    @property
    def described(self) -> str:
        """`timing windows take turns: beside the others a worker reads 0.61 of its memory bandwidth alone (...)`"""
        if self.core_share < LEAST:
            return f"timing windows take turns: this machine is busy, a reader had {self.core_share:.2f} of its core"
        read = [
            f"{ratio:.2f} of its {what} bandwidth alone ({self.alone_gb_per_s[what]:g} GB/s)"
            for what, ratio in self.beside_over_alone.items()
        ]
        how = "may overlap" if self.is_allowed else "take turns"
        return f"timing windows {how}: beside the others a worker reads {' and '.join(read)}; wanted {LEAST:g}"


def measure(seats: Sequence[Seat]) -> Overlap:
    """Takes about a second, more with many workers. Each core of a worker reads its part."""
    cache_bytes = last_level_bytes()
    most = {"memory": 8 * cache_bytes, "cache": cache_bytes * 3 // 4}
    sizes = [{what: total // len(seat.cores) for what, total in most.items()} for seat in seats]
    workers: list[list[_Reader]] = []
    try:
        for seat, own in zip(seats, sizes, strict=True):
            workers.append([_Reader(core, sorted(own.values())) for core in seat.cores])
        readers = [reader for worker in workers for reader in worker]
        for reader in readers:
            reader.wait()
        alone: dict[str, list[float]] = {}
        beside: dict[str, list[float]] = {}
        for what in most:
            wanted = [own[what] for own in sizes]
            rounds = [_round(workers, wanted) for _ in range(_ROUNDS)]
            alone[what] = [statistics.median(one[0][index] for one in rounds) for index in range(len(seats))]
            beside[what] = [statistics.median(one[1][index] for one in rounds) for index in range(len(seats))]
        return Overlap.of(alone, beside, core_share=min(reader.core_share for reader in readers))
    finally:
        for reader in [reader for worker in workers for reader in worker]:
            reader.close()


def _round(workers: Sequence[Sequence["_Reader"]], sizes: Sequence[int]) -> tuple[list[float], list[float]]:
    """Bytes per second of each worker: one after the other, and all at once."""
    alone = [_read([worker], [size])[0] for worker, size in zip(workers, sizes, strict=True)]
    return alone, _read(workers, sizes)


def _read(workers: Sequence[Sequence["_Reader"]], sizes: Sequence[int]) -> list[float]:
    for worker, size in zip(workers, sizes, strict=True):
        for reader in worker:
            reader.go(size)
    return [sum(reader.bytes_per_s() for reader in worker) for worker in workers]


class _Reader:
    """A process on one core. Attributes: core_share: median share of it that the process had."""

    def __init__(self, core: int, sizes: Sequence[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _READER, str(core), *map(str, sizes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._shares: list[float] = []
        self._stdin, self._stdout = self._process.stdin, self._process.stdout

    def go(self, size: int) -> None:
        self._stdin.write(f"{size} {_SECONDS}\n")
        self._stdin.flush()

    def wait(self) -> None:
        """Until it is ready."""
        self._stdout.readline()

    def bytes_per_s(self) -> float:
        rate, share = map(float, self._stdout.readline().split())
        self._shares.append(share)
        return rate

    @property
    def core_share(self) -> float:
        return statistics.median(self._shares)

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def last_level_bytes() -> int:
    """Of the largest cache; 32 MiB where the system does not say."""
    sizes = [int(path.read_text().strip().removesuffix("K")) * 1024 for path in _CACHES.glob("index*/size")]
    return max(sizes, default=32 * MIB)

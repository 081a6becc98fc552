"""What the blocks of a paged cache held during a window, from readings after steps of the engine."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from codesign.results.measurement import statistic


@dataclasses.dataclass(frozen=True)
class KVUse:
    """One reading, after a step; of all layers and ranks.

    Attributes:
        rows_used: those of the blocks' rows that hold a token.
        shared_bytes: what the same sequences would need more if each had blocks of its own.
    """

    blocks_used: int
    rows_allocated: int
    rows_used: int
    shared_bytes: int

    @property
    def fragmentation(self) -> float:
        """Share of the allocated rows that is not used."""
        return 1 - self.rows_used / self.rows_allocated


def kv_use(readings: Sequence[KVUse]) -> dict[str, Any]:
    """Median and most of the readings in which sequences held blocks; empty where there is none."""
    busy = [reading for reading in readings if reading.rows_allocated]
    if not busy:
        return {}

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {name: statistic(values, name) for name in ("p50", "max")}

    return {
        "num_samples": len(busy),
        "fragmentation": spread([own.fragmentation for own in busy]),
        "shared_bytes": spread([own.shared_bytes for own in busy]),
        "blocks_used": spread([own.blocks_used for own in busy]),
    }

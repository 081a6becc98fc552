"""KVPlace: in which memory a store's rows lie. One file below `places/` per place.

Rows are what the codec stores: keys and values, encoded groups included. What decides over them (positions, scores,
recent queries, sinks) always lies on the device. Where the device can read the rows in place, a place is only an
allocator; where it cannot, layers pass through two buffers on the device (`LayerStream`).
"""

import torch
from torch import Tensor

from codesign.engine.huge_pages import huge_zeros
from codesign.engine.kv.stream import Lanes


class KVPlace:
    """The protocol; what it does by itself is keep rows on the device. Members are frozen dataclasses of knobs."""

    def zeros(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Rows for an engine that computes on `device`; their memory is given back with the tensor.

        Raises:
            MemoryError, Unsupported: there is no room for them, or no such memory.
        """
        return (
            torch.zeros(shape, dtype=dtype, device=device) if device.type != "cpu" else huge_zeros(shape, dtype=dtype)
        )

    def memory(self, device: torch.device) -> str:
        """What `zeros` allocates, in words."""
        return f"{device.type} memory"

    def lanes(self, device: torch.device) -> Lanes | None:
        """What copies rows to a device that cannot read them where they lie, and back; None where it can."""
        return None


ON_DEVICE = KVPlace()

"""LayerStream: rows of all layers far from the device, two layers' worth on it, in turn.

    in        | layer 2     | layer 3     |         buffer of layer l: l % 2
    compute   | 0     | 1 . . . .   | 2             l waits for its rows; l + 2 waits until l is done with its buffer
    out       |    0 new    | 1 new                 and until what l wrote has been read from it

What a step writes goes into the buffer, where its queries see it, and out again: single new rows through a strip
beside the rows, which the host sorts in when the next step begins; stretches of a prompt straight to their place.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # target, source
Parts = tuple[Tensor, ...]

# Copies of neighbouring stretches are made one when the gap is smaller than this. Not measured: about what PCIe 4 moves
# while a copy is launched, 128 KiB in 5 us.
_GAP_BYTES = 1 << 17


class Mark(Protocol):
    """A point in a queue of work, e.g. a CUDA event."""

    def wait(self) -> None:
        """What is queued from here on runs after it; the caller goes on."""

    def synchronize(self) -> None:
        """The caller waits for it."""


class Lane(Protocol):
    """A queue of copies beside the computation."""

    def copy(self, pairs: Iterable[Pair], after: Sequence[Mark]) -> Mark: ...


@dataclasses.dataclass(frozen=True)
class Lanes:
    """Copies to the device, copies from it, and a mark of all that has been queued for computation so far."""

    inward: Lane
    outward: Lane
    computed: Callable[[], Mark]


class LayerStream:
    """Args:
        far: parts [rows, X], all layers, where the host holds them.
        layer_rows: rows of each layer in them.
        strip: parts [layers, n, X] in the same memory; n rows are the most that one step writes singly in a layer.

    Attributes:
        buffers, strip: all that it has beside the rows.
        near: layer -> its parts [rows, X] on the device; they hold it between `enter` and `leave`.
    """

    def __init__(
        self, far: Parts, layer_rows: Sequence[range], strip: Parts, lanes: Lanes, *, device: torch.device
    ) -> None:
        most = max(len(own) for own in layer_rows)
        self.buffers = tuple(part.new_zeros(2, most, part.shape[1], device=device) for part in far)
        self.near = [
            tuple(buffer[layer % 2, : len(own)] for buffer in self.buffers) for layer, own in enumerate(layer_rows)
        ]
        self._far, self.strip, self._layer_rows, self._lanes = far, strip, layer_rows, lanes
        self._stretches: Sequence[Sequence[range]] = ()
        self._arrived: dict[int, Mark] = {}
        self._outgoing: list[Pair] = []
        self._new_rows: dict[int, Tensor] = {}  # layer -> rows whose values lie in its strip
        self._out: Mark | None = None

    def begin(self, stretches: Sequence[Sequence[range]]) -> None:
        """A step: layer -> stretches of its rows that will be read, ascending. Nobody may write the far rows now."""
        assert self._out is None, "drain() comes first"
        self._stretches, self._arrived = stretches, {}
        done = self._lanes.computed()
        for layer in range(min(2, len(self.near))):
            self._fetch(layer, [done])

    def enter(self, layer: int) -> None:
        self._arrived.pop(layer).wait()

    def write(self, layer: int, rows: Tensor, values: Parts) -> None:
        """values [n, X] into rows [n], counted over all layers."""
        own = rows - self._layer_rows[layer].start
        for near, strip, value in zip(self.near[layer], self.strip, values, strict=True):
            near.index_copy_(0, own, value)
            self._outgoing.append((strip[layer, : len(value)], value))
        self._new_rows[layer] = rows

    def keep(self, layer: int, stretches: Iterable[range]) -> None:
        """These rows of the layer were written where they are read: they stay."""
        start = self._layer_rows[layer].start
        for own in stretches:
            for far, near in zip(self._far, self.near[layer], strict=True):
                self._outgoing.append((far[start + own.start : start + own.stop], near[own.start : own.stop]))

    def leave(self, layer: int) -> None:
        """The layer has been computed: what it wrote goes out, and its buffer takes the one after the next."""
        after = [self._lanes.computed()]
        if self._outgoing:
            self._out = self._lanes.outward.copy(self._outgoing, after)
            after.append(self._out)
            self._outgoing = []
        if layer + 2 < len(self.near):
            self._fetch(layer + 2, after)

    def drain(self) -> None:
        """Waits until all that was written is out, and sorts it in."""
        if self._out is None:
            return
        self._out.synchronize()
        if self._new_rows:
            rows = torch.cat(list(self._new_rows.values())).cpu()
            for far, strip in zip(self._far, self.strip, strict=True):
                far.index_copy_(0, rows, torch.cat([strip[layer, : len(own)] for layer, own in self._new_rows.items()]))
        self._new_rows, self._out = {}, None

    def _fetch(self, layer: int, after: Sequence[Mark]) -> None:
        start, pairs = self._layer_rows[layer].start, []
        for far, near in zip(self._far, self.near[layer], strict=True):
            for own in joined(self._stretches[layer], _GAP_BYTES // (far.shape[1] * far.itemsize)):
                pairs.append((near[own.start : own.stop], far[start + own.start : start + own.stop]))
        self._arrived[layer] = self._lanes.inward.copy(pairs, after)


def joined(stretches: Iterable[range], gap: int) -> list[range]:
    """Ascending stretches, those with at most `gap` rows between them made one; empty ones dropped."""
    found: list[range] = []
    for own in stretches:
        if found and own and own.start - found[-1].stop <= gap:
            found[-1] = range(found[-1].start, own.stop)
        elif own:
            found.append(own)
    return found

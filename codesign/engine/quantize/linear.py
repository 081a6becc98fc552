"""Linear: y = x Wᵀ + b behind one interface, whatever the weights are packed as.

A weight format (`format.py`) turns a dense weight into a Linear. Bytes are the bytes of its buffers, plus
what a kernel library keeps in an object of its own (`opaque_bytes`).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codesign.engine.quantize.grid import AffineGrid, Quantized


class Workspace:
    """One buffer that every layer of an engine reuses to hold a dequantised weight; at most one layer lives in it."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A view of `shape`; its old content is lost, and so is any earlier view."""
        count = 1
        for size in shape:
            count *= size
        num_bytes = count * dtype.itemsize
        if self._buffer is None or self._buffer.numel() < num_bytes or self._buffer.device != device:
            self._buffer = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        return self._buffer[:num_bytes].view(dtype).view(shape)

    @property
    def buffer(self) -> Tensor | None:
        """What `take` gives views of until it wants more."""
        return self._buffer

    def release(self) -> None:
        """Lets go of the buffer; the next `take` makes one."""
        self._buffer = None

    @property
    def num_bytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()


@dataclass(frozen=True)
class Stored:
    """Codes of a weight [out, in] in the order of outputs and inputs, and their grid."""

    quantized: Quantized
    grid: AffineGrid


class Linear(nn.Module, ABC):
    """A packed weight [out_features, in_features] that multiplies.

    Attributes:
        kernel: which kernels run it, by M where that matters, e.g. "aten::_weight_int8pack_mm (M<=8), widen + ...".
        opaque_bytes: bytes of packed weights that are in no tensor, because a kernel library holds them.
        note: what went otherwise than asked while it was packed, or "".
    """

    in_features: int
    out_features: int
    kernel: str
    opaque_bytes: int = 0
    note: str = ""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """[M, in_features] -> [M, out_features], in the dtype of x. M may be 0."""

    def wide(self, x: Tensor) -> Tensor:
        """What `forward` gives before it is rounded to the dtype of x, where the kernels tell; for sums of several."""
        return self(x)  # type: ignore[no-any-return]  # nn.Module.__call__ is untyped

    def stored(self) -> "Stored | None":
        """The codes that it holds and what they mean; None where it holds none on equally spaced values."""
        return None

    @abstractmethod
    def dequantize(self) -> Tensor:
        """[out_features, in_features] fp32: the weight that `forward` multiplies with."""

    def rounded(self, x: Tensor) -> Tensor:
        """The activations that `forward` multiplies: x itself, unless the format rounds them too."""
        return x

    @property
    def num_bytes(self) -> int:
        """Bytes held: unique storages of the tensors, and what is opaque, in parts too."""
        tensors = (*self.buffers(), *self.parameters())
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values()) + sum(part.opaque_bytes for part in self.modules() if isinstance(part, Linear))


def weight_bytes(linear: Linear) -> int:
    """Bytes of the weight without its bias."""
    bias = getattr(linear, "bias", None)
    return linear.num_bytes - (0 if bias is None else bias.untyped_storage().nbytes())

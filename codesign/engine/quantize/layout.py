"""CheckpointLayout: how other tools write quantised weights into a Hugging Face directory. Members live in `layouts/`.

    layout.tensors(out, in)   suffix -> shape of the tensors that stand in the place of `weight`
    layout.decode(tensors)    -> Imported: plain codes, scales and zero points, on the grid of `layout.grid`

All of them hold  w = (q - zero) scale  with b-bit q, per output row and group of inputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from codesign.engine.models.config_values import ConfigValues

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """One weight out of a checkpoint.

    Attributes:
        codes: [out, in] uint8, with inputs of a group side by side.
        scale: [out, groups], as stored.
        zero: [out, groups] uint8, the code that means 0.
        order: [in] which input of the layer each column multiplies; None when they stand in order.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None = None


class CheckpointLayout(ABC):
    """The protocol. Members are frozen dataclasses made from `quantization_config`.

    Attributes:
        bits: per code.
        group_size: inputs per scale; None for one scale a row.
    """

    bits: int
    group_size: int | None

    @classmethod
    @abstractmethod
    def of(cls, config: ConfigValues) -> Self:
        """Raises InputError for values that make no sense, Unsupported for a variant that is not read here."""

    @abstractmethod
    def tensors(self, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
        """Suffix -> shape of what a linear of this size is stored as."""

    @abstractmethod
    def decode(self, tensors: Tensors, num_out: int, num_in: int) -> Imported:
        """Raises ValueError for contents that contradict each other."""

    def num_groups(self, num_in: int) -> int:
        """Raises ValueError when groups do not come out even."""
        size = self.group_size or num_in
        if num_in % size:
            raise ValueError(f"an input size of {num_in} has no whole groups of {size}")
        return num_in // size


def unpack_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words [..., W] read as one stream of bits, lowest first -> codes [..., count] uint8.

    Codes of three bits cross the borders of words.
    """
    octets = words.contiguous().view(torch.uint8)  # little-endian
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    single = ((octets[..., None] >> shifts) & 1).flatten(-2)[..., : count * bits]
    weights = torch.ones(bits, dtype=torch.uint8, device=words.device) << torch.arange(
        bits, dtype=torch.uint8, device=words.device
    )
    return (single.view(*words.shape[:-1], count, bits) * weights).sum(-1, dtype=torch.uint8)


def pack_stream(codes: Tensor, bits: int) -> Tensor:
    """The inverse: codes [..., n] uint8 -> int32 words [..., ceil(n bits / 32)]."""
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    single = ((codes[..., None] >> shifts) & 1).flatten(-2)
    padded = torch.nn.functional.pad(single, (0, -single.shape[-1] % 32))
    eights = padded.view(*codes.shape[:-1], -1, 8)
    octets = (eights << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)

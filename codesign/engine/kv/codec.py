"""KVCodec: what a slot stores for a row. One file below `codecs/` per codec.

Each row is encoded exactly once: when it is written, or, for a prompt, which is staged in native precision whatever its
chunks, when it is admitted at its end. Afterwards it is only moved as it is.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries

if TYPE_CHECKING:
    from codesign.engine.kv.group import LayerGroup

Parts = tuple[Tensor, ...]  # what is stored of rows [..., D], each part [..., X]


class KVCodec:
    """The protocol; what it does by itself is store native rows. Members are frozen dataclasses of knobs.

    Attributes:
        rows_mutable: whether a row may be overwritten by another (decode-time eviction needs that).
        is_native: whether what is stored is what attention reads; then a prompt needs no staging area.
    """

    rows_mutable: ClassVar[bool] = True
    is_native: ClassVar[bool] = False

    def encode(self, rows: Tensor) -> Parts:
        """What is stored of rows [..., D], key or value."""
        return (rows,)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """[..., D] in `dtype` from the stored parts."""
        return parts[0]

    def kernel(self, *, head_dim: int, device: torch.device) -> KVAttention | Missing:
        """What reads rows as they are stored, for `attend`, or why rows have to be decoded here."""
        return Missing("none for this codec")

    def attend(self, kernel: KVAttention, queries: Queries, group: "LayerGroup", index: int, slots: slice) -> None:
        """Lets queries attend to what `slots` hold in layer `group.layers[index]`."""
        raise NotImplementedError  # a codec without a kernel is never asked

"""KVCodec: what a slot stores for a row. One file below `codecs/` per codec.

Two kinds, by `group_size`. A row codec (0) encodes each row by itself, when it is written; rows can be moved and
overwritten in place, so it composes with every policy. A group codec encodes whole groups of consecutive tokens when
they are committed or admitted; the newest tokens, and those that do not fill a group yet, stay native rows:

    row codec     [ r r r r r r r | pending ]                        every row encoded
    group codec   [ group | group | group ]  [ r r r | pending ]     native rows

Either way what is encoded is encoded exactly once, and how much room a slot takes follows from lengths only. Prompts
are staged in native precision, whatever their chunks, and encoded when they end.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.kv_attention import KVAttention, Queries
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens

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

    @property
    def group_size(self) -> int:
        """Tokens that are encoded together; 0 where each row is encoded by itself."""
        return 0

    @property
    def residual_tokens(self) -> int:
        """Newest tokens that a group codec always leaves native."""
        return 0

    def encoded_tokens(self, num_tokens: int) -> int:
        """How many of a slot's first tokens lie in groups."""
        if not self.group_size:
            return 0
        return max(0, num_tokens - self.residual_tokens) // self.group_size * self.group_size

    def num_rows(self, max_model_len: int, max_query_len: int) -> int:
        """Rows that a slot needs beside its groups, where nothing is ever evicted."""
        if not self.group_size:
            return max_model_len
        return min(max_model_len, self.residual_tokens + self.group_size - 1 + max_query_len)

    def groups(self, shape: EncodedShape) -> EncodedTokens:
        """Room for the groups.

        Raises:
            Unsupported: heads of this size cannot be encoded so.
        """
        raise NotImplementedError  # a row codec is never asked

    def encode(self, rows: Tensor) -> Parts:
        """What is stored of rows [..., D], key or value, outside groups."""
        return (rows,)

    def decode(self, parts: Parts, dtype: torch.dtype) -> Tensor:
        """[..., D] in `dtype` from the stored parts."""
        return parts[0]

    def kernel(self, *, head_dim: int, device: torch.device) -> KVAttention | Missing:
        """What reads rows as they are stored, for `attend`, or why rows have to be decoded here."""
        return Missing("no kernel for this codec")

    def attend(self, kernel: KVAttention, queries: Queries, group: "LayerGroup", index: int, slots: slice) -> None:
        """Lets queries attend to what `slots` hold in layer `group.layers[index]`."""
        raise NotImplementedError  # a codec without a kernel is never asked

    def attend_blocks(self, kernel: KVAttention, queries: Queries, table: Tensor, key: Parts, value: Parts) -> None:
        """The same over blocks: key and value parts [num_blocks, H_kv, 32, X], block ids [B, H_kv, n] int32."""
        raise NotImplementedError  # a codec of groups is never asked

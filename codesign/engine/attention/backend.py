"""AttentionBackend: softmax(q kᵀ) v over rows that are already rotated. One file below `backends/` per backend.

Two shapes reach a backend. Output tokens (decode, verification): the query group of a KV head is folded into query
rows, so that K and V are read once per KV head (1.5-1.7x faster than repeating heads on a CPU). Prompt chunks: one
sequence, query heads as they are.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from codesign.engine.attention import weights
from codesign.engine.attention.calls import Call
from codesign.engine.kernels.compiled import Missing

if TYPE_CHECKING:
    from codesign.engine.kv.codec import KVCodec, Parts
    from codesign.engine.kv.group import LayerGroup


class AttentionBackend(ABC):
    """The protocol. Members are frozen dataclasses of knobs.

    Attributes:
        is_plain: the reference: no kernel that reads encoded rows may stand in for it.
        is_indexed: whether `attend_stored` and `attend_blocks` find counts and slots in `call.index`.
        column_kernel: what runs beside `kernel` where column sums are asked for, for the record.
    """

    is_plain: ClassVar[bool] = False
    is_indexed: ClassVar[bool] = False
    column_kernel: ClassVar[str] = "column pass"

    @property
    @abstractmethod
    def kernel(self) -> str:
        """What runs, for the record."""

    def missing(self, device: torch.device) -> Missing | None:
        """Why it cannot run on `device`; None where it can."""
        return None

    @abstractmethod
    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float
    ) -> Tensor:
        """[B, H, M, D] in the dtype of the query.

        Args:
            query: [B, H, M, D]; H is a multiple of H_kv.
            key, value: [B, H_kv, R, D] views of a cache, rows not necessarily contiguous across B and H_kv.
            mask: additive, broadcasts to [B, H, M, R], dtype of the query; None sees every row.
            is_causal: M == R, and query i sees rows up to i; never together with a mask.
        """

    def attend_columns(
        self, query: Tensor, key: Tensor, value: Tensor, *, num_tokens: int, mask: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """`attend` for output tokens, and the weight that each row received from each: [B, H_kv, num_tokens, R] fp32.

        By itself a backend shows no weights: they cost a second q kᵀ.

        Args:
            query: [B, H_kv, M, D], M = query group x num_tokens, tokens last; weights are averaged over the group.
        """
        out = self.attend(query, key, value, mask=mask, is_causal=False, scale=scale)
        whole = slice(0, query.shape[2])
        weight = weights.weights(query, key, whole, mask=mask, is_causal=False, scale=scale)
        return out, weight.view(*key.shape[:2], -1, num_tokens, key.shape[2]).mean(dim=2)

    def column_sums(
        self, query: Tensor, key: Tensor, *, mask: Tensor | None, is_causal: bool, scale: float, decay: float
    ) -> Tensor:
        """[B, H_kv, R] fp32 of a prompt chunk, as `weights.column_sums`, in memory linear in R."""
        return weights.column_sums(query, key, mask=mask, is_causal=is_causal, scale=scale, decay=decay)

    def reads(self, codec: "KVCodec", *, head_dim: int) -> bool:
        """Whether `attend_stored` takes what this codec stores."""
        return False

    def attend_stored(
        self,
        query: Tensor,
        codec: "KVCodec",
        group: "LayerGroup",
        index: int,
        call: Call,
        *,
        scale: float,
        want_columns: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend`, or `attend_columns` if wanted, over what the slots of a call hold in `group.layers[index]`."""
        raise NotImplementedError  # a backend that reads nothing stored is never asked

    def reads_blocks(self, codec: "KVCodec") -> bool:
        """Whether `attend_blocks` takes what this codec stores."""
        return False

    def attend_blocks(
        self, query: Tensor, codec: "KVCodec", key: "Parts", value: "Parts", table: Tensor, call: Call, *, scale: float
    ) -> Tensor:
        """`attend` for output tokens over blocks, key and value parts [num_blocks, H_kv, 32, X].

        Args:
            table: [B, H_kv, n] int32 block ids of each sequence of the call, which may differ in length.
        """
        raise NotImplementedError  # a backend that reads no blocks is never asked

"""AttentionBackend: softmax(q kᵀ) v over rows that are already rotated. One file below `backends/` per backend.

Two shapes reach a backend. Output tokens (decode, verification): the query group of a KV head is folded into query
rows, so that K and V are read once per KV head (1.5-1.7x faster than repeating heads on a CPU). Prompt chunks: one
sequence, query heads as they are.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class AttentionBackend(ABC):
    """The protocol. Members are frozen dataclasses of knobs.

    Attributes:
        is_plain: the reference: no kernel that reads encoded rows may stand in for it.
    """

    is_plain: ClassVar[bool] = False

    @property
    @abstractmethod
    def kernel(self) -> str:
        """What runs, for the record."""

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

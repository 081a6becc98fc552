"""EncodedTokens: the first tokens of every slot of a layer group, for codecs that encode whole groups of tokens."""

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from codesign.engine.kv.place import ON_DEVICE, KVPlace


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedShape:
    """Attributes:
    num_tokens: T, most encoded tokens of a slot; a multiple of the codec's group size, 0 where none ever fills.
    rope_tables: cosine and signed sine [P, D], P >= T.
        place: where they lie.
    """

    num_layers: int
    num_slots: int
    num_kv_heads: int
    num_tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    rope_tables: tuple[Tensor, Tensor]
    place: KVPlace = ON_DEVICE

    def zeros(self, *rest: int, dtype: torch.dtype | None = None) -> Tensor:
        """[L, S, H_kv, *rest]."""
        planes = (self.num_layers, self.num_slots, self.num_kv_heads)
        return self.place.zeros(*planes, *rest, dtype=dtype or self.dtype, device=self.device)


class EncodedTokens(ABC):
    """Storage [L, S, H_kv, T] of a group codec. Token index == position; how many are there the codec knows."""

    @abstractmethod
    def encode(self, layers: slice, slot: int, first: int, key: Tensor, value: Tensor) -> None:
        """Stores tokens first .. first + n - 1, whole groups, never to be written again while the slot lives.

        Args:
            key, value: [L', H_kv, n, D], keys rotated at their positions.
        """

    @abstractmethod
    def decode(self, index: int, slots: slice, heads: slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        """key, value [B, H', num_tokens, D], keys rotated; tokens that a slot does not have are anything finite."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""

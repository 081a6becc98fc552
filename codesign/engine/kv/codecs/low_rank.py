"""low_rank: keys and values as coordinates on a small basis of each sequence and KV head, keys taken before RoPE.

    K ≈ A B    A [tokens, rank]    B [rank, D]: leading right singular vectors of the first keys that are encoded
    read:      rotate(A B, positions)            values likewise, without the rotation

RoPE turns every key by another angle: keys that span 24 of 128 directions before it need 96 after it, for 99 % of their
energy (random keys, 512 positions). So rows are turned back before they are projected, and forth when they are read.

The basis is the sequence's own, from its prompt when that ends (from its first whole group where the prompt is
shorter), and stays: later tokens are projected on it, so a text that changes its subject loses more. Nothing has to be
calibrated or cached per model, and the basis of one sequence is better than one for all texts; it costs rank · D values
a sequence and head, which short sequences do not earn back. `residual_tokens` newest tokens are native.

Cost: at a prompt's end one D x D eigenproblem per layer and KV head; each step rebuilds and turns all keys it reads,
tokens · rank · D multiplications a head, a slice at a time: less memory, more time.

Palu (Chang et al., 2024), https://arxiv.org/abs/2407.21118, and ShadowKV (Sun et al., 2024),
https://arxiv.org/abs/2410.21465, factor keys before RoPE; the second per prompt, as here.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from codesign.engine.attention.rope import rotate
from codesign.engine.kv.budget import check_tokens
from codesign.engine.kv.codec import KVCodec
from codesign.engine.kv.encoded import EncodedShape, EncodedTokens
from codesign.errors import Unsupported


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(KVCodec):
    """Args:
    rank: of the keys, a number or a fraction of head_dim.
    value_rank: of the values, which are rarely of as low a rank.
    group_size: tokens that are encoded together, at least both ranks: as many must be there to span the basis.
    residual_tokens: newest tokens that stay native, beside those that do not fill a group yet.
    """

    rows_mutable: ClassVar[bool] = False

    rank: int | float = 0.5
    value_rank: int | float = 0.75
    group_size: int = 128
    residual_tokens: int = 32

    def __post_init__(self) -> None:
        check_tokens("group_size", self.group_size, least=1)
        check_tokens("residual_tokens", self.residual_tokens)
        for name in ("rank", "value_rank"):
            value = getattr(self, name)
            is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (is_number or (isinstance(value, float) and 0 < value <= 1)):
                raise ValueError(f"{name} must be a whole number of at least 1 or a fraction in (0, 1], got {value!r}")

    def groups(self, shape: EncodedShape) -> EncodedTokens:
        ranks = []
        for name in ("rank", "value_rank"):
            value = getattr(self, name)
            rank = max(1, round(value * shape.head_dim)) if isinstance(value, float) else value
            if rank > min(shape.head_dim, self.group_size):
                raise Unsupported(
                    f"kv.codec 'low_rank': {name} {value!r} is {rank}, more than head_dim {shape.head_dim} or than the "
                    f"{self.group_size} tokens of a group that have to span it; lower it or raise group_size"
                )
            ranks.append(rank)
        return _LowRankTokens(shape, *ranks)


class _LowRankTokens(EncodedTokens):
    """Coordinates [L, S, H_kv, T, rank] and bases [L, S, H_kv, rank, D] of keys before RoPE and of values."""

    def __init__(self, shape: EncodedShape, rank: int, value_rank: int) -> None:
        self._cos, self._signed_sin = shape.rope_tables
        self._dtype = shape.dtype
        self._key, self._value = (shape.zeros(shape.num_tokens, own) for own in (rank, value_rank))
        self._key_basis, self._value_basis = (shape.zeros(own, shape.head_dim) for own in (rank, value_rank))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._key, self._key_basis, self._value, self._value_basis

    def encode(self, layers: slice, slot: int, first: int, key: Tensor, value: Tensor) -> None:
        tokens = slice(first, first + key.shape[2])
        cos, signed_sin = self._cos[tokens], self._signed_sin[tokens]
        # turning there and back scales by cos² + sin², which is not 1 under YaRN
        unrotated = rotate(key.float(), cos, -signed_sin) / (cos.square() + signed_sin.square())
        pairs = ((unrotated, self._key, self._key_basis), (value.float(), self._value, self._value_basis))
        for rows, stored, bases in pairs:
            if first == 0:
                bases[layers, slot] = _basis(rows, bases.shape[3]).to(self._dtype)
            stored[layers, slot, :, tokens] = (rows @ bases[layers, slot].float().mT).to(self._dtype)

    def decode(self, index: int, slots: slice, heads: slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        planes, tokens = (index, slots, heads), slice(num_tokens)
        key = self._key[planes][:, :, tokens].float() @ self._key_basis[planes].float()
        value = self._value[planes][:, :, tokens].float() @ self._value_basis[planes].float()
        return rotate(key, self._cos[tokens], self._signed_sin[tokens]).to(self._dtype), value.to(self._dtype)


def _basis(rows: Tensor, rank: int) -> Tensor:
    """[..., rank, D] orthonormal directions that hold most of rows [..., n, D]."""
    gram = rows.mT @ rows
    if not bool(gram.isfinite().all()):
        return gram.new_full(
            (*gram.shape[:-2], rank, gram.shape[-1]), float("nan")
        )  # seen in the logits, and said there
    directions: Tensor = torch.linalg.eigh(gram).eigenvectors
    return directions[..., -rank:].mT

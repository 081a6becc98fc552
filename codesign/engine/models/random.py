"""RandomWeights: a model of any size without a checkpoint, for speed and memory only.

Linear weights are normal with variance 1 / inputs (and the two that write to the residual stream smaller by
sqrt(2 layers)), so that activations and logits keep a spread near 1 at any depth. Up to a million values a tensor is
drawn fresh; larger ones repeat a pool of 2^20 + 7 normal values from an offset of their own, because drawing 8 billion
numbers takes minutes and no kernel's speed depends on them.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.models.shape import ModelShape

_POOL_SIZE = 2**20 + 7  # prime: rows of a matrix never line up with the pool's period


class RandomWeights:
    """Args:
    seed: two sources with the same seed and shape hold the same numbers.
    dtype: of the tensors handed out.
    """

    def __init__(self, shape: ModelShape, *, seed: int, dtype: torch.dtype) -> None:
        self._shape, self._seed, self._dtype = shape, seed, dtype
        self._pool: Tensor | None = None

    def read(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: self._tensor(name, size) for name, size in shapes.items()}

    def finish(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self._pool = None

    def _tensor(self, name: str, size: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(size, dtype=self._dtype)
        count = 1
        for length in size:
            count *= length
        return self._normal(name, count).mul_(self._scale(name, size)).view(size)

    def _scale(self, name: str, size: tuple[int, ...]) -> float:
        if name.endswith(".bias"):
            return 0.1
        if name == "model.embed_tokens.weight" and not self._shape.ties_embeddings:
            return 1.0
        scale = float(size[-1] ** -0.5)
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return scale * float((2 * self._shape.num_layers) ** -0.5) if writes_residual else scale

    def _normal(self, name: str, count: int) -> Tensor:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        if count <= _POOL_SIZE:
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
            return torch.randn(count, generator=generator).to(self._dtype)
        if self._pool is None:
            generator = torch.Generator().manual_seed(self._seed)
            self._pool = torch.randn(_POOL_SIZE, generator=generator).to(self._dtype)
        pool = self._pool.roll(int.from_bytes(digest[:8]) % _POOL_SIZE)
        values = torch.empty(count, dtype=self._dtype)
        for start in range(0, count, _POOL_SIZE):
            part = values[start : start + _POOL_SIZE]
            part.copy_(pool[: part.numel()])
        return values

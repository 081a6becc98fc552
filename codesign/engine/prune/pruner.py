"""Pruner: which weights become 0 before the rest is packed. Members live in `pruners/`; `none` keeps them all.

A zero takes as many bytes as any other weight in every format here, and no CPU kernel skips it: pruning changes quality
at once, and speed only where a kernel for its pattern is named in the record. Where two_of_four cannot pay, no search
offers it (`spec/rules.py`).
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from codesign.engine.quantize.inputs import InputStats

Pattern = Literal["unstructured", "two_of_four"]


class Pruner(ABC):
    """The protocol. Members are frozen dataclasses of knobs.

    Attributes:
        needs_inputs: whether calibration text must be run through the model first.
    """

    needs_inputs: ClassVar[bool] = False

    @property
    def prunes(self) -> bool:
        return True

    @abstractmethod
    def prune(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        """A weight [out, in] with zeros in it, in its dtype; the argument is left alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScorePruner(Pruner):
    """Drops what scores least.

    Args:
        pattern: unstructured, or two_of_four: of every four neighbouring inputs the two that score least.
        sparsity: share of weights that become 0; two_of_four is 0.5.
    """

    pattern: Pattern = "unstructured"
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise ValueError(f"pattern must be one of {', '.join(get_args(Pattern))}, got {self.pattern!r}")
        if isinstance(self.sparsity, bool) or not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity!r}")
        if self.pattern == "two_of_four" and self.sparsity != 0.5:
            raise ValueError(f"two_of_four is a sparsity of 0.5, got {self.sparsity!r}")

    @abstractmethod
    def score(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        """[out, in] fp32: how much would be lost."""

    @abstractmethod
    def dropped(self, score: Tensor) -> Tensor:
        """[out, in] bool for the unstructured pattern."""

    def prune(self, weight: Tensor, inputs: InputStats | None) -> Tensor:
        score = self.score(weight, inputs)
        dropped = lower_half_of_fours(score) if self.pattern == "two_of_four" else self.dropped(score)
        return weight.masked_fill(dropped, 0)


def lower_half_of_fours(score: Tensor) -> Tensor:
    """[out, in] bool: in every four neighbouring inputs the two of least score, exactly two also among equals.

    Raises:
        ValueError: `in` is not a multiple of 4.
    """
    if score.shape[1] % 4:
        raise ValueError(f"two_of_four needs an input size that is a multiple of 4, got {score.shape[1]}")
    fours = score.view(score.shape[0], -1, 4)
    lowest = fours.argsort(dim=-1, stable=True)[..., :2]
    return torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, lowest, True).view(score.shape)

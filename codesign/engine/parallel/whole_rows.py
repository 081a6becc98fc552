"""Rows that are rounded whole and cut afterwards: for formats with one scale per output row, on a tensor split.

Where inputs are split over ranks (`output`, `down`), a row of int8 rounded part by part would have one scale per rank,
and other codes than on one rank. Formats with groups of inputs need nothing of this: whole groups are cut as they are.
"""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.parallel.part import Part
from codesign.engine.quantize.format import GridFormat, WeightFormat
from codesign.engine.quantize.grid import Grid, Quantized
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.method import Method


def has_row_scales(weight_format: WeightFormat, dtype: torch.dtype) -> bool:
    return isinstance(weight_format, GridFormat) and weight_format.grid(dtype).inputs_per_group is None


@dataclasses.dataclass(frozen=True)
class WholeRows(WeightFormat):
    """A format of all linears of a part, whose source shows whole rows of `output` and `down`."""

    inner: GridFormat
    part: Part

    def of(self, layer: int, name: str) -> WeightFormat:
        if name == "output":
            dim = self.part.whole.head_dim
            return _CutAfterwards(self.inner, self.part.heads.start * dim, self.part.heads.stop * dim)
        if name == "down":
            return _CutAfterwards(self.inner, self.part.inner.start, self.part.inner.stop)
        return self.inner

    @property
    def method_member(self) -> Method:
        return self.inner.method_member

    def pack(self, weight: Tensor, bias: Tensor | None, **_: object) -> Linear:
        raise TypeError("ask for the format `of` a linear")


@dataclasses.dataclass(frozen=True)
class _CutAfterwards(GridFormat):
    """Packs inputs start..stop of a weight, with the codes and scales of the whole one."""

    inner: GridFormat
    start: int
    stop: int

    @property
    def method_member(self) -> Method:
        return self.inner.method_member

    def grid(self, dtype: torch.dtype) -> Grid:
        return self.inner.grid(dtype)

    def check_size(self, num_out: int, num_in: int) -> None:
        self.inner.check_size(num_out, self.stop - self.start)

    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        own = dataclasses.replace(quantized, codes=quantized.codes[:, self.start : self.stop].contiguous())
        return self.inner.build(own, bias, dtype=dtype, workspace=workspace)

    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        return self.inner.restore(tensors, dtype=dtype, workspace=workspace)

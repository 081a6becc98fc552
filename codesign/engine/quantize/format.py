"""WeightFormat: what a weight is packed as. Members live in `formats/`; `native` is the neutral one.

format.pack(weight, bias, inputs=...)       dense weight -> Linear, by the format's grid and its `method`
    = method.quantize(weight, grid, inputs) -> codes and scales;  format.build(codes, bias) -> Linear
format.restore(tensors)                     a Linear from the buffers of an earlier one (the cache on disk)
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from codesign.engine.quantize.grid import Grid, Quantized, finite
from codesign.engine.quantize.inputs import InputStats
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.engine.quantize.method import Method
from codesign.registry import WEIGHT_METHODS


class WeightFormat(ABC):
    """The protocol. Members are frozen dataclasses of knobs."""

    @abstractmethod
    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        """Packs one dense weight [out, in] (any float dtype) for activations of `dtype` on the weight's device.

        Args:
            inputs, num_unclipped_rows: see `Method.quantize`.
        Raises:
            ValueError: a shape that the format cannot hold (the text says which sizes it can), a weight that is not
                finite, or one whose scale does not fit `dtype`.
        """

    def check_device(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027  # most run anywhere
        """Raises ValueError where this device cannot multiply the format with activations of `dtype`."""

    @property
    def method_member(self) -> Method | None:
        """How codes are chosen; None where there is nothing to choose."""
        return None

    def of(self, layer: int, name: str) -> "WeightFormat":
        """The format of one linear of the model; itself unless a plan says otherwise."""
        return self


class GridFormat(WeightFormat):
    """A format whose weights are codes on a grid, chosen by the method that its knob `method` names."""

    method: str

    @property
    def method_member(self) -> Method:
        member: Method = WEIGHT_METHODS.create(self.method, key="weights.method")
        return member

    @abstractmethod
    def grid(self, dtype: torch.dtype) -> Grid:
        """The values it can hold beside activations of `dtype`."""

    @abstractmethod
    def build(self, quantized: Quantized, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        """A Linear that holds these codes. Raises ValueError for a shape that it cannot hold."""

    @abstractmethod
    def restore(self, tensors: Mapping[str, Tensor], *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        """The Linear whose buffers these are, by name."""

    def check_size(self, num_out: int, num_in: int) -> None:
        """Raises ValueError for a size that the format cannot hold, before any work is done."""

    def pack(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        workspace: Workspace,
        inputs: InputStats | None = None,
        num_unclipped_rows: int = 0,
    ) -> Linear:
        self.check_size(*weight.shape)
        method = self.method_member
        quantized = method.quantize(finite(weight), self.grid(dtype), inputs, num_unclipped_rows=num_unclipped_rows)
        linear = self.build(quantized, bias, dtype=dtype, workspace=workspace)
        weakness = inputs.weakness if method.needs_inputs and inputs is not None else ""
        linear.note = "; ".join(filter(None, [weakness, quantized.note]))
        return linear


def check_group_size(group_size: int, *, multiple_of: int) -> None:
    """Raises ValueError unless it is a positive multiple."""
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1 or group_size % multiple_of:
        raise ValueError(f"group_size must be a positive multiple of {multiple_of}, got {group_size!r}")

"""ImportedCheckpoint: a Hugging Face directory whose linear layers another tool has quantised; run as they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codesign.engine.models.config_values import ConfigValues
from codesign.engine.models.load import Checkpoint
from codesign.engine.quantize import int4_layout
from codesign.engine.quantize.bit_packed import BitPackedLinear, pack_bits
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.grid import AffineGrid, Fit, Quantized
from codesign.engine.quantize.layout import CheckpointLayout, Imported
from codesign.engine.quantize.linear import Linear, Workspace
from codesign.errors import InputError
from codesign.registry import CHECKPOINT_LAYOUTS

_KINDS = {
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


def read_layout(plain: Mapping[str, Any], *, file: object) -> CheckpointLayout | None:
    """How the directory with this config.json holds its weights; None when they are not quantised.

    Raises:
        InputError, Unsupported: a quantiser or a variant that is not read here.
    """
    config = ConfigValues(plain, file=file).inner("quantization_config")
    if config is None:
        return None
    name = config.text("quant_method").replace("-", "_")
    CHECKPOINT_LAYOUTS.check(name, file=file, key="quantization_config.quant_method")
    member: type[CheckpointLayout] = CHECKPOINT_LAYOUTS.member(name)
    return member.of(config)


class ImportedCheckpoint(Checkpoint):
    """Args:
    layout: of its quantised linears; what is not quantised in it is read as in any checkpoint.
    """

    def __init__(self, path: Path, *, dtype: torch.dtype, layout: CheckpointLayout) -> None:
        super().__init__(path, dtype=dtype)
        self._layout = layout

    def finish(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        names: dict[str, tuple[int, ...]] = {}
        for name, shape in expected.items():
            if len(shape) == 2 and self.is_packed(name):
                stem = name.removesuffix("weight")
                names.update({f"{stem}{suffix}": size for suffix, size in self._layout.tensors(*shape).items()})
                names[f"{stem}g_idx"] = (shape[1],)  # written by some tools where it says nothing
            else:
                names[name] = shape
        super().finish(names)

    def is_packed(self, name: str) -> bool:
        """Whether the weight of this name stands there quantised."""
        return not self.has(name)

    def read_linear(
        self, shapes: Mapping[str, tuple[int, ...]], bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace
    ) -> Linear:
        """The weights of these names, on top of each other, as one packed linear.

        Raises:
            InputError: contents that contradict each other or config.json.
        """
        parts = [self._decode(name, shape) for name, shape in shapes.items()]
        first = next(iter(shapes))
        natural = torch.arange(parts[0].codes.shape[1])
        orders = [natural if part.order is None else part.order for part in parts]
        if not all(torch.equal(order, orders[0]) for order in orders):
            raise InputError("its act-order differs from that of its neighbours", file=self.path, key=first)
        whole = Imported(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat([part.zero for part in parts]),
        )
        linear = self._linear(whole, bias, dtype=dtype, workspace=workspace)
        return linear if torch.equal(orders[0], natural) else PermutedLinear(linear, orders[0])

    def _decode(self, name: str, shape: tuple[int, ...]) -> Imported:
        num_out, num_in = shape
        stem = name.removesuffix("weight")
        try:
            wanted = {f"{stem}{suffix}": size for suffix, size in self._layout.tensors(num_out, num_in).items()}
            found = {key.removeprefix(stem): tensor for key, tensor in self._read(wanted, _KINDS).items()}
            return self._layout.decode(found, num_out, num_in)
        except ValueError as error:
            raise InputError(str(error), file=self.path, key=name) from error

    def _linear(self, weight: Imported, bias: Tensor | None, *, dtype: torch.dtype, workspace: Workspace) -> Linear:
        bits, (num_out, num_in) = self._layout.bits, weight.codes.shape
        group_size = num_in // weight.scale.shape[1]
        stored = torch.float16 if dtype == torch.float32 else dtype
        scale, middle = weight.scale.to(stored), 2 ** (bits - 1)
        offset = None
        if bool((weight.zero != middle).any()):
            offset = ((middle - weight.zero.float()) * weight.scale.float()).to(stored)
        fit = Fit(scale, offset)
        if bits == 4 and group_size in int4_layout.GROUP_SIZES and num_out % int4_layout.OUT_MULTIPLE == 0:
            member = Int4(group_size=group_size)
            return member.build(Quantized(weight.codes, fit), bias, dtype=dtype, workspace=workspace)
        grid = AffineGrid(bits=bits, group_size=group_size, is_symmetric=offset is None, scale_dtype=stored)
        packed = pack_bits(weight.codes, bits)
        return BitPackedLinear(packed, scale, offset, bias, grid=grid, dtype=dtype, workspace=workspace)


class PermutedLinear(Linear):
    """A linear whose columns stand in another order than its inputs: act-order with groups that are not static."""

    order: Tensor

    def __init__(self, linear: Linear, order: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kernel = f"{linear.kernel} (inputs permuted)"
        self.linear = linear
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(x[:, self.order])
        return result

    def dequantize(self) -> Tensor:
        weight = torch.empty(self.out_features, self.in_features, device=self.order.device)
        weight[:, self.order] = self.linear.dequantize()
        return weight

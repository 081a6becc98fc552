"""Unpacked slices against the plain path, `dequantize`, for every layout that the C code knows."""

from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.kernels import unpack
from codesign.engine.kernels.compiled import Missing
from codesign.engine.quantize import int4_layout
from codesign.engine.quantize.bit_packed import BitPackedLinear, pack_bits
from codesign.engine.quantize.grid import AffineGrid
from codesign.engine.quantize.linear import Workspace
from codesign.registry import WEIGHT_FORMATS

pytestmark = pytest.mark.skipif(isinstance(unpack.load(), Missing), reason=str(unpack.load()))

CHOICES: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}),
    ("int4", {"group_size": 32}),
    ("int4", {"group_size": 128, "symmetric": True}),
    ("nf4", {}),
    ("int3", {"group_size": 8}),
    ("int3", {"group_size": 64, "symmetric": True}),
    ("int2", {"group_size": 16}),
]


def unpacked(linear: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop, [stop - start, in]."""
    is_transposed = linear._is_transposed
    out = torch.full((stop - start, linear.in_features), float("nan"), dtype=dtype)
    out = out.t().contiguous() if is_transposed else out
    linear.unpack(start, stop, out)
    return out.t() if is_transposed else out


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "knobs"), CHOICES)
def test_any_slice_equals_the_weight_rounded_once(
    name: str, knobs: dict[str, Any], dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    weight = torch.randn(192, 384, generator=torch.Generator().manual_seed(1)) * 0.05
    linear = WEIGHT_FORMATS.create(name, **knobs).pack(weight, None, dtype=dtype, workspace=Workspace())
    linear.compiled_unpack = unpack.load()
    wanted = linear.dequantize()
    block = int4_layout.block_rows()

    for start, stop in [(0, 192), (block, 192), (block, 2 * block)]:
        found = unpacked(linear, start, stop, out_dtype).float()
        rounding = 2.0**-8 if out_dtype == torch.bfloat16 else 2.0**-21
        assert torch.allclose(found, wanted[start:stop], rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_of_every_width_come_out_of_the_layout_they_were_packed_in(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 64), dtype=torch.uint8)
    grid = AffineGrid(bits=bits, group_size=16, is_symmetric=True, scale_dtype=torch.bfloat16)
    scale = torch.ones(5, 4, dtype=torch.bfloat16)
    linear = BitPackedLinear(
        pack_bits(codes, bits), scale, None, None, grid=grid, dtype=torch.float32, workspace=Workspace()
    )

    assert linear.kernel.startswith("codesign::unpack")
    assert torch.equal(unpacked(linear, 0, 5, torch.float32), codes.float() - grid.middle)
    assert torch.equal(unpacked(linear, 3, 5, torch.float32), codes[3:].float() - grid.middle)


def test_rows_too_long_for_the_compiled_loops_take_the_plain_path() -> None:
    assert not unpack.takes(32776, torch.float32)
    assert not unpack.takes(64, torch.float16)
    assert unpack.takes(32768, torch.bfloat16)

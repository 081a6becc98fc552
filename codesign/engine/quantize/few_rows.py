"""Which kernel multiplies few rows of x with packed weights here, and up to how many rows it should.

From some M on, unpacking a slice of the weight and multiplying densely wins. Where that is was measured once and is
written down below: a table and not a calibration at build time, because two trials of one configuration must run the
same kernels, or their difference means nothing, and a calibration on a busy machine decides by noise. `describe` goes
into the record, with the reason where a slower kernel had to stand in.
"""

import dataclasses

import torch

from codesign.engine.kernels import packed_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.packed_matmul import PackedMatmul
from codesign.engine.quantize import cpu, int4_layout

_ATEN_NAMES = {"int8": "aten::_weight_int8pack_mm", "int4": "aten::_weight_int4pack_mm_for_cpu"}

# (format, whose kernel, on what) -> largest M that the kernel should get; beyond, unpacking is as fast or faster at one
# of two shapes, [9728, 896] and [896, 4864]. One core's own time, `python tests/benchmarks/weight_kernels.py`.
# AVX2: AMD Zen 3, torch 2.13.0, 2026-11-23. AVX512 (x in fp32) and bf16 (AVX512 with products in bf16): AMD Zen 4,
# torch 2.13.0, 2026-11-25; at [9728, 896] kernel / unpacking, ms: int8 M = 16: 1.93 / 3.33, M = 32: 5.53 / 4.88; int4
# M = 256: 22.3 / 23.9, M = 1024: 94.0 / 88.5.
_MAX_ROWS: dict[tuple[str, str, str], int] = {
    ("int8", "codesign", "AVX2"): 128,
    ("int4", "codesign", "AVX2"): 1024,
    ("int8", "codesign", "AVX512"): 256,
    ("int4", "codesign", "AVX512"): 128,
    ("int8", "codesign", "bf16"): 16,
    ("int4", "codesign", "bf16"): 256,
    ("int8", "aten", "AVX2"): 12,
    ("int4", "aten", "AVX2"): 64,
    ("int8", "aten", "AVX512"): 16,
    ("int4", "aten", "AVX512"): 128,
}


@dataclasses.dataclass(frozen=True)
class FewRows:
    """Attributes:
    max_rows: largest M for the kernel; 0 where there is none that beats unpacking at M = 1.
    compiled: our compiled kernel, or None for ATen's.
    """

    name: str
    max_rows: int
    compiled: PackedMatmul | None = None
    note: str = ""

    def describe(self, dense: str) -> str:
        """What runs, by M; `dense` is what runs beyond `max_rows`."""
        if self.max_rows == 0:
            return f"{dense}{self.note}"
        return f"{self.name} (M<={self.max_rows}{self.note}), {dense}"


NO_KERNEL = FewRows("", 0)


def choose(name: str, *, dtype: torch.dtype, device: torch.device, out_features: int = 0) -> FewRows:
    """The kernel of weight format `name` for activations of `dtype`.

    Ours for every float dtype where it could be compiled and takes the shape; ATen's for bf16, the one dtype it has
    vector code for on x86 (its scalar loop loses to unpacking at every M); none elsewhere.
    """
    if device.type != "cpu":
        return FewRows(_ATEN_NAMES[name], 0)
    kernel = packed_matmul.load()
    if isinstance(kernel, Missing):
        note = f"; ours: {kernel.reason}"
    elif name == "int4" and out_features % int4_layout.block_rows():
        note = f"; ours: outputs not a multiple of {int4_layout.block_rows()}"
    else:
        is_bf16 = kernel.bf16_library is not None and dtype == torch.bfloat16
        where = "bf16" if is_bf16 else cpu.capability()
        suffix = "_bf16" if is_bf16 else ""
        return FewRows(f"codesign::{name}_matmul{suffix}", _MAX_ROWS[name, "codesign", where], kernel)
    most = _MAX_ROWS.get((name, "aten", cpu.capability()), 0) if dtype == torch.bfloat16 else 0
    return FewRows(_ATEN_NAMES[name], most, note=note)

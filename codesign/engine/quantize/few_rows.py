"""Which kernel multiplies few rows of x with packed weights here, and up to how many rows it should.

From some M on, unpacking a slice of the weight and multiplying densely wins. Where that is was measured once and is
written down below: a table and not a calibration at build time, because two trials of one configuration must run the
same kernels, or their difference means nothing, and a calibration on a busy machine decides by noise. `describe` goes
into the record, with the reason where a slower kernel had to stand in.

On CUDA the kernels are ours in Triton, for every format here. Up to where they should run is a guess there that nobody
has measured: 64 rows, where 4-bit weights stop being free on an A100, and 16 in fp32, which tensor cores do not
multiply.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch

from codesign.engine.kernels import packed_matmul
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kernels.packed_matmul import PackedMatmul
from codesign.engine.kernels.triton import available
from codesign.engine.quantize import cpu, int4_layout

if TYPE_CHECKING:
    from codesign.engine.kernels.triton.matmul import TritonMatmul

_ATEN_NAMES = {"int8": "aten::_weight_int8pack_mm", "int4": "aten::_weight_int4pack_mm_for_cpu"}

# (format, whose kernel, on what) -> largest M that the kernel should get beside unpacking, and beside a dense copy of
# the weight; beyond, the other is as fast or faster at one of two shapes, [9728, 896] and [896, 4864]. One core's own
# time, `python tests/benchmarks/weight_kernels.py`.
# AVX2: AMD Zen 3, torch 2.13.0, 2026-11-23. AVX512 (x in fp32) and bf16 (AVX512 with products in bf16): AMD Zen 4,
# torch 2.13.0, 2026-11-25; at [9728, 896] kernel / unpacking / dense, ms: int8 M = 16: 1.93 / 3.33 / 1.80, M = 32:
# 5.53 / 4.88 / 3.02; int4 M = 16: 1.42 / 7.58 / 1.80, M = 256: 22.3 / 23.9 / 20.7, M = 1024: 94.0 / 88.5 / 84.3.
_MAX_ROWS: dict[tuple[str, str, str], tuple[int, int]] = {
    ("int8", "codesign", "AVX2"): (128, 1),
    ("int4", "codesign", "AVX2"): (1024, 16),
    ("int8", "codesign", "AVX512"): (256, 256),
    ("int4", "codesign", "AVX512"): (128, 128),
    ("int8", "codesign", "bf16"): (16, 1),
    ("int4", "codesign", "bf16"): (256, 16),
    ("int8", "aten", "AVX2"): (12, 1),
    ("int4", "aten", "AVX2"): (64, 2),
    ("int8", "aten", "AVX512"): (16, 0),
    ("int4", "aten", "AVX512"): (128, 1),
}
_TRITON_NAMES = {"int8": "w8a16", "int4": "w4a16", "int3": "w3a16", "int2": "w2a16", "nf4": "nf4"}
_TRITON_MAX_ROWS = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 16}  # not measured
_TRITON_GROUP_SIZES = (16, 32, 64, 128, 256)
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclasses.dataclass(frozen=True)
class FewRows:
    """Attributes:
    max_rows: largest M for the kernel; 0 where there is none that beats unpacking at M = 1.
    max_rows_beside_dense: the same where a dense copy of the weight is held too.
    compiled: our compiled kernel, triton: our Triton kernels; both None for ATen's.
    """

    name: str
    max_rows: int
    max_rows_beside_dense: int = 0
    compiled: PackedMatmul | None = None
    triton: "TritonMatmul | None" = None
    note: str = ""

    def describe(self, dense: str) -> str:
        """What runs, by M; `dense` is what runs beyond `max_rows`."""
        if self.max_rows == 0:
            return f"{dense}{self.note}"
        return f"{self.name} (M<={self.max_rows}{self.note}), {dense}"


NO_KERNEL = FewRows("", 0)


def choose_cpu(name: str, *, dtype: torch.dtype, out_features: int) -> FewRows:
    """The CPU's kernel of int8, or of int4 in ATen's order (`int4_layout.py`), for activations of `dtype`.

    Ours for every float dtype where it could be compiled and takes the shape; ATen's for bf16, the one dtype it has
    vector code for on x86 (its scalar loop loses to unpacking at every M).
    """
    kernel = packed_matmul.load()
    if isinstance(kernel, Missing):
        note = f"; ours: {kernel.reason}"
    elif name == "int4" and out_features % int4_layout.block_rows():
        note = f"; ours: outputs not a multiple of {int4_layout.block_rows()}"
    else:
        is_bf16 = kernel.bf16_library is not None and dtype == torch.bfloat16
        where = "bf16" if is_bf16 else cpu.capability()
        suffix = "_bf16" if is_bf16 else ""
        return FewRows(f"codesign::{name}_matmul{suffix}", *_MAX_ROWS[name, "codesign", where], kernel)
    most = _MAX_ROWS.get((name, "aten", cpu.capability()), (0, 0)) if dtype == torch.bfloat16 else (0, 0)
    return FewRows(_ATEN_NAMES[name], *most, note=note)


def choose_triton(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    out_features: int,
    in_features: int,
    group_size: int | None = None,
) -> FewRows:
    """The Triton kernel of int8, of nf4 or of codes in the order of `bit_packed.py`, for activations of `dtype`.

    None on the CPU, which is no reason to record.

    Args:
        group_size: inputs that share a scale; None for a whole row.
    """
    if not available.is_target(device):
        return NO_KERNEL
    if name not in _TRITON_NAMES:
        return FewRows("", 0, note=f"; triton: no kernel for {name}")
    if group_size is not None and group_size not in _TRITON_GROUP_SIZES:
        return FewRows("", 0, note=f"; triton: groups of {group_size}, not of {_TRITON_GROUP_SIZES}")
    if (missing := available.missing(device)) is not None:
        return FewRows("", 0, note=f"; triton: {missing.reason}")
    from codesign.engine.kernels.triton.configs import Problem, plan
    from codesign.engine.kernels.triton.matmul import TritonMatmul  # needs triton, which not every machine has

    problem = Problem(_TRITON_NAMES[name], _DTYPE_NAMES[dtype], out_features, in_features, group_size)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    most = _TRITON_MAX_ROWS[dtype]
    planned = plan(problem, max_rows=most, device_name=where)
    note = f", a guess; {planned.note}"
    return FewRows(f"triton::{problem.kernel}", most, most, triton=TritonMatmul(planned), note=note)

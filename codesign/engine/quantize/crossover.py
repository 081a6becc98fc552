"""From how many rows of x on, unpacking the weight beats ATen's weight-only kernel: measured once, written down.

A table and not a calibration at build time: two trials of one configuration must run the same kernels, or their
difference means nothing, and a calibration on a busy machine would decide by noise. A trial records what ran.
"""

from codesign.engine.quantize import cpu

# (format, ATen capability) -> largest M that the kernel should get; for bf16 activations, the one dtype that ATen has
# vector code for on x86.
# AVX2:   AMD Zen 3, 2 cores, torch 2.13.0, [896, 4864], [9728, 896] and [1152, 896], 2026-11-23,
#         `python tests/benchmarks/weight_kernels.py`.
# AVX512: from one run on a 2-core Xeon with AMX, 8192 x 8192: the kernel takes 12-13 ms at M = 16 and 200-260 ms at
#         M = 256, the bf16 product 4.4 and 28 ms; unpacking was not measured there.
_KERNEL_MAX_ROWS = {
    ("int8", "AVX2"): 8,
    ("int4", "AVX2"): 24,
    ("int8", "AVX512"): 16,
    ("int4", "AVX512"): 32,
}


def kernel_max_rows(name: str) -> int:
    """0 where ATen has no vector code for this CPU: its scalar loop loses at every M."""
    return _KERNEL_MAX_ROWS.get((name, cpu.capability()), 0)

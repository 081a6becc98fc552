"""What this CPU multiplies well: asked of torch once per question, never guessed from a name."""

import functools

import torch


def capability() -> str:
    """The instruction set that ATen's own kernels were chosen for: "AVX2", "AVX512", "DEFAULT", ..."""
    return torch.backends.cpu.get_cpu_capability()


@functools.cache
def multiplies_natively(dtype: torch.dtype) -> bool:
    """Whether matrix products in this dtype run on instructions for it (AMX, AVX-512 BF16/FP16, or ARM's).

    Elsewhere ATen computes a 16-bit product of M rows as M matrix-vector products: on two Zen 3 cores without bf16
    instructions, [M, 896] x [896, 9728] takes 2.2 ms at M = 1 and 66 ms at M = 32 on one core, where fp32 takes 14.
    """
    if dtype == torch.float32:
        return True
    if torch._C._has_mkldnn and capability().startswith("AVX"):
        if dtype == torch.bfloat16:
            return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.cpu._is_amx_fp16_supported()
    return not capability().startswith("AVX") and capability() != "DEFAULT"


@functools.cache
def has_half_packed_kernel() -> bool:
    """Whether FBGEMM's product of fp32 activations with packed fp16 weights is in this build of torch."""
    return (
        "fbgemm" in torch.backends.quantized.supported_engines
        and capability().startswith("AVX")
        and hasattr(torch.ops.quantized, "linear_prepack_fp16")
        and hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    )

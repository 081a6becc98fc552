"""Whether kernels written in Triton run on a device: asked once per process, answered by trying them out.

With TRITON_INTERPRET=1 in the environment Triton interprets its kernels on the CPU, slowly: then CPU tensors take the
way of CUDA tensors throughout, which is how that way is tested where there is no GPU.
"""

import functools
import os
import subprocess

import torch

from codesign.engine.kernels.compiled import Missing

MIN_CAPABILITY = (8, 0)  # bf16 products


def is_target(device: torch.device) -> bool:
    """Whether weights on this device are laid out for Triton kernels, be they there or not."""
    return device.type == "cuda" or is_interpreted()


def is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")  # as triton reads it


def missing(device: torch.device) -> Missing | None:
    """Why the kernels do not run on `device`, in words for a record; None where they do."""
    if not is_target(device):
        return Missing(f"no kernels for {device.type}")
    return _missing(device)


def missing_attention(device: torch.device) -> Missing | None:
    """The same for attention over a KV cache."""
    if not is_target(device):
        return Missing(f"its kernels are for CUDA, and here is {device.type} (TRITON_INTERPRET=1 interprets them)")
    return _missing(device) or _missing_attention(device)


@functools.cache
def _missing(device: torch.device) -> Missing | None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return Missing(f"needs compute capability {'.'.join(map(str, MIN_CAPABILITY))}")
    try:
        import triton
    except ImportError:
        return Missing("the package triton is not installed")
    from codesign.engine.kernels.triton.configs import Config
    from codesign.engine.kernels.triton.w8a16 import w8a16

    x = torch.arange(64.0, device=device).view(2, 32) / 64
    codes = (torch.arange(64 * 32, device=device).view(64, 32) % 251 - 125).to(torch.int8)
    try:  # it needs a driver that takes its PTX and a C compiler for its launcher
        y = w8a16(x, codes, torch.ones(64, device=device), config=Config(block_m=16, block_n=32, block_k=32, split_k=2))
    except (triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return Missing(f"{type(error).__name__}: {str(error).strip()[:200]}")
    if not torch.allclose(y.double(), x.double() @ codes.double().t(), rtol=1e-5, atol=1e-3):
        return Missing("the kernel gives wrong products on this device")
    return None


@functools.cache
def _missing_attention(device: torch.device) -> Missing | None:
    import triton

    from codesign.engine.kernels.triton.attend import attend

    query = torch.arange(64.0, device=device).view(1, 2, 2, 16) / 64
    rows = (torch.arange(2 * 40 * 16, device=device).view(1, 2, 40, 16) % 13 - 6) / 8
    counts = torch.tensor([40], dtype=torch.int32, device=device)
    try:
        out, columns = attend(query, (rows,), (rows,), counts=counts, scale=0.5, want_columns=True)
    except (triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return Missing(f"{type(error).__name__}: {str(error).strip()[:200]}")
    weights = (query.double() @ rows.double().mT * 0.5).softmax(dim=-1)
    is_right = torch.allclose(out.double(), weights @ rows.double(), rtol=1e-5, atol=1e-5)
    assert columns is not None
    if not is_right or not torch.allclose(columns.double(), weights.mean(2, keepdim=True), rtol=1e-5, atol=1e-6):
        return Missing("the kernel attends wrongly on this device")
    return None

"""What a process holds: freed memory back to the operating system, and what the CUDA allocator has.

glibc keeps freed blocks of up to 32 MiB for itself. After packing a model layer by layer that is hundreds of MiB, which
would be counted as memory of the configuration.
"""

import contextlib
import ctypes
import sys
from pathlib import Path

import torch


def return_freed_memory() -> None:
    """Does nothing where the C library is not glibc."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def reset_peak_memory() -> None:
    """Makes the process's peak of resident memory (VmHWM) what is resident now; does nothing where that cannot be."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def device_memory(device: torch.device) -> dict[str, int]:
    """The CUDA allocator's own figures of this process, in bytes; none on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "device_peak_bytes": torch.cuda.max_memory_allocated(device),
        "device_peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        "device_bytes": torch.cuda.memory_allocated(device),
    }

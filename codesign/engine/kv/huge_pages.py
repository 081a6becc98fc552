"""Rows of a CPU on pages of 2 MiB, where the kernel gives them to who asks (transparent huge pages, "madvise").

A decode step reads every row once. On pages of 4 KiB each 16 rows of a head of 128 in bf16 wait for an address to be
translated, in a virtual machine twice over, and what is fetched ahead waits as well. Attention over 1 GiB of rows, EPYC
(Zen 4) in a virtual machine, one thread: 45 ps a byte on huge pages, 57 on small ones.
"""

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
# Planes of whole pages would else begin with one: 48 ps a byte instead of 45.
_OFFSET_BYTES = 64


def huge_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU. What pages lie below them is up to the kernel: a wish, no promise.

    Memory of its own, not of the allocator, which may hand out small pages that were in use before. It is given back
    with the tensor.

    Raises:
        MemoryError: there is none.
    """
    size = torch.Size(shape)
    if size.numel() * dtype.itemsize < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    num_bytes = size.numel() * dtype.itemsize + _OFFSET_BYTES
    whole = (num_bytes + HUGE_PAGE_BYTES - 1) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES  # what the kernel aligns
    try:
        memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {whole} bytes of KV rows: {error.strerror}") from error
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    rows = torch.frombuffer(memory, dtype=dtype, count=size.numel(), offset=_OFFSET_BYTES).view(size)
    return rows.zero_()  # the first to touch it: memory is there from now on

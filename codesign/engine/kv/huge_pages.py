"""Rows of a CPU on pages of 2 MiB, where the kernel gives them to who asks (transparent huge pages, "madvise").

Decode reads every row once a step, so on pages of 4 KiB each sixteenth row of a head of 128 in bf16 waits for an
address to be translated, in a virtual machine twice over. On an EPYC (Zen 4) in a virtual machine, one thread and
attention over 1 GiB of rows that start anywhere: 48 ps a byte on huge pages, 60 on small ones.
"""

import ctypes
import functools
import mmap

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20


def huge_zeros(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU. What the whole huge pages among them get is up to the kernel: bytes and results are the same."""
    rows = torch.empty(shape, dtype=dtype)
    first = -rows.data_ptr() % HUGE_PAGE_BYTES
    count = (rows.nbytes - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    advise = _madvise()
    if count > 0 and advise is not None:
        # A kernel without huge pages refuses, which is no error: it was a wish.
        advise(rows.data_ptr() + first, count, mmap.MADV_HUGEPAGE)
    return rows.zero_()  # the first to touch them


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux has it
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise

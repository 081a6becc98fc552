"""C kernels of our own: built by the machine's C compiler when first wanted, kept by content, never required.

    load("packed_matmul") -> ctypes.CDLL | Missing("why")

A library is named after its source, the headers beside it, flags and compiler, so that a stale one is never loaded. It
shares the OpenMP threads of torch: both ask for libgomp.so.1, and the loader gives the second the first's.
"""

import ctypes
import dataclasses
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from codesign.engine.caches import cache_folder

_FLAGS = ("-O3", "-fno-math-errno", "-mavx2", "-mfma", "-mf16c", "-fopenmp", "-shared", "-fPIC")
# What ATen's own kernels were chosen for -> flags beside those above: never more than this processor has.
_CAPABILITY_FLAGS: dict[str, tuple[str, ...]] = {
    "AVX2": (),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"),
}
# Instructions that some of those processors have besides.
_EXTRA_FLAGS: dict[str, Callable[[], bool]] = {
    "-mavx512bf16": torch.cpu._is_avx512_bf16_supported,
    "-mavx512vnni": torch.cpu._is_vnni_supported,
}
_TIMEOUT_S = 60


@dataclasses.dataclass(frozen=True)
class Missing:
    """Why there is no compiled kernel here, in words for a record."""

    reason: str


@functools.cache
def load(stem: str) -> ctypes.CDLL | Missing:
    """The shared library of `<stem>.c` beside this file. Tried once per process; a miss says why."""
    if os.environ.get("CODESIGN_COMPILED_KERNELS") == "0":
        return Missing("switched off by CODESIGN_COMPILED_KERNELS=0")
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _CAPABILITY_FLAGS:
        return Missing(f"written for {' and '.join(_CAPABILITY_FLAGS)}, ATen runs {capability}")
    flags = (*_FLAGS, *_CAPABILITY_FLAGS[capability])
    if capability == "AVX512":
        flags += tuple(flag for flag, is_supported in _EXTRA_FLAGS.items() if is_supported())
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return Missing("no C compiler (gcc) on this machine")
    try:
        return ctypes.CDLL(str(_build(Path(__file__).with_name(f"{stem}.c"), compiler, flags)))
    except subprocess.CalledProcessError as error:
        return Missing(f"{compiler} failed: {error.stderr.decode(errors='replace').strip()[:200]}")
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # RuntimeError: no home directory
        return Missing(f"{type(error).__name__}: {error}")


def _build(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """Path of the library, compiled now unless it is kept from before."""
    real = Path(compiler).resolve()
    made_by = f"{real} {real.stat().st_size} {real.stat().st_mtime_ns} {' '.join(flags)}"
    headers = b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.h")))
    digest = hashlib.sha256(source.read_bytes() + headers + made_by.encode()).hexdigest()[:16]
    folder = cache_folder("kernels")
    target = folder / f"{source.stem}-{digest}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        built = Path(scratch) / target.name
        subprocess.run(
            [compiler, *flags, "-o", str(built), str(source)], capture_output=True, check=True, timeout=_TIMEOUT_S
        )
        built.replace(target)  # whole or not at all, whoever else builds it at the same time
    return target


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """To the tensor's first value; the caller keeps the tensor."""
    return ctypes.c_void_p(tensor.data_ptr())


def longs(sizes: Iterable[int]) -> tuple[ctypes.c_long, ...]:
    """Sizes as C takes them."""
    return tuple(map(ctypes.c_long, sizes))

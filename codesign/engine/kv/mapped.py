"""Memory for rows that do not lie on the device: of a mapped file, or pinned. Given back with its last tensor.

A file never has a name where the filesystem can do that, and loses it at once elsewhere: the kernel frees it when the
last mapping goes, whichever way the process ends.
"""

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path

import torch

from codesign.errors import Unsupported
from codesign.units import format_bytes

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_IN_MEMORY = {"tmpfs", "ramfs"}
_MOUNTS = Path("/proc/self/mountinfo")


def scratch_folder() -> Path:
    """$TMPDIR, by default /var/tmp: unlike /tmp that is on a disk."""
    return Path(os.environ.get("TMPDIR") or "/var/tmp")


def file_memory(num_bytes: int) -> mmap.mmap:
    """Zeros, shared with a file in the scratch folder whose blocks are already there: a full disk is met here.

    Raises:
        Unsupported: the folder cannot be written, lies in memory, or has no room.
    """
    folder = scratch_folder()
    try:
        kind = _filesystem(folder)
        if kind in _IN_MEMORY:
            raise Unsupported(
                f"kv.place 'offload': {folder} is a {kind}, whose files lie in memory; set TMPDIR to a folder on "
                "a disk, or use kv.place 'device'"
            )
        with tempfile.TemporaryFile(dir=folder, prefix="codesign-kv-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
            return mmap.mmap(file.fileno(), num_bytes)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise Unsupported(
                f"kv.place 'offload': no file can be mapped in {folder} ({error.strerror}); set TMPDIR to a folder "
                "on a disk, or use kv.place 'device'"
            ) from error
        needed, free = format_bytes(num_bytes), format_bytes(shutil.disk_usage(folder).free)
        raise Unsupported(
            f"kv.place 'offload': {folder} has no room for {needed} of KV rows ({free} free); set TMPDIR to a "
            "folder on another disk, or lower max_batch_size, max_model_len or kv_memory_bytes"
        ) from error


def _filesystem(folder: Path) -> str | None:
    """Its type as mountinfo says it; None where it says nothing of this device."""
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text().splitlines():
        mount, _, rest = line.partition(" - ")
        if mount.split()[2] == number:
            return rest.split()[0]
    return None


class _Pinned(mmap.mmap):
    """Anonymous memory that CUDA copies from and to without a detour."""

    address = 0

    def __del__(self) -> None:
        if self.address:
            torch.cuda.cudart().cudaHostUnregister(self.address)  # type: ignore[no-untyped-call]


def pinned_memory(num_bytes: int) -> mmap.mmap:
    """Zeros, registered with CUDA.

    Not `pin_memory`, whose allocator rounds up to a power of two, keeps what is freed, and takes pages from the driver,
    where the process's resident memory need not count them.

    Raises:
        Unsupported: so much memory cannot be pinned.
    """
    try:
        memory = _Pinned(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise Unsupported(f"kv.place 'offload': {_unpinned(num_bytes)} ({error.strerror})") from error
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    status = int(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))  # type: ignore[no-untyped-call]
    if status:
        raise Unsupported(f"kv.place 'offload': {_unpinned(num_bytes)} (CUDA error {status})")
    memory.address = address
    return memory


def _unpinned(num_bytes: int) -> str:
    return (
        f"{format_bytes(num_bytes)} of host memory cannot be pinned; lower max_batch_size, max_model_len or "
        "kv_memory_bytes"
    )

"""Writing a file so that a reader sees the old content or the new, never a part, also after a crash or a full disk.

temporary file beside it -> write -> fsync -> rename -> fsync of the folder
"""

import contextlib
import errno
import os
import stat
from pathlib import Path

from codesign.errors import WorkError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "the file would be larger than this process may write (ulimit -f)",
    errno.EROFS: "the file system is read-only: choose another folder with --out",
    errno.EACCES: "no permission: choose another folder with --out",
    errno.EPERM: "no permission: choose another folder with --out",
    errno.EIO: "the disk reports an error: check it, then run the same command again",
    errno.ELOOP: "a symbolic link stands there; remove it",
}


def write_file(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Puts `data` at `path`, durably and in one piece; a file that was there is replaced.

    Args:
        is_durable: False leaves the fsyncs out: in one piece for readers, but after a power cut perhaps empty.
    Raises:
        WorkError: it could not be written; what was there before is unchanged unless the text says otherwise.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _write_new(temporary, data, is_durable)
        os.rename(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise work_error("cannot write", path, error) from error
    if is_durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises WorkError."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise work_error("cannot make durable", folder, error) from error


def read_file(path: Path, *, max_bytes: int) -> bytes:
    """The content of a regular file, never through a symbolic link.

    Raises:
        WorkError: it is not such a file, is larger than `max_bytes`, or cannot be read.
    """
    try:
        # Without O_NONBLOCK opening a named pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise WorkError(f"{path}: not a regular file")
            with os.fdopen(descriptor, "rb", closefd=False) as stream:
                data = stream.read(max_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise work_error("cannot read", path, error) from error
    if len(data) > max_bytes:
        raise WorkError(f"{path}: larger than {max_bytes} bytes")
    return data


def work_error(action: str, path: Path, error: OSError) -> WorkError:
    """What happened and what to do, in one sentence."""
    advice = _ADVICE.get(error.errno or 0)
    return WorkError(f"{action} {path}: {error.strerror or error}" + (f"; {advice}" if advice else ""))


def _write_new(path: Path, data: bytes, is_durable: bool) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o644)
    except FileExistsError:  # left by a process of the same number that was killed
        os.unlink(path)
        descriptor = os.open(path, flags, 0o644)
    try:
        left = memoryview(data)
        while left:
            written = os.write(descriptor, left)
            if written == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            left = left[written:]
        if is_durable:
            os.fsync(descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
    os.close(descriptor)

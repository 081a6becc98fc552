"""Opening a file that a person named: only a regular one, without waiting for a pipe, every trouble an InputError."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from codesign.errors import InputError


@contextmanager
def open_regular(path: Path, *, wanted: str, suffixes: tuple[str, ...] = ()) -> Iterator[BinaryIO]:
    """The file, open for reading.

    Args:
        wanted: what it should be, for messages, e.g. "a YAML file".
        suffixes: files of the folder with one of these are named when this one is not there.

    Raises:
        InputError: there is no such regular file, or it cannot be opened or read.
    """
    try:
        # Without O_NONBLOCK opening a named pipe would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise InputError(f"no such file{_near(path, suffixes)}", file=_shown(path)) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"cannot be read: {reason}", file=_shown(path)) from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise InputError(f"is {kind}; {wanted} is needed", file=_shown(path))
        with os.fdopen(descriptor, "rb", closefd=False) as stream:
            yield stream
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=_shown(path)) from None
    finally:
        os.close(descriptor)


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() else repr(text)


def _near(path: Path, suffixes: tuple[str, ...]) -> str:
    try:
        names = [item.name for item in path.parent.iterdir() if item.suffix in suffixes]
    except OSError:
        return ""
    return f" (in that folder: {', '.join(sorted(names)[:20])})" if names else ""

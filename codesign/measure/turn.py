"""Taking turns: while one worker's speed is timed on a processor, the others of this machine do no work.

    with turn.busy(): build            any number at once, never beside a timing window
    with turn.alone(): warm up, load   one at a time

Workers have cores of their own, but the memory and its bandwidth are shared, and decoding is bound by bandwidth: two
windows at once would each measure the other. Where it was measured that they do not (`search/overlap.py`), windows may
overlap; they still wait for those of workers that may not. GPUs share nothing of that kind, so on CUDA nobody waits.

The lock is the kernel's, on a file of this machine's memory, so it ends with its holder, however that ends. A holder
that is stopped (Ctrl-Z) in its window keeps the others waiting; they say so.
"""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from codesign.errors import WorkError

_MEMORY = Path("/dev/shm")


class Turn:
    """Args:
    name: workers of one machine and user that give the same name take turns; None: there are no others.
    overlap: what was measured of that, for the record; None where nothing was.
    may_overlap: whether a window may be beside work and windows of others that may too.
    """

    def __init__(
        self, name: str | None = None, *, may_overlap: bool = False, overlap: Mapping[str, Any] | None = None
    ) -> None:
        self.may_overlap, self.overlap = may_overlap, overlap
        self._file = None if name is None else open_lock(f"{name}.turn")

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Work that disturbs a timing window, and is not timed itself."""
        with self._held(fcntl.LOCK_SH, lambda: None):
            yield

    @contextlib.contextmanager
    def alone(self, say_waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
        """A timing window.

        Args:
            say_waiting: called when it is not our turn yet.
        """
        with self._held(fcntl.LOCK_SH if self.may_overlap else fcntl.LOCK_EX, say_waiting):
            yield

    @contextlib.contextmanager
    def _held(self, kind: int, say_waiting: Callable[[], None]) -> Iterator[None]:
        if self._file is None:
            yield
            return
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            say_waiting()
            fcntl.flock(self._file, kind)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)


def open_lock(name: str) -> int:
    """A descriptor of this user's lock file of this name on this machine.

    Raises:
        WorkError: it is somebody else's, or cannot be made.
    """
    folder = _MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())
    path = folder / f"codesign-{os.getuid()}-{name}"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise WorkError(f"{path}: cannot be opened ({error.strerror}); workers take turns by it") from None
    if os.fstat(file).st_uid != os.getuid():
        os.close(file)
        raise WorkError(f"{path}: belongs to another user; remove it, workers take turns by it")
    return file

"""Ctrl-C, and SIGTERM from a scheduler: the first asks, the second insists.

The first one raises KeyboardInterrupt where the study waits for a measurement; anywhere else (a record on its way to
the disk, the report) it is kept until the study looks. The second ends the process at once; a study survives that as it
survives a kill -9, and the children die with their parent.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Attributes:
    signal_number: of the first signal that came, or 0.
    """

    def __init__(self) -> None:
        self.signal_number = 0
        self._may_raise = False

    @property
    def exit_status(self) -> int:
        """128 + signal number, as a shell reports it: 130 for Ctrl-C."""
        return 128 + self.signal_number

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handles the signals for as long as the block runs."""
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that the first signal leaves with KeyboardInterrupt."""
        self._may_raise = True
        try:
            if self.signal_number:
                raise KeyboardInterrupt
            yield
        finally:
            self._may_raise = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number:
            os._exit(128 + number)
        self.signal_number = number
        if self._may_raise:
            raise KeyboardInterrupt

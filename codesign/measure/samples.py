"""Samples: what was seen over a window of unknown length, at most so many readings, spread evenly over it.

When it is full every second reading goes, and from then on only every second turn is read: 1 1 1 1, 2 2, 4 4 ...
"""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Samples(Generic[T]):
    """Args:
    most: readings kept, an even number.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: list[T] = []
        self._num_turns, self._stride = 0, 1

    def turn(self, read: Callable[[], T]) -> None:
        """Reads where this turn counts."""
        if self._num_turns % self._stride == 0:
            if len(self._kept) == self._most:
                self._kept, self._stride = self._kept[::2], 2 * self._stride
            if self._num_turns % self._stride == 0:
                self._kept.append(read())
        self._num_turns += 1

    def take(self) -> list[T]:
        """The readings since the last call, the oldest first."""
        found, self._kept = self._kept, []
        self._num_turns, self._stride = 0, 1
        return found

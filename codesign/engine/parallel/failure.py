"""How ranks fail, and how rank 0 says it. Needs no torch: the process that watches the engine imports it."""

import signal
import traceback
from typing import NoReturn

from codesign.errors import CodesignError, InputError, NumericalError, Unsupported


class Disconnected(RuntimeError):
    """Another rank cannot be reached; why is known there, or to who started it."""


class RankDied(RuntimeError):
    """A signal ended a rank. `number`: which."""

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number = rank, number
        super().__init__(f"rank {rank} was ended by {signal.Signals(number).name}")


_MAX_CHARS = 8000  # a pipe holds a report whole, so nobody has to read while it is written

# What a rank reports is one of these words and a text; rank 0 raises the same again.
_KINDS: dict[str, type[Exception]] = {
    "memory": MemoryError,
    "unsupported": Unsupported,
    "numerical": NumericalError,
    "other": RuntimeError,
}


def report_of(error: BaseException) -> dict[str, str]:
    """Plain data that says what ended a rank."""
    if isinstance(error, MemoryError):
        kind = "memory"
    elif isinstance(error, NumericalError):
        kind = "numerical"
    else:
        kind = "unsupported" if isinstance(error, Unsupported | InputError) else "other"
    is_for_people = kind != "other" or isinstance(error, CodesignError)
    detail = str(error) if is_for_people else "".join(traceback.format_exception(error))
    return {"kind": kind, "detail": detail[-_MAX_CHARS:]}


def raise_report(rank: int, report: dict[str, str]) -> NoReturn:
    """Raises what a rank reported, as if it had happened here. Out-of-memory errors of torch keep their text."""
    raise _KINDS[report["kind"]](f"rank {rank}: {report['detail']}")

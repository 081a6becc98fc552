"""Why a trial ended: from the child's exception, or from how its process ended, to one of the outcome kinds.

    the child says so        -> its own typed report, if it is one that a child may make
    else the process ended   -> by a signal from outside (kernel OOM killer or not), by its own fault, or in silence

The parent's clocks (`hang`), the channel's rules (`protocol`) and a dead nursery (`harness`) are judged where they
are seen.
"""

import dataclasses
import signal
import traceback
from typing import Any, get_args

from codesign.errors import CodesignError, InputError, Unsupported
from codesign.results.record import Outcome, OutcomeKind

# What a child may say of itself; the rest is for the parent to find out.
REPORTABLE: frozenset[str] = frozenset({"oom", "unsupported", "numerical", "cuda_fatal", "crashed"})
MAX_DETAIL_CHARS = 4000

# A process raises these in itself; every other signal comes from outside.
_OWN_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGSYS,
    signal.SIGTRAP,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exit:
    """How a process ended, as the kernel told its parent.

    Attributes:
        status: exit status, or None when a signal ended it.
        signal: number of that signal, else None.
        peak_rss_bytes: the most that it ever held resident.
    """

    status: int | None
    signal: int | None
    peak_rss_bytes: int = 0


def outcome_of_exit(end: Exit, *, kernel_oom_kills: int) -> Outcome:
    """The outcome of a child that ended by itself, without a report.

    Args:
        kernel_oom_kills: how many processes the kernel's OOM killer took while the session was open. The child asks to
            be its first victim (oom_score_adj 1000), so a SIGKILL in that time is the killer's.
    """
    if end.signal is None:
        return Outcome(kind="crashed", detail=f"exited with status {end.status} without a result")
    name = signal.Signals(end.signal).name if end.signal in _SIGNALS else f"signal {end.signal}"
    if end.signal == signal.SIGKILL and kernel_oom_kills > 0:
        return Outcome(kind="oom", detail="killed by the kernel's OOM killer")
    if end.signal in _OWN_FAULTS:
        return Outcome(kind="crashed", detail=f"ended by {name}")
    return Outcome(kind="killed_by_os", detail=f"ended by {name}, which this study did not send")


def outcome_of_exception(error: BaseException) -> Outcome:
    """What a child reports for an exception that ended its work."""
    kind = _kind(error)
    if kind == "crashed":
        detail = "".join(traceback.format_exception(error))
    elif isinstance(error, CodesignError):
        detail = str(error)  # written for people
    else:
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Outcome(kind=kind, detail=detail[-MAX_DETAIL_CHARS:])


def _kind(error: BaseException) -> OutcomeKind:
    # torch's classes by name, so that a child that never imported torch can be judged too
    names = {cls.__name__ for cls in type(error).__mro__}
    text = str(error).lower()
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return "oom"
    if isinstance(error, OSError) and error.errno == 12:  # ENOMEM: mmap of a weights file
        return "oom"
    if isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY):
        return "oom"
    if "AcceleratorError" in names or (isinstance(error, RuntimeError) and any(sign in text for sign in _CUDA_FATAL)):
        return "cuda_fatal"
    if "NumericalError" in names or isinstance(error, FloatingPointError):
        return "numerical"
    if isinstance(error, Unsupported | InputError):
        return "unsupported"
    return "crashed"


_SIGNALS = {int(number) for number in signal.Signals}
_OUT_OF_MEMORY = ("can't allocate memory", "cannot allocate memory", "out of memory", "std::bad_alloc", "alloc_failed")
_CUDA_FATAL = ("cuda error", "cublas_status", "cudnn_status", "device-side assert", "nccl error")


def printable(text: str) -> str:
    """The text without what could steer a terminal; line ends and tabs stay."""
    return "".join(char if char.isprintable() or char in "\n\t" else "\ufffd" for char in text)


def reported_outcome(message: dict[str, Any]) -> Outcome | None:
    """The outcome in a child's `failed` message, or None when a child may not say that."""
    kind, detail = message.get("kind"), message.get("detail")
    if not isinstance(kind, str) or kind not in REPORTABLE or not isinstance(detail, str):
        return None
    assert kind in get_args(OutcomeKind)
    return Outcome(kind=kind, detail=detail[-MAX_DETAIL_CHARS:])  # type: ignore[arg-type]  # just checked

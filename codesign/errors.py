"""Errors a person can meet, and the exit status each one leads to.

    CodesignError
    ├── InputError     2  what a person wrote is wrong: file, key, what is allowed, the nearest known name
    ├── Unsupported    2  well-formed, but this machine, model, target or combination cannot do it
    └── WorkError      1  the work was started and failed: what happened, what to do
        └── NumericalError   the engine computed NaN or infinity where a number must be

Bugs of our own are not in this tree; they keep their traceback.
"""

import difflib
from collections.abc import Iterable


class CodesignError(Exception):
    """Something to tell a person in one message, without a traceback."""

    exit_status = 1


class InputError(CodesignError):
    """A file, key, flag or value is wrong.

    The text reads `file: key: message; did you mean 'x'? (known: a, b, c)`.

    Args:
        message: what is wrong, and what is allowed.
        file: path as the person wrote it.
        key: dotted path of the key inside the file.
        got: the unknown name, when the mistake is a name.
        known: the names that are allowed there.

    Attributes:
        message: the text without file and key, so that a caller who knows the place can say it again.
    """

    exit_status = 2

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        key: str | None = None,
        got: str | None = None,
        known: Iterable[str] = (),
    ) -> None:
        names = sorted(known)
        if got is not None and names:
            near = nearest(got, names)
            message += f"; did you mean {near!r}?" if near else ""
            message += f" (known: {', '.join(names)})"
        self.message = message
        self.file, self.key = (str(file) if file is not None else None), key
        super().__init__(": ".join(part for part in (self.file, key, message) if part))


class Unsupported(CodesignError):
    """The request makes sense but cannot be done here; the text names the nearest thing that can."""

    exit_status = 2


class WorkError(CodesignError):
    """The work was started and failed; the text says what to do next."""


class NumericalError(WorkError):
    """The engine computed NaN or infinity; the configuration is at fault, not the machine."""


def shown(value: object) -> str:
    """What a person wrote, for a message: short, escaped, in YAML's words."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(got: str, known: Iterable[str]) -> str | None:
    """The known name most like `got`, whatever its case, or None when none is close."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(got.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[matches[0]] if matches else None

"""Values out of a config.json that somebody else wrote: typed, bounded, and refused with file and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codesign.errors import InputError

MAX_JSON_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: unreadable, too large, not JSON, nested too deep, NaN or infinity, or not an object.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"is larger than {MAX_JSON_BYTES} bytes", file=path)
        found = json.loads(path.read_bytes().decode("utf-8"), parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", file=path) from error
    except RecursionError as error:
        raise InputError("is nested too deep", file=path) from error
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"is not JSON: {error}", file=path) from error
    if not isinstance(found, dict):
        raise InputError(f"must hold an object, holds {type(found).__name__}", file=path)
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


class ConfigValues:
    """Reads keys of one mapping; a key that is null counts as absent.

    Args:
        values: the mapping.
        file: what to name in errors.
        prefix: dotted path of the mapping inside the file.
    """

    def __init__(self, values: Mapping[str, Any], *, file: object = None, prefix: str = "") -> None:
        self._values, self.file, self._prefix = values, file, prefix

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def mentions(self, key: str) -> bool:
        """Whether the key is there at all, be it null."""
        return key in self._values

    def error(self, key: str, message: str) -> InputError:
        return InputError(message, file=self.file, key=f"{self._prefix}{key}")

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 2**24) -> int:
        value = self._given(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"must be a whole number from {low} to {high}, got {_short(value)}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float, high: float) -> float:
        value = self._given(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}, got {_short(value)}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"must be true or false, got {_short(value)}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {_short(value)}")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of strings, empty when absent."""
        value = self._values.get(key) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, f"must be a list of strings, got {_short(value)}")
        return value

    def inner(self, key: str) -> "ConfigValues | None":
        """The mapping below `key`, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, f"must be an object, got {_short(value)}")
        return ConfigValues(value, file=self.file, prefix=f"{self._prefix}{key}.")

    def mapping(self, key: str) -> "ConfigValues":
        """The mapping below `key`, which must be there."""
        found = self.inner(key)
        if found is None:
            raise self.error(key, "is missing")
        return found

    def keys(self) -> list[str]:
        return [str(key) for key in self._values]

    def _given(self, key: str, default: Any) -> Any:
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        return value


def _short(value: object) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a number beyond 64 bits"
    return text if len(text) <= 60 else f"{text[:57]}..."

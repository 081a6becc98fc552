"""What a child may say, checked for type and range before anybody uses it."""

from collections.abc import Mapping
from typing import Any, get_args

from codesign.measure.channel import ProtocolFault
from codesign.measure.kv_use import KVUse
from codesign.measure.session import BuildFacts
from codesign.spec.request import FinishReason

_MAX_BYTES = 2**50
_MAX_COUNT = 2**50
_MAX_SECONDS = 1e6
_MAX_ENTRIES = 1000
_FINISH_REASONS = frozenset(("", *get_args(FinishReason)))


def step_tokens(message: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """(request_id, token_id, finish_reason) of every token of one step."""
    tokens = message.get("tokens")
    if not isinstance(tokens, list):
        raise ProtocolFault("a step without a list of tokens")
    for entry in tokens:
        if not (isinstance(entry, list) and [type(item) for item in entry] == [str, int, str]):
            raise ProtocolFault(f"not a token: {ascii(entry)[:80]}")
        if not (0 <= entry[1] < 2**31 and entry[2] in _FINISH_REASONS):
            raise ProtocolFault(f"not a token: {ascii(entry)[:80]}")
    return [(request_id, token_id, finish_reason) for request_id, token_id, finish_reason in tokens]


def build_facts(message: Mapping[str, Any]) -> BuildFacts:
    facts = message.get("facts")
    if not isinstance(facts, dict) or facts.keys() != {"resolved", "bytes", "kernels", "phases"}:
        raise ProtocolFault(f"facts must hold resolved, bytes, kernels and phases, not {ascii(facts)[:80]}")
    resolved, sizes, kernels, phases = (_mapping(facts, key) for key in ("resolved", "bytes", "kernels", "phases"))
    for part, kernel in kernels.items():
        if not isinstance(kernel, str):
            raise ProtocolFault(f"kernels.{part!a} is not a name")
    return BuildFacts(
        resolved=resolved,
        bytes={part: _size(value, f"bytes.{part}") for part, value in sizes.items()},
        kernels=kernels,
        phases={phase: _seconds(value, f"phases.{phase}") for phase, value in phases.items()},
    )


def sizes(message: Mapping[str, Any]) -> dict[str, int]:
    """The byte counts of a `memory` message."""
    return {key: _size(value, key) for key, value in message.items() if key != "event"}


def speculation(message: Mapping[str, Any]) -> dict[str, Any]:
    """What became of drafts, for the record."""
    return _mapping(message, "stats")


def counts(message: Mapping[str, Any]) -> dict[str, int]:
    """The counters of a `stats` message."""
    found = _mapping(message, "stats")
    for name, value in found.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_COUNT:
            raise ProtocolFault(f"stats.{name!a} is not a count: {ascii(value)[:80]}")
    return found


def kv_use(message: Mapping[str, Any]) -> list[KVUse]:
    """The readings of a `kv_use` message."""
    readings = message.get("readings")
    if not isinstance(readings, list) or len(readings) > _MAX_ENTRIES:
        raise ProtocolFault(f"readings must be a list of at most {_MAX_ENTRIES} entries")
    found = []
    for reading in readings:
        if not (isinstance(reading, list) and [type(item) for item in reading] == [int] * 4):
            raise ProtocolFault(f"not a reading of a cache: {ascii(reading)[:80]}")
        own = KVUse(*reading)
        has_rows = 0 <= own.rows_used <= own.rows_allocated <= _MAX_COUNT
        if not (has_rows and 0 <= own.blocks_used <= own.rows_allocated and 0 <= own.shared_bytes <= _MAX_BYTES):
            raise ProtocolFault(f"not a reading of a cache: {ascii(reading)[:80]}")
        found.append(own)
    return found


def scores(message: Mapping[str, Any]) -> dict[str, Any]:
    """The quality numbers; what stands in them is for measure.quality to judge."""
    return _mapping(message, "scores")


def _mapping(plain: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = plain.get(key)
    if not isinstance(value, dict) or len(value) > _MAX_ENTRIES:
        raise ProtocolFault(f"{key} must be an object of at most {_MAX_ENTRIES} entries")
    return value


def _size(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_BYTES:
        raise ProtocolFault(f"{key!a} is not a number of bytes: {ascii(value)[:80]}")
    return value


def _seconds(value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProtocolFault(f"{key!a} is not a number of seconds: {ascii(value)[:80]}")
    if not 0 <= value <= _MAX_SECONDS:  # false for NaN too
        raise ProtocolFault(f"{key!a} is not a number of seconds: {ascii(value)[:80]}")
    return float(value)

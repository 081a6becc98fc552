"""The one YAML loader: what a person writes, read by the YAML 1.2 core rules and inside fixed bounds.

PyYAML's own loaders follow YAML 1.1, where `2:4` is 124, `on` is true and `1e-4` is a string; they also build Python
objects, expand aliases without end and keep the last of two equal keys. So only its scanner and parser are used; the
events become plain values here:

    true false          booleans (no other spelling)        null ~ and nothing    None
    12 -3 0o17 0x1F     int, within 64 bits                 1.5 1e-4 1e5 .5       float, finite
    everything else     str                                 mapping keys          always str, each once

Refused, with file and line: any tag, a second document, `.inf` and `.nan`, aliases that add more than 100 nodes, depth
over 32, more than 5,000 values or 128 KiB (PyYAML's plain-Python scanner stays under a second there), bytes that
are not UTF-8, control characters in text.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from codesign.errors import InputError
from codesign.spec.regular_file import open_regular

MAX_BYTES = 128 * 1024
MAX_NODES = 5_000
MAX_DEPTH = 32
MAX_ALIASED_NODES = 100

Key = tuple[str | int, ...]

_NULL = re.compile(r"null|Null|NULL|~|")
_BOOL = re.compile(r"true|false")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Document:
    """Plain data with the place where each key stands.

    Attributes:
        value: dicts, lists and scalars.
        places: key path -> "file:line".
        file: path as the person wrote it.
    """

    value: Any
    places: Mapping[Key, str]
    file: str

    def error(self, message: str, key: Key = (), *, got: str | None = None, known: tuple[str, ...] = ()) -> InputError:
        """An InputError at the line of `key`, or of the nearest key above it that is there."""
        return InputError(message, file=self.place(key), key=dotted(key) or None, got=got, known=known)

    def place(self, key: Key) -> str:
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.file)

    def at(self, key: Key) -> Any:
        """The value that stands at `key`; KeyError or IndexError when there is none."""
        value = self.value
        for part in key:
            value = value[part]
        return value


def dotted(key: Key) -> str:
    """`("memory", 0, "gib")` -> `memory[0].gib`; odd characters are shown escaped."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            shown = part if part.isprintable() and len(part) <= 80 else repr(part[:80])
            text += f".{shown}" if text else shown
    return text


def load_yaml(path: str | Path) -> Document:
    """Reads one file.

    Raises:
        InputError: there is no such regular file, it cannot be read, or `parse_yaml` refuses it.
    """
    with open_regular(Path(path), wanted="a YAML file", suffixes=(".yaml", ".yml")) as stream:
        data = stream.read(MAX_BYTES + 1)
    return parse_yaml(data, file=str(path))


def parse_yaml(data: bytes | str, *, file: str = "<text>") -> Document:
    """Reads YAML text.

    Raises:
        InputError: anything that the rules above refuse; names file and line.
    """
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    if len(raw) > MAX_BYTES:
        raise InputError(f"is larger than {MAX_BYTES // 1024} KiB, the most that is read", file=file)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(f"is not UTF-8 text (byte 0x{raw[error.start]:02x})", file=f"{file}:{line}") from None
    control = _CONTROL.search(text.replace("\r\n", "\n"))
    if control:
        line = text.count("\n", 0, control.start()) + 1
        raise InputError(f"holds the control character {control[0]!r}; is this a text file?", file=f"{file}:{line}")
    try:
        return _Builder(text, file).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "not YAML"
        if "'\\t'" in problem:
            problem = "a tab cannot indent or start a value in YAML; use spaces"
        where = f"{file}:{mark.line + 1}" if mark else file
        raise InputError(
            f"not YAML: {problem}" + (f" ({error.context})" if error.context else ""), file=where
        ) from None
    except yaml.YAMLError as error:
        raise InputError(f"not YAML: {str(error).splitlines()[0]}", file=file) from None
    except (ValueError, OverflowError, IndexError) as error:
        # PyYAML's scanner lets these out for escapes like "\U00110000" and for odd directives.
        raise InputError(f"not YAML: {error}", file=file) from None


@dataclasses.dataclass(frozen=True)
class _Node:
    """A finished value with what an alias to it would cost."""

    value: Any
    num_nodes: int
    depth: int


class _Builder:
    """Turns PyYAML's events into a Document, counting as it goes."""

    def __init__(self, text: str, file: str) -> None:
        self._events = yaml.parse(text, Loader=yaml.SafeLoader)
        self._file = file
        self._places: dict[Key, str] = {}
        self._anchors: dict[str, _Node | None] = {}  # None while the anchored node is still open
        self._num_nodes = 0
        self._num_aliased = 0

    def document(self) -> Document:
        value: Any = None
        self._next(StreamStartEvent)
        event = next(self._events)
        if not isinstance(event, StreamEndEvent):
            assert isinstance(event, DocumentStartEvent)
            if event.tags:
                raise self._error(event, "tags are not allowed")
            if event.version and event.version != (1, 2):
                raise self._error(event, "is read by the rules of YAML 1.2; remove the %YAML line")
            value = self._node(next(self._events), ()).value
            next(self._events)  # document end
            event = next(self._events)
            if not isinstance(event, StreamEndEvent):
                raise self._error(event, "holds more than one document (a second `---`); only one is allowed")
        return Document(value, self._places, self._file)

    def _next(self, kind: type[Event]) -> Event:
        event = next(self._events)
        assert isinstance(event, kind), event
        return event

    def _line(self, event: Event) -> str:
        assert event.start_mark is not None  # only events that nobody parsed have none
        return f"{self._file}:{event.start_mark.line + 1}"

    def _error(self, event: Event, message: str, key: Key = ()) -> InputError:
        return InputError(message, file=self._line(event), key=dotted(key) or None)

    def _node(self, event: Event, key: Key) -> _Node:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise self._error(event, f"has more than {MAX_NODES} values")
        if len(key) > MAX_DEPTH:
            raise self._error(event, f"is nested deeper than {MAX_DEPTH} levels")
        self._places.setdefault(key, self._line(event))
        if isinstance(event, AliasEvent):
            return self._alias(event, key)
        assert isinstance(event, ScalarEvent | SequenceStartEvent | MappingStartEvent)
        if event.tag is not None:
            raise self._error(event, f"tags such as {event.tag[:60]!r} are not allowed; quote the value instead", key)
        if event.anchor:
            if event.anchor in self._anchors:
                raise self._error(event, f"anchor {event.anchor[:60]!r} is defined twice", key)
            self._anchors[event.anchor] = None
        before = self._num_nodes
        if isinstance(event, ScalarEvent):
            value, depth = self._scalar(event, key), 0
        elif isinstance(event, SequenceStartEvent):
            value, depth = self._sequence(key)
        else:
            value, depth = self._mapping(key)
        node = _Node(value, self._num_nodes - before + 1, depth)
        if event.anchor:
            self._anchors[event.anchor] = node
        return node

    def _alias(self, event: AliasEvent, key: Key) -> _Node:
        assert event.anchor is not None
        if event.anchor not in self._anchors:
            raise self._error(event, f"alias *{event.anchor[:60]} has no anchor above it", key)
        node = self._anchors[event.anchor]
        if node is None:
            raise self._error(event, f"alias *{event.anchor[:60]} contains itself", key)
        self._num_aliased += node.num_nodes
        if self._num_aliased > MAX_ALIASED_NODES:
            raise self._error(event, f"aliases stand for more than {MAX_ALIASED_NODES} values; write them out", key)
        if len(key) + node.depth > MAX_DEPTH:
            raise self._error(event, f"is nested deeper than {MAX_DEPTH} levels", key)
        self._num_nodes += node.num_nodes - 1
        return node

    def _sequence(self, key: Key) -> tuple[list[Any], int]:
        items: list[Any] = []
        depth = 0
        while not isinstance(event := next(self._events), SequenceEndEvent):
            node = self._node(event, (*key, len(items)))
            items.append(node.value)
            depth = max(depth, node.depth)
        return items, depth + 1

    def _mapping(self, key: Key) -> tuple[dict[str, Any], int]:
        items: dict[str, Any] = {}
        depth = 0
        while not isinstance(event := next(self._events), MappingEndEvent):
            if not isinstance(event, ScalarEvent) or event.tag is not None or event.anchor:
                raise self._error(event, "a key must be a plain name", key)
            name = self._scalar(event, key)
            if not isinstance(name, str):
                raise self._error(event, f"the key {event.value[:60]!r} must be a name, not {_noun(name)}", key)
            if name in items:
                first = self._places[(*key, name)].rpartition(":")[2]
                raise self._error(event, f"stands here and in line {first}; a key is given once", (*key, name))
            self._places[(*key, name)] = self._line(event)
            node = self._node(next(self._events), (*key, name))
            items[name] = node.value
            depth = max(depth, node.depth)
        return items, depth + 1

    def _scalar(self, event: ScalarEvent, key: Key) -> Any:
        text: str = event.value
        control = _CONTROL.search(text)
        if control:
            raise self._error(event, f"the control character {control[0]!r} is not allowed in text", key)
        try:
            return resolve_scalar(text) if event.implicit[0] else text
        except ValueError as error:
            raise self._error(event, str(error), key) from None


def resolve_scalar(text: str) -> Any:
    """The value of an unquoted scalar by the table on top. Raises ValueError for numbers out of bounds."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text == "true"
    if _INT.fullmatch(text):
        # int() of very long digit strings is refused by Python itself, with a message about Python.
        number = int(text, 0 if text[:2] in ("0o", "0x") else 10) if len(text) <= 24 else 2**64
        if not -(2**63) <= number < 2**63:
            raise ValueError(f"the number {_short(text)} is out of range (64 bits)")
        return number
    if _FLOAT.fullmatch(text):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"the number {_short(text)} is out of range")
        return value
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"{text} is not allowed; numbers must be finite")
    return text


def _short(text: str) -> str:
    return text if len(text) <= 30 else f"{text[:27]}..."


def _noun(value: Any) -> str:
    return "nothing" if value is None else "a boolean" if isinstance(value, bool) else "a number"


class _Dumper(yaml.SafeDumper):
    """Quotes by the rules of `resolve_scalar`, so that what is written reads back equal."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012  PyYAML's own declaration

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern in (("null", _NULL), ("bool", _BOOL), ("int", _INT), ("float", _FLOAT), ("float", _NOT_FINITE)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern.pattern})\Z"), None)


def dump_yaml(value: Any) -> str:
    """Plain data as YAML that `parse_yaml` reads back equal.

    Raises:
        ValueError: something that is not plain, finite data, or text that the loader would refuse.
    """
    _check_plain(value)
    return str(
        yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)
    )


def _check_plain(value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"a key must be a string, got {key!r}")
            _check_plain(key)
            _check_plain(item)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item)
    elif isinstance(value, str):
        if _CONTROL.search(value):
            raise ValueError(f"control characters cannot be written: {value!r}")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError("numbers must be finite")
    elif isinstance(value, int):  # bool too
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"the number {value} is out of range (64 bits)")
    elif value is not None:
        raise ValueError(f"not plain data: {type(value).__name__}")

"""Channel: JSON lines over one end of a socketpair; the other end may be hostile.

    {"event":"step","tokens":[["r0",17,""]]}        one object per line, and nothing else

JSON and never pickle: reading a line can cost time and memory, both bounded here, but it can never run code. A
`ProtocolFault` is: a line over the limit, text that is not UTF-8 or not JSON, anything but an object, NaN and infinity
(`1e999` is one too), integers of more than 20 digits, lone surrogates, nesting deeper than 32. Half a line before the
end is kept as `half_line`: whether it is a lie or a death in mid-sentence, the exit of the process tells.
"""

import collections
import json
import socket
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from codesign.units import MIB

MAX_DEPTH = 32
_CHUNK_BYTES = 64 * 1024
_MAX_DIGITS = 20


class ProtocolFault(Exception):
    """The other end broke the rules of the channel; the text says which one."""


class Channel:
    """Neither method blocks: wait on `fileno()` with a selector, also for writing while `has_unsent`.

    Args:
        end: a connected stream socket; the channel owns it from now on.
        max_line_bytes: longest line taken from the other end.
    """

    def __init__(self, end: socket.socket, *, max_line_bytes: int = MIB) -> None:
        end.setblocking(False)
        self._socket = end
        self._max_line_bytes = max_line_bytes
        self._inbox = bytearray()
        self._outbox = bytearray()
        self._fault: ProtocolFault | None = None
        self.is_ended = False
        self.half_line = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def has_unsent(self) -> bool:
        return bool(self._outbox)

    def send(self, message: Mapping[str, Any]) -> None:
        """Queues one message and sends what the socket takes now; `flush` sends the rest.

        Raises:
            ValueError: NaN or infinity in the message; nothing was queued.
        """
        self._outbox += _ENCODER.encode(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes now. When the other end is gone the rest is dropped: reading tells of it."""
        while self._outbox:
            try:
                sent = self._socket.send(self._outbox[: 16 * _CHUNK_BYTES])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self._outbox.clear()
                return
            del self._outbox[:sent]

    def receive(self) -> list[tuple[float, dict[str, Any]]]:
        """Messages completed by one chunk, each with the time (`perf_counter`, s) at which that chunk was read.

        Empty when nothing is there yet or the other end closed (`is_ended`).

        Raises:
            ProtocolFault: only after the good messages before the fault were handed out.
        """
        if self._fault is not None:
            raise self._fault
        try:
            chunk = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return []
        except ConnectionResetError:  # it closed without reading what we sent; what it sent before is lost with it
            chunk = b""
        time_s = time.perf_counter()
        if not chunk:
            self.is_ended = True
            self.half_line = bytes(self._inbox)
            return []
        messages: list[tuple[float, dict[str, Any]]] = []
        try:
            for line in self._lines(chunk):
                messages.append((time_s, decode(line)))
        except ProtocolFault as fault:
            self._fault = fault
            if not messages:
                raise
        return messages

    def _lines(self, chunk: bytes) -> collections.deque[bytes]:
        lines: collections.deque[bytes] = collections.deque()
        *complete, rest = chunk.split(b"\n")
        for part in complete:
            lines.append(bytes(self._inbox) + part if self._inbox else part)
            self._inbox.clear()
        self._inbox += rest
        for line in (*lines, self._inbox):
            if len(line) > self._max_line_bytes:
                raise ProtocolFault(f"a line is longer than {self._max_line_bytes} bytes")
        return lines


def decode(line: bytes) -> dict[str, Any]:
    """The object that a line holds. Raises ProtocolFault for everything named at the top of this file."""
    try:
        text = line.decode("utf-8")
        message = _DECODER.decode(text)
        if "\\" in text:  # an escaped lone surrogate would break whoever writes the text to a file later
            json.dumps(message, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ProtocolFault(f"not a JSON line ({type(error).__name__}: {shown(line)})") from None
    if not isinstance(message, dict):
        raise ProtocolFault(f"not a JSON object: {shown(line)}")
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH and _depth(message) > MAX_DEPTH:
        raise ProtocolFault(f"nested deeper than {MAX_DEPTH}: {shown(line)}")
    return message


def shown(line: bytes, num_bytes: int = 80) -> str:
    """The beginning of a hostile line, safe to print."""
    text = ascii(line[:num_bytes])[1:]
    return text + "..." if len(line) > num_bytes else text


def _refuse(token: str) -> NoReturn:
    raise ValueError(f"{token} is not a number")


def _finite(token: str) -> float:
    value = float(token)
    return value if abs(value) != float("inf") else _refuse(token)


def _short(token: str) -> int:
    # no count of ours needs more digits, and a larger one breaks whoever turns it into a float
    return int(token) if len(token) <= _MAX_DIGITS else _refuse(token[:40])


def _depth(value: Any) -> int:
    """Nesting of a parsed value; the parser's own recursion limit bounds ours."""
    deepest, level = 0, [value]
    while level and deepest <= MAX_DEPTH:
        deepest += 1
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(inner, dict | list)
        ]
    return deepest


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, parse_int=_short)

"""The channel believes nothing that its other end says, and neither side ever blocks."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codesign.measure.channel import MAX_DEPTH, Channel, ProtocolFault, decode


class Pair:
    """A channel and the raw socket of a hostile other end."""

    def __init__(self, max_line_bytes: int = 2**20) -> None:
        ours, self.raw = socket.socketpair()
        self.channel = Channel(ours, max_line_bytes=max_line_bytes)

    def close(self) -> None:
        self.channel.close()
        self.raw.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair(max_line_bytes=1000)
    yield pair
    pair.close()


def messages(pair: Pair) -> list[dict[str, Any]]:
    return [message for _, message in pair.channel.receive()]


def test_nothing_there_is_no_message_and_no_end(pair: Pair) -> None:
    assert pair.channel.receive() == []
    assert not pair.channel.is_ended


def test_lines_arrive_in_order_however_they_are_cut(pair: Pair) -> None:
    sent = [{"n": n, "text": "\u00e4\u2028\n"} for n in range(20)]
    data = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in sent).encode()
    got = []

    for start in range(0, len(data), 7):
        pair.raw.sendall(data[start : start + 7])
        got += messages(pair)

    assert got == sent


def test_each_message_has_the_time_at_which_its_last_chunk_was_read(pair: Pair) -> None:
    pair.raw.sendall(b'{"a":')
    assert pair.channel.receive() == []
    before = time.perf_counter()
    pair.raw.sendall(b'1}\n{"a":2}\n')

    (first, _), (second, _) = pair.channel.receive()

    assert before <= first == second <= time.perf_counter()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"null",
        b"[1]",
        b"12",
        b'"text"',
        b"{",
        b"{'a': 1}",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": 1} {"b": 2}',
        b'{"a": ' + b"1" * 5000 + b"}",
        b'{"a": ' + b"1" * 21 + b"}",
        b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
        b"\x80\x04\x95",
        b"\x00" * 100,
    ],
    ids=range(22),
)
def test_what_is_not_one_plain_json_object_is_a_fault(line: bytes) -> None:
    with pytest.raises(ProtocolFault) as fault:
        decode(line)

    assert len(str(fault.value)) < 500
    assert str(fault.value).isprintable()


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}",
        b'{"a": [' + b"[]," * 100 + b"[]]}",
        b'{"a": "\\ud83d\\ude00"}',
        b'{"a": 1e308, "b": -0.0}',
        b' {"a": "\\\\ud800"} \r',
    ],
)
def test_plain_json_objects_are_taken(line: bytes) -> None:
    assert decode(line) == json.loads(line)


@given(st.binary(max_size=300))
def test_random_bytes_are_a_fault_or_an_object(line: bytes) -> None:
    try:
        message = decode(line)
    except ProtocolFault:
        return

    json.dumps(message, allow_nan=False, ensure_ascii=False).encode()


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
        lambda inner: st.lists(inner),
        max_leaves=20,
    )
)
def test_what_one_channel_sends_the_other_receives(value: Any) -> None:
    one, other = socket.socketpair()
    sender, receiver = Channel(one), Channel(other)
    try:
        sender.send({"value": value})
        received = receiver.receive()
    finally:
        sender.close()
        receiver.close()

    assert [message for _, message in received] == [{"value": value}]


@pytest.mark.parametrize("ending", [b"", b"\n"])
def test_a_line_over_the_limit_is_a_fault_before_and_after_its_end(pair: Pair, ending: bytes) -> None:
    pair.raw.sendall(b'{"a":"' + b"x" * 1000 + b'"}' + ending)

    with pytest.raises(ProtocolFault, match="longer than 1000 bytes"):
        pair.channel.receive()


def test_a_line_of_exactly_the_limit_is_taken(pair: Pair) -> None:
    line = b'{"a":"' + b"x" * (1000 - 8) + b'"}'
    assert len(line) == 1000
    pair.raw.sendall(line + b"\n")

    assert messages(pair) == [{"a": "x" * 992}]


def test_good_messages_before_a_fault_are_handed_out_first(pair: Pair) -> None:
    pair.raw.sendall(b'{"n":1}\n{"n":2}\nnonsense\n{"n":3}\n')

    assert messages(pair) == [{"n": 1}, {"n": 2}]
    for _ in range(2):
        with pytest.raises(ProtocolFault, match="nonsense"):
            pair.channel.receive()


def test_the_end_in_the_middle_of_a_line_is_kept_for_judging(pair: Pair) -> None:
    pair.raw.sendall(b'{"n":1}\n{"n":')
    pair.raw.close()

    assert messages(pair) == [{"n": 1}]
    assert messages(pair) == []
    assert pair.channel.is_ended
    assert pair.channel.half_line == b'{"n":'


def test_sending_to_somebody_who_does_not_read_never_blocks(pair: Pair) -> None:
    message = {"data": "x" * 2**22}

    pair.channel.send(message)

    assert pair.channel.has_unsent
    received = bytearray()
    while pair.channel.has_unsent:
        received += pair.raw.recv(2**16)
        pair.channel.flush()
    while not received.endswith(b"\n"):
        received += pair.raw.recv(2**16)
    assert json.loads(received) == message


def test_sending_to_somebody_who_is_gone_is_no_error(pair: Pair) -> None:
    pair.raw.close()

    pair.channel.send({"n": 1})

    assert not pair.channel.has_unsent


def test_nan_is_not_sent(pair: Pair) -> None:
    with pytest.raises(ValueError, match="JSON"):
        pair.channel.send({"n": float("nan")})

    assert not pair.channel.has_unsent

"""Packets of JSON with descriptors, between a search process and its nursery: both ends are ours."""

import array
import json
import socket
from collections.abc import Mapping, Sequence
from typing import Any

_MAX_BYTES = 64 * 1024
_MAX_DESCRIPTORS = 2


def send_packet(control: socket.socket, message: Mapping[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Raises BrokenPipeError or ConnectionResetError when the other end is gone."""
    socket.send_fds(control, [json.dumps(message).encode()], list(descriptors))


def receive_packet(control: socket.socket, *, block: bool) -> tuple[dict[str, Any], list[int]] | None:
    """The next message and the descriptors with it (the caller closes them), or None when the other end is gone.

    `socket.recv_fds` of Python 3.11 drops its flags, so this asks for them itself.

    Raises:
        BlockingIOError: nothing is there and `block` is false.
    """
    descriptors = array.array("i")
    flags = socket.MSG_CMSG_CLOEXEC | (0 if block else socket.MSG_DONTWAIT)
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * descriptors.itemsize)
    try:
        packet, ancillary, _, _ = control.recvmsg(_MAX_BYTES, room, flags)
    except ConnectionResetError:
        return None
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % descriptors.itemsize])
    return (json.loads(packet), list(descriptors)) if packet else None

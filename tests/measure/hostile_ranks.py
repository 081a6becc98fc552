"""Engines one of whose other ranks fails, or takes much; children of the nursery import this by name."""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from codesign.engine import build
from codesign.engine.parallel.runner import RankRunner
from codesign.errors import Unsupported
from codesign.units import MIB

_TAKEN = 64 * MIB
_held: list[bytearray] = []


def _with(step: Callable[[], object]) -> Callable[..., Any]:
    """build_engine, with ranks other than 0 doing `step` instead of their third one. They are forks, so they see it."""

    def make(*arguments: Any, **named: Any) -> Any:
        original, count = RankRunner._replay, [0]

        def replay(self: RankRunner, plan: Any) -> Any:
            count[0] += 1
            if self._links.rank == 1 and count[0] == 3:
                step()
            return original(self, plan)

        RankRunner._replay = replay  # type: ignore[method-assign]
        return build.build_engine(*arguments, **named)

    return make


def _raise(error: Exception) -> Callable[[], object]:
    def step() -> None:
        raise error

    return step


def _unsupported_part(*_: object, **__: object) -> None:
    raise Unsupported("this part cannot be built")


def unsupported_in_build(*arguments: Any, **named: Any) -> Any:
    original, pid = build.build_decoder, os.getpid()

    def build_decoder(*own: Any, **how: Any) -> Any:
        return (original if os.getpid() == pid else _unsupported_part)(*own, **how)

    build.build_decoder = build_decoder
    return build.build_engine(*arguments, **named)


def _segfault() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGSEGV)


def _bomb() -> None:
    torch.zeros(2**48)


exception = _with(_raise(RuntimeError("a bug of ours")))
memory_error = _with(_raise(MemoryError()))
tensor_bomb = _with(_bomb)
segfault = _with(_segfault)
leaves = _with(lambda: os._exit(7))
hangs = _with(lambda: time.sleep(1000))
quits = _with(lambda: sys.exit(3))
takes_memory = _with(lambda: _held.append(bytearray(_TAKEN)))

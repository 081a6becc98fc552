"""Engines from hell. Each build function misbehaves at once or returns an engine that does so in its first step."""

import ctypes
import json
import os
import pickle
import signal
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fake_engine import FACTS, FakeEngine, Output

from codesign.errors import Unsupported
from codesign.spec.model import ModelSpec


class _InStep(FakeEngine):
    def __init__(self, behave: Callable[[], Any]) -> None:
        super().__init__()
        self._behave = behave

    def step(self) -> list[Output]:
        outputs = super().step()
        self._behave()
        return outputs


def channel() -> int:
    """The descriptor of the channel, which is the only socket that a child has."""
    (found,) = [int(name) for name in os.listdir("/proc/self/fd") if _is_socket(int(name))]
    return found


def _is_socket(descriptor: int) -> bool:
    try:
        return stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def write(data: bytes) -> None:
    """To the channel, all of it; ends in order when the parent closed the other end."""
    end = channel()
    os.set_blocking(end, True)
    view = memoryview(data)
    while view:
        view = view[os.write(end, view) :]


def forever() -> NoReturn:
    while True:
        time.sleep(1000)


# Memory.


def allocation_bomb(*_: Any, **__: Any) -> NoReturn:
    hoard = []
    while True:
        hoard.append(bytearray(16 * 2**20))


def small_allocation_bomb(*_: Any, **__: Any) -> NoReturn:
    """Down to the last page, so that hardly any is left for the report."""
    hoard = []
    while True:
        hoard.append(b"x" * (4000 + len(hoard) % 2))


def tensor_bomb(*_: Any, **__: Any) -> NoReturn:
    import torch  # here, so that a nursery for the other tests need not have it

    torch.ones(2**36)
    forever()


def bomb_in_step(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(allocation_bomb)


# Honest failures.


def unsupported(*_: Any, **__: Any) -> NoReturn:
    raise Unsupported("int3 needs a GPU; int4 does not")


class NumericalError(Exception):
    pass


def numerical(*_: Any, **__: Any) -> FakeEngine:
    def behave() -> NoReturn:
        raise NumericalError("NaN logits in step 1")

    return _InStep(behave)


def cuda_error(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def accelerator_error(*_: Any, **__: Any) -> NoReturn:
    import torch

    raise torch.AcceleratorError("device-side fault")


def cuda_out_of_memory(*_: Any, **__: Any) -> NoReturn:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def exception(*_: Any, **__: Any) -> NoReturn:
    raise KeyError("no_such_layer")


def terminal_escape(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError("\x1b[2J\x07 gone")


# Ending without a word.


def kills_itself(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: os.kill(os.getpid(), signal.SIGKILL))


def segfault(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: ctypes.string_at(0))


def aborts(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(os.abort)


def exits_with_0(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: os._exit(0))


def sys_exit(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: sys.exit(3))


# Not ending.


def hang_in_build(*_: Any, **__: Any) -> NoReturn:
    forever()


def hang(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(forever)


def busy_hang(*_: Any, **__: Any) -> FakeEngine:
    def spin() -> NoReturn:
        while True:
            pass

    return _InStep(spin)


def ignores_sigterm(*_: Any, **__: Any) -> FakeEngine:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return _InStep(forever)


def stops_itself(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hang_in_close(*_: Any, **__: Any) -> FakeEngine:
    engine = FakeEngine()
    engine.close = forever  # type: ignore[method-assign]
    return engine


def endless_steps(*_: Any, **__: Any) -> FakeEngine:
    """Steps that bring nothing look like progress; only the wall clock ends them."""
    engine = FakeEngine(step_s=0.001)
    engine.step = lambda: time.sleep(0.001) or []  # type: ignore[method-assign, assignment, return-value, func-returns-value]
    return engine


# Breaking the protocol.


def _writer(data: bytes) -> Callable[..., NoReturn]:
    def build(*_: Any, **__: Any) -> NoReturn:
        write(data)
        forever()

    return build


garbage = _writer(bytes(range(256)) * 4 + b"\n")
nan = _writer(b'{"event":"built","facts":NaN}\n')
infinity = _writer(b'{"event":"built","facts":1e999}\n')
huge_integer = _writer(b'{"event":"built","facts":' + b"9" * 100_000 + b"}\n")
depth_bomb = _writer(b'{"event":"built","facts":' + b"[" * 500_000 + b"]" * 500_000 + b"}\n")
not_an_object = _writer(b'["built"]\n')
invalid_utf8 = _writer(b'{"event":"\xff\xfe"}\n')
surrogate = _writer(b'{"event":"failed","kind":"crashed","detail":"\\ud800"}\n')
long_line = _writer(b'{"event":"' + b"x" * 10 * 2**20 + b'"}\n')
unknown_event = _writer(b'{"event":"promoted"}\n')
no_event = _writer(b"{}\n")
step_before_work = _writer(b'{"event":"step","tokens":[]}\n')
claims_ok = _writer(b'{"event":"failed","kind":"ok","detail":""}\n')
claims_harness = _writer(b'{"event":"failed","kind":"harness","detail":"not my fault"}\n')
wrong_facts = _writer(b'{"event":"built","facts":{"resolved":{},"bytes":{"kv":-1},"kernels":{},"phases":{}}}\n')
facts_of_wrong_type = _writer(
    b'{"event":"built","facts":{"resolved":{},"bytes":{"kv":true},"kernels":{},"phases":{}}}\n'
)


def flood_without_lines(*_: Any, **__: Any) -> NoReturn:
    while True:
        write(b"[" * 2**20)


def flood_of_lines(*_: Any, **__: Any) -> FakeEngine:
    """Well-formed steps without tokens, as fast as they go."""

    def behave() -> NoReturn:
        while True:
            write(b'{"event":"step","tokens":[]}\n' * 1000)

    return _InStep(behave)


class _Bomb:
    def __init__(self, marker: str) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self._marker),)


def pickle_bomb(model: ModelSpec, *_: Any, **__: Any) -> NoReturn:
    """Makes the file that the model is named after, if anybody unpickles it."""
    write(pickle.dumps(_Bomb(model.name), protocol=0) + b"\n")
    forever()


def half_a_line(*_: Any, **__: Any) -> NoReturn:
    write(b'{"event":"bui')
    os._exit(0)


def killed_in_mid_line(*_: Any, **__: Any) -> NoReturn:
    write(b'{"event":"bui')
    os.kill(os.getpid(), signal.SIGKILL)
    forever()


def closes_channel(*_: Any, **__: Any) -> NoReturn:
    os.close(channel())
    forever()


def _token(entry: list[Any]) -> Callable[..., FakeEngine]:
    line = json.dumps({"event": "step", "tokens": [entry]}).encode() + b"\n"
    return lambda *_, **__: _InStep(lambda: write(line))


forged_request = _token(["somebody else's", 1, ""])
forged_reason = _token(["r", 1, "promoted"])
negative_token = _token(["r", -1, ""])
boolean_token = _token(["r", True, ""])


def too_many_tokens(*_: Any, **__: Any) -> FakeEngine:
    engine = FakeEngine()
    engine.step = lambda: [Output("r", 1, "")]  # type: ignore[method-assign]
    return engine


def aborts_unasked(*_: Any, **__: Any) -> FakeEngine:
    return _InStep(lambda: write(b'{"event":"aborted","request_id":"r"}\n'))


# Noise.


def chatty(*_: Any, **__: Any) -> FakeEngine:
    for _step in range(64):
        os.write(2, b"warning: " * (2**20 // 9) + b"\n")
    return FakeEngine()


def endless_stderr(*_: Any, **__: Any) -> NoReturn:
    while True:
        os.write(2, b"warning: " * 1000 + b"\n")


# Leaving something behind.


def orphan(*_: Any, **__: Any) -> FakeEngine:
    """A grandchild in the same process group, its parent gone."""
    _orphan(detach=False)
    return FakeEngine()


def daemon(*_: Any, **__: Any) -> FakeEngine:
    """A grandchild in a session of its own, holding the channel and stderr."""
    _orphan(detach=True)
    return FakeEngine()


def daemon_and_segfault(*_: Any, **__: Any) -> FakeEngine:
    _orphan(detach=True)
    return segfault()


def family(*_: Any, **__: Any) -> FakeEngine:
    """Ten generations, each in a session of its own, all alive."""
    for _generation in range(10):
        if os.fork() != 0:
            break
        os.setsid()
    else:
        forever()
    if os.getpgrp() != os.getpid() or os.getppid() == 1:
        forever()
    if os.getsid(0) == os.getpid():  # a detached generation; the engine's process is no session leader
        forever()
    return FakeEngine()


def _orphan(*, detach: bool) -> None:
    pid = os.fork()
    if pid == 0:
        if detach:
            os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            forever()
        os._exit(0)
    os.waitpid(pid, 0)


# Attacking the nursery.


def kills_nursery(*_: Any, **__: Any) -> FakeEngine:
    def behave() -> NoReturn:
        os.kill(os.getppid(), signal.SIGKILL)
        forever()  # the kernel's signal to the orphan may come a few steps later

    return _InStep(behave)


def stops_nursery(*_: Any, **__: Any) -> FakeEngine:
    def behave() -> NoReturn:
        os.kill(os.getppid(), signal.SIGSTOP)
        forever()

    return _InStep(behave)


def nan_facts(*_: Any, **__: Any) -> FakeEngine:
    engine = FakeEngine()
    engine.facts = lambda: {**FACTS, "phases": {"load": float("nan")}}  # type: ignore[method-assign]
    return engine

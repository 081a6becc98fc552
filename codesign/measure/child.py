"""The process of one engine: takes commands, steps the engine while it has work, says one line per step.

    in   {"op":"build",...}  submit  abort  score  memory  speculation  stats  kv_use; the end of the channel: close
    out  {"event":"ready"} built  step  aborted  progress  scored  memory  speculation  stats  kv_use  failed

It believes its parent and is not believed by it. It runs in a fork of the nursery, so it ends by `os._exit`: nothing
that the nursery registered may run a second time.
"""

import faulthandler
import importlib
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from codesign.engine.parallel.failure import RankDied
from codesign.measure import linux
from codesign.measure.channel import Channel
from codesign.measure.memory import process_memory
from codesign.measure.samples import Samples
from codesign.measure.taxonomy import outcome_of_exception
from codesign.results.record import Outcome
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from codesign.units import MIB

MAX_COMMAND_BYTES = 256 * MIB
# Kept back from an engine that ran into its limit, so that the report of it still finds memory.
_REPORT_BYTES = 64 * MIB
_PROGRESS_S = 0.1
_MOST_READINGS = 512


class _Terminated(BaseException):
    """SIGTERM arrived: close in order."""


def run_child(end: socket.socket, stderr: int, *, nursery_pid: int, data_limit_bytes: int | None) -> NoReturn:
    """Everything between the fork and the end of the process. Never returns, whatever happens."""
    status = 1
    try:
        _settle(stderr, nursery_pid=nursery_pid, data_limit_bytes=data_limit_bytes)
        status = _Child(Channel(end, max_line_bytes=MAX_COMMAND_BYTES)).serve()
    except _Terminated:
        status = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # to stderr, whose tail goes into the outcome
    finally:
        os._exit(status)


def _settle(stderr: int, *, nursery_pid: int, data_limit_bytes: int | None) -> None:
    os.setpgid(0, 0)
    linux.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != nursery_pid:
        os._exit(1)
    os.dup2(stderr, 1)
    os.dup2(stderr, 2)
    os.close(stderr)
    Path("/proc/self/oom_score_adj").write_text("1000")  # if the kernel must kill, then this one
    memory = process_memory(os.getpid())
    if data_limit_bytes is not None and memory is not None:
        soft = memory.data_bytes + data_limit_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (soft, soft + _REPORT_BYTES))
    faulthandler.enable(2)
    faulthandler.register(signal.SIGUSR1, 2, all_threads=True)  # the parent asks a hanging child where it hangs
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT))


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: a second must not break the closing
    raise _Terminated


def _end_like(death: RankDied) -> NoReturn:
    """Ends this process by the signal that ended one of its engine's ranks: the parent judges by it, and by whether the
    kernel had to kill for memory meanwhile."""
    print(death, file=sys.stderr, flush=True)
    if death.number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(death.number, signal.SIG_DFL)
    os.kill(os.getpid(), death.number)
    raise death  # a signal that ends nobody by itself


class _Child:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._engine: Any = None
        self._score: Callable[..., Any] | None = None
        self._device = "cpu"
        self._has_blocks = False
        self._live: set[str] = set()
        self._aborted: set[str] = set()
        self._is_closing = False
        self._last_progress_s = 0.0
        self._kv_use = Samples[tuple[int, ...]](_MOST_READINGS)

    def serve(self) -> int:
        """The exit status: 0 closed in order, 1 failed and said so."""
        try:
            self._say({"event": "ready"})
            while not self._is_closing:
                self._take_commands(wait=self._engine is None or not self._engine.has_work)
                if not self._is_closing and self._engine is not None and self._engine.has_work:
                    self._step()
            return 0
        except RankDied as death:
            _end_like(death)
        except Exception as error:
            outcome = outcome_of_exception(error)
            _, hard = resource.getrlimit(resource.RLIMIT_DATA)
            resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
            error.__traceback__ = None  # lets go of what the failed frames hold
            self._report(outcome)
            return 1
        finally:
            if self._engine is not None:
                self._engine.close()

    def _report(self, outcome: Outcome) -> None:
        self._say({"event": "failed", "kind": outcome.kind, "detail": outcome.detail})

    def _say(self, message: Mapping[str, Any]) -> None:
        """Blocks until the parent has room for it."""
        self._channel.send(message)
        while self._channel.has_unsent:
            select.select([], [self._channel], [])
            self._channel.flush()

    def _take_commands(self, *, wait: bool) -> None:
        if wait:
            select.select([self._channel], [], [])
        for _, command in self._channel.receive():
            self._obey(command)
        if self._channel.is_ended:
            self._is_closing = True

    def _obey(self, command: dict[str, Any]) -> None:
        match command["op"]:
            case "build":
                self._build(command)
            case "submit":
                request = request_from_plain(command["request"])
                self._engine.submit(request)
                self._live.add(request.request_id)
                self._aborted.discard(request.request_id)  # the same id again is a new request
            case "abort":
                if command["request_id"] in self._live:  # else it finished while the command was on its way
                    self._live.remove(command["request_id"])
                    self._aborted.add(command["request_id"])
                    self._engine.abort(command["request_id"])
                self._say({"event": "aborted", "request_id": command["request_id"]})
            case "score":
                assert self._score is not None
                scores = self._score(self._engine, command["suite"], self._progress)
                self._say_numbers({"event": "scored", "scores": scores})
            case "memory":
                self._say({"event": "memory", **device_memory(self._device, self._engine)})
            case "speculation":
                self._say_numbers({"event": "speculation", "stats": self._engine.speculation_stats()})
            case "stats":
                self._say({"event": "stats", "stats": self._engine.stats()})
            case "kv_use":
                self._say({"event": "kv_use", "readings": self._kv_use.take()})
            case other:
                raise AssertionError(f"unknown command {other!r}")

    def _build(self, command: dict[str, Any]) -> None:
        self._device = command["device"]
        build, self._score = named(command["factory"]), named(command["quality"])
        self._engine = build(
            ModelSpec.from_dict(command["model"]),
            EngineConfig.from_dict(command["config"]),
            device=self._device,
            num_threads=command["num_threads"],
        )
        self._has_blocks = self._engine.kv_use() is not None
        self._say_numbers({"event": "built", "facts": self._engine.facts()})

    def _step(self) -> None:
        tokens = [
            (output.request_id, output.token_id, output.finish_reason)
            for output in self._engine.step()
            if output.request_id not in self._aborted
        ]
        self._live.difference_update(request_id for request_id, _, finish_reason in tokens if finish_reason)
        self._say({"event": "step", "tokens": tokens})
        if self._has_blocks:
            self._kv_use.turn(self._read_kv_use)

    def _read_kv_use(self) -> tuple[int, ...]:
        use = self._engine.kv_use()
        return use.blocks_used, use.rows_allocated, use.rows_used, use.shared_bytes

    def _progress(self, *_: object) -> None:
        """Handed to the quality suite: call it as often as convenient, at the latest each minute."""
        now = time.monotonic()
        if now - self._last_progress_s >= _PROGRESS_S:
            self._last_progress_s = now
            self._say({"event": "progress"})

    def _say_numbers(self, message: Mapping[str, Any]) -> None:
        try:
            self._say(message)
        except ValueError as error:
            raise FloatingPointError(f"NaN or infinity among the numbers of {message['event']!r}: {error}") from None


def named(dotted: str) -> Callable[..., Any]:
    """The function that "module:function" names. The name comes from our own code, never from YAML or a child."""
    module, _, function = dotted.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def request_from_plain(plain: Mapping[str, Any]) -> Request:
    sampling = {**plain["sampling"], "stop_token_ids": tuple(plain["sampling"]["stop_token_ids"])}
    return Request(
        request_id=plain["request_id"],
        prompt_token_ids=tuple(plain["prompt_token_ids"]),
        sampling=SamplingParams(**sampling),
    )


def device_memory(device: str, engine: Any) -> dict[str, int]:
    """The CUDA allocator's own figures in bytes, of all ranks, and how long the device of this one was busy since the
    last such message; on CPU nothing, since the parent reads the processes itself.
    """
    if not device.startswith("cuda"):
        return {}
    return {**engine.device_memory(), "device_busy_us": engine.device_busy_us()}

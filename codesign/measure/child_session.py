"""ChildSession: a Session whose engine runs in a forked child that is watched and not believed.

    nursery = Nursery()
    with ChildSession(nursery, model=model, limits=Limits(wall_s=300)) as session:
        facts = session.build(config)
        session.submit(request)
        events = session.poll(timeout_s=0.1)

Every wait is bounded by a clock of the parent. Whatever goes wrong, the child and all that it started are gone before
TrialFailed is raised, and every later call raises the same outcome.
"""

import dataclasses
import logging
import os
import select
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Self, TypeVar

from codesign.measure import linux, messages
from codesign.measure.channel import Channel, ProtocolFault, shown
from codesign.measure.kv_use import KVUse
from codesign.measure.memory import ProcessMemory, available_bytes, kernel_oom_kills, process_memory
from codesign.measure.nursery import Nursery
from codesign.measure.session import BuildFacts, TokenEvent, TrialFailed
from codesign.measure.taxonomy import outcome_of_exit, printable, reported_outcome
from codesign.results.record import Outcome, OutcomeKind
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request
from codesign.units import format_bytes

ENGINE = "codesign.engine.build:build_engine"
QUALITY = "codesign.measure.quality:run_suite"

T = TypeVar("T")

_log = logging.getLogger(__name__)
_STDERR_TAIL_BYTES = 4000
_LAST_WORDS_S = 2.0
_SHARE_OF_AVAILABLE = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The clocks and the memory of one session.

    Args:
        start_up_s: to fork and build.
        progress_s: longest silence while there is work; then it is a hang.
        wall_s: the whole session.
        grace_s: from asking the child to end to killing it.
        kill_s: from killing it to giving up on the nursery.
        memory_bytes: private memory that the child may take on CPU, beyond what it is born with; more is `oom`. None:
            0.9 of what the machine has to give. On CUDA there is no such limit, since it maps huge ranges.
    """

    start_up_s: float = 120.0
    progress_s: float = 60.0
    wall_s: float = 1800.0
    grace_s: float = 10.0
    kill_s: float = 10.0
    memory_bytes: int | None = None


class ChildSession:
    """Forks at once; raises TrialFailed (`harness`) when that cannot be done.

    Args:
        device: "cpu", "cuda" or "cuda:0".
        num_threads: of the engine's ops on CPU; None leaves it to the engine.
        engine, quality: "module:function" of build_engine and run_suite; given by code, never by YAML.

    Attributes:
        pid: of the child, for a monitor.
        spawn_s: what it took to have it.
    """

    def __init__(
        self,
        nursery: Nursery,
        *,
        model: ModelSpec,
        device: str = "cpu",
        num_threads: int | None = None,
        limits: Limits | None = None,
        engine: str = ENGINE,
        quality: str = QUALITY,
    ) -> None:
        self._limits = limits or Limits()
        if device != "cpu" and self._limits.memory_bytes is not None:
            raise ValueError(f"memory_bytes bounds the memory of a child on CPU, not on {device}")
        self._build_command = {
            "op": "build",
            "factory": engine,
            "quality": quality,
            "model": dataclasses.asdict(model),
            "device": device,
            "num_threads": num_threads,
        }
        self._device = device
        self._outcome: Outcome | None = None
        self._awaited = ""
        self._reply: dict[str, Any] | None = None
        self._events: list[TokenEvent] = []
        self._outstanding: dict[str, int] = {}  # request_id -> tokens that may still come
        self._aborting: set[str] = set()
        self._stderr_tail = b""
        self._is_stderr_ended = False
        self._left: list[int] = []
        self._oom_kills_before = kernel_oom_kills()
        self._is_open = False
        nursery.start()  # by its own clock: importing torch says nothing about the configuration
        started = time.perf_counter()
        self._heard_s = started
        self._wall_end_s = started + self._limits.wall_s
        self._open(nursery)
        self.spawn_s = time.perf_counter() - started

    def _open(self, nursery: Nursery) -> None:
        ours, theirs = socket.socketpair()
        self._stderr, stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(stderr, True)
        try:
            self._data_limit_bytes = self._data_limit()
            self._fork = nursery.fork(theirs.fileno(), stderr, data_limit_bytes=self._data_limit_bytes)
        except BaseException:
            ours.close()
            os.close(self._stderr)
            raise
        finally:
            theirs.close()
            os.close(stderr)
        self.pid = self._fork.pid
        self._channel = Channel(ours)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._channel, selectors.EVENT_READ, self._read_channel)
        self._selector.register(self._stderr, selectors.EVENT_READ, self._read_stderr)
        self._selector.register(self._fork, selectors.EVENT_READ, self._fork.pump)
        self._is_open = True
        try:
            self._await("ready", self._limits.start_up_s)
            self._at_birth = self._process_memory()
        except BaseException:  # interrupted: nobody else holds this session yet
            self.close()
            raise

    def _data_limit(self) -> int | None:
        if self._device != "cpu":
            return None
        if self._limits.memory_bytes is not None:
            return self._limits.memory_bytes
        return int(available_bytes() * _SHARE_OF_AVAILABLE)

    # What a session does.

    def build(self, config: EngineConfig) -> BuildFacts:
        self._send({**self._build_command, "config": config.to_dict()})
        return self._checked(messages.build_facts, self._await("built", self._limits.start_up_s))

    def submit(self, request: Request) -> None:
        if request.request_id in self._outstanding or request.request_id in self._aborting:
            raise ValueError(f"request {request.request_id!r} is already running")
        if not self._outstanding:
            self._heard_s = time.perf_counter()
        self._send({"op": "submit", "request": dataclasses.asdict(request)})
        self._outstanding[request.request_id] = request.sampling.max_tokens

    def abort(self, request_id: str) -> None:
        """Stops a request; its last event says "aborted" and has token_id -1. Nothing happens when it has finished."""
        if request_id in self._outstanding:
            self._aborting.add(request_id)
            self._send({"op": "abort", "request_id": request_id})

    def poll(self, timeout_s: float) -> Sequence[TokenEvent]:
        self._check_open()
        end_s = time.perf_counter() + timeout_s
        while True:
            now = time.perf_counter()
            hang_s = self._heard_s + self._limits.progress_s if self._outstanding else end_s
            self._turn(max(min(end_s, hang_s) - now, 0.0))
            if self._events:
                events, self._events = self._events, []
                return events
            now = time.perf_counter()
            if self._outstanding and now - self._heard_s > self._limits.progress_s:
                self._fail_hanging(f"no step for {self._limits.progress_s:g} s")
            if now >= end_s:
                return ()

    def score(self, suite: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._outstanding:
            raise ValueError(f"{len(self._outstanding)} requests are still running")
        self._send({"op": "score", "suite": dict(suite)})
        return self._checked(messages.scores, self._await("scored", self._limits.progress_s))

    def memory(self) -> Mapping[str, int]:
        """In bytes: `peak_memory_bytes` is the figure of the trial, by the CUDA allocators or, on CPU, the child's peak
        resident memory minus what it was born with; `host_peak_bytes` and `host_bytes` are the child process's. Other
        ranks of its engine are added everywhere, each at its own peak: they were born as the child was, before it had
        done anything.
        """
        self._check_open()
        ranks = [memory for pid in linux.children_of(self.pid) if (memory := process_memory(pid)) is not None]
        processes = [self._process_memory(), *ranks]
        host = {
            "host_peak_bytes": sum(memory.peak_rss_bytes - self._at_birth.peak_rss_bytes for memory in processes),
            "host_bytes": sum(memory.rss_bytes for memory in processes),
        }
        if self._device == "cpu":
            return {"peak_memory_bytes": host["host_peak_bytes"], **host}
        self._send({"op": "memory"})
        device = self._checked(messages.sizes, self._await("memory", self._limits.progress_s))
        return {"peak_memory_bytes": device.get("device_peak_bytes", 0), **device, **host}

    def speculation(self) -> Mapping[str, Any]:
        self._send({"op": "speculation"})
        return self._checked(messages.speculation, self._await("speculation", self._limits.progress_s))

    def stats(self) -> Mapping[str, int]:
        """Of a built engine that has nothing to do: counters since it was built, by its own word."""
        if self._outstanding:
            raise ValueError(f"{len(self._outstanding)} requests are still running")
        self._send({"op": "stats"})
        return self._checked(messages.counts, self._await("stats", self._limits.progress_s))

    def kv_use(self) -> Sequence[KVUse]:
        if self._outstanding:
            raise ValueError(f"{len(self._outstanding)} requests are still running")
        self._send({"op": "kv_use"})
        return self._checked(messages.kv_use, self._await("kv_use", self._limits.progress_s))

    def close(self) -> None:
        """Ends the child and waits until nothing of it is left. What had to be forced is logged, not raised."""
        if not self._is_open:
            return
        end = self._stop(ask_first=True)
        self._outcome = Outcome(kind="harness", detail="the session is closed")
        if end:
            _log.warning("closing the engine: %s", end)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Hearing the child.

    def _check_open(self) -> None:
        if self._outcome is not None:
            raise TrialFailed(self._outcome)

    def _send(self, command: Mapping[str, Any]) -> None:
        self._check_open()
        self._channel.send(command)

    def _await(self, event: str, seconds: float) -> dict[str, Any]:
        """The child's `event`, which may come now and not before; at most `seconds` after the last sign of life."""
        self._awaited, self._reply, self._heard_s = event, None, time.perf_counter()
        while self._reply is None:
            left = self._heard_s + seconds - time.perf_counter()
            if left <= 0:
                self._fail_hanging(f"not {event!r} within {seconds:g} s")
            self._turn(left)
        self._awaited = ""
        return self._reply

    def _turn(self, timeout_s: float) -> None:
        """Waits for something to read (or to be able to write) and handles it."""
        self._check_running()  # another session on the same nursery may have taken in the news
        wall_s = self._wall_end_s - time.perf_counter()
        if wall_s <= 0:
            self._fail_hanging(f"still not done after {self._limits.wall_s:g} s")
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._channel.has_unsent else 0)
        if self._selector.get_key(self._channel).events != wanted:
            self._selector.modify(self._channel, wanted, self._read_channel)
        for key, _ in self._selector.select(min(timeout_s, wall_s)):
            key.data()
        if self._is_stderr_ended and self._stderr in self._selector.get_map():
            self._selector.unregister(self._stderr)
        self._check_running()

    def _check_running(self) -> None:
        if self._channel.is_ended or self._fork.exit is not None or self._fork.is_abandoned:
            self._fail_ended()

    def _read_channel(self) -> None:
        self._channel.flush()
        try:
            for time_s, message in self._channel.receive():
                self._hear(time_s, message)
        except ProtocolFault as fault:
            self._fail("protocol", str(fault))

    def _read_stderr(self) -> None:
        try:
            chunk = os.read(self._stderr, 65536)
        except BlockingIOError:
            return
        self._is_stderr_ended = not chunk
        self._stderr_tail = (self._stderr_tail + chunk)[-_STDERR_TAIL_BYTES:]

    def _hear(self, time_s: float, message: dict[str, Any]) -> None:
        event = message.get("event")
        if event == "step":
            self._hear_step(time_s, message)
        elif event == "aborted":
            self._hear_aborted(time_s, message)
        elif event == "failed":
            outcome = reported_outcome(message)
            if outcome is None:
                raise ProtocolFault("a child cannot say how a trial ended like this")
            self._fail(outcome.kind, outcome.detail, ask_first=True)
        elif event == "progress" and self._awaited == "scored":
            self._heard_s = time_s
        elif event == self._awaited and self._reply is None:
            self._reply = message
        else:
            raise ProtocolFault(f"unexpected event {ascii(event)[:80]}")

    def _hear_step(self, time_s: float, message: dict[str, Any]) -> None:
        if not self._outstanding:
            raise ProtocolFault("a step without a request")
        for request_id, token_id, finish_reason in messages.step_tokens(message):
            left = self._outstanding.get(request_id)
            if left is None:
                raise ProtocolFault(f"a token for a request that does not run: {ascii(request_id)[:80]}")
            if left == 0:
                raise ProtocolFault(f"more tokens than request {ascii(request_id)[:80]} asked for")
            self._outstanding[request_id] = left - 1
            if finish_reason:
                del self._outstanding[request_id]
            self._events.append(TokenEvent(request_id, token_id, time_s, finish_reason))
        self._heard_s = time_s

    def _hear_aborted(self, time_s: float, message: dict[str, Any]) -> None:
        request_id = message.get("request_id")
        if not isinstance(request_id, str) or request_id not in self._aborting:
            raise ProtocolFault("aborted what nobody asked to abort")
        self._aborting.remove(request_id)
        if self._outstanding.pop(request_id, None) is not None:
            self._events.append(TokenEvent(request_id, -1, time_s, "aborted"))

    def _checked(self, check: Callable[[Mapping[str, Any]], T], message: dict[str, Any]) -> T:
        try:
            return check(message)
        except ProtocolFault as fault:
            self._fail("protocol", str(fault))

    def _process_memory(self) -> ProcessMemory:
        memory = process_memory(self.pid)
        if memory is None:
            self._fail_ended()
        return memory

    # The end.

    def _fail_hanging(self, detail: str) -> NoReturn:
        self._fork.send_signal(signal.SIGUSR1)  # faulthandler: where it hangs, on its stderr
        self._wait_for_end(0.2)
        self._fail("hang", detail)

    def _fail_ended(self) -> NoReturn:
        """The child ended, or its channel did, before it was told to: find out why."""
        self._wait_for_end(_LAST_WORDS_S)
        end_s = time.perf_counter() + _LAST_WORDS_S
        while not self._channel.is_ended and time.perf_counter() < end_s and _is_readable(self._channel, 0):
            self._read_channel()
        if (end := self._fork.exit) is not None:
            if self._channel.half_line and end.signal is None:
                self._fail("protocol", f"ended in the middle of a line: {shown(self._channel.half_line)}")
            outcome = outcome_of_exit(end, kernel_oom_kills=kernel_oom_kills() - self._oom_kills_before)
            self._fail(outcome.kind, outcome.detail)
        if self._fork.is_abandoned:
            self._fail("harness", "the nursery died and took the child along")
        self._fail("protocol", "the child closed its channel and lives on")

    def _fail(self, kind: OutcomeKind, detail: str, *, ask_first: bool = False) -> NoReturn:
        self._stop(ask_first=ask_first)
        if kind not in _EXPLAIN_THEMSELVES and self._stderr_tail:
            detail += "\nstderr: " + self._stderr_tail.decode(errors="replace").strip()
        if kind == "oom" and self._data_limit_bytes is not None:
            detail += f" (it may take {format_bytes(self._data_limit_bytes)})"
        if self._left:
            kind, detail = "harness", f"could not be killed: {self._left}; before that {kind}: {detail}"
        self._outcome = Outcome(kind=kind, detail=printable(detail))
        raise TrialFailed(self._outcome)

    def _stop(self, *, ask_first: bool) -> str:
        """The stop ladder: the end of the channel (if `ask_first`), SIGTERM, SIGKILL for all that is left.

        Returns what was not in order, "" when all was.
        """
        self._is_open = False
        self._selector.close()
        self._channel.close()
        grace_s = self._limits.grace_s
        trouble = ""
        if not (ask_first and self._wait_for_end(grace_s)):
            self._fork.send_signal(signal.SIGTERM)
            trouble = f"it did not end within {grace_s:g} s"
            if not self._wait_for_end(grace_s):
                self._fork.kill()
                trouble += ", nor on SIGTERM"
                self._wait_for_end(self._limits.kill_s)
        self._left = self._fork.left
        if (end := self._fork.exit) is None:
            if not self._fork.destroy_nursery():
                self._left = [self.pid]
            trouble = trouble or "the nursery died"
        elif not trouble and end.status != 0:
            trouble = outcome_of_exit(end, kernel_oom_kills=0).detail
        while not self._is_stderr_ended and _is_readable(self._stderr, 0):
            self._read_stderr()
        os.close(self._stderr)
        self._fork.close()
        return trouble

    def _wait_for_end(self, seconds: float) -> bool:
        """Whether all of the child is gone, or the nursery is; reads its stderr meanwhile, so that it can end."""
        end_s = time.perf_counter() + seconds
        while self._fork.exit is None and not self._fork.is_abandoned:
            left = end_s - time.perf_counter()
            if left <= 0:
                return False
            sources: list[Any] = [self._fork] if self._is_stderr_ended else [self._fork, self._stderr]
            ready, _, _ = select.select(sources, [], [], left)
            if self._fork in ready:
                self._fork.pump()
            if self._stderr in ready:
                self._read_stderr()
        return True


# Kinds that a child reports with all there is to say; its stderr would only distract.
_EXPLAIN_THEMSELVES = frozenset({"oom", "unsupported", "numerical"})


def _is_readable(source: Any, timeout_s: float) -> bool:
    return bool(select.select([source], [], [], timeout_s)[0])

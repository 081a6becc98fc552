"""The child from hell: every misbehaviour is typed, nothing of it is left, and the next session works."""

import contextlib
import dataclasses
import os
import pickle
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_engines
import pytest
from relatives import entry_of, family, family_of

from codesign.measure.child_session import ChildSession, Limits
from codesign.measure.memory import process_memory
from codesign.measure.nursery import Nursery
from codesign.measure.session import TokenEvent, TrialFailed
from codesign.results.record import Outcome, OutcomeKind
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from codesign.units import MIB

PATIENT = Limits(start_up_s=30, progress_s=30, wall_s=60, grace_s=10, memory_bytes=192 * MIB)
HASTY = Limits(start_up_s=20, progress_s=1.0, wall_s=30, grace_s=0.5, kill_s=2.0, memory_bytes=192 * MIB)
HASTY_START = dataclasses.replace(HASTY, start_up_s=1.0)


def request(request_id: str = "r", max_tokens: int = 3) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(100,), sampling=SamplingParams(max_tokens=max_tokens))


def start(nursery: Nursery, engine: str, limits: Limits, model_name: str = "none") -> ChildSession:
    model = ModelSpec(name=model_name, architecture={"hidden_size": 1})
    return ChildSession(nursery, model=model, limits=limits, engine=engine, quality="fake_engine:run_suite")


def run(nursery: Nursery, engine: str, limits: Limits) -> list[TokenEvent]:
    with start(nursery, engine, limits) as session:
        session.build(EngineConfig())
        session.submit(request())
        events: list[TokenEvent] = []
        while not any(event.finish_reason for event in events):
            events += session.poll(5.0)
        return events


def outcome_of(nursery: Nursery, name: str, limits: Limits = PATIENT) -> Outcome:
    with pytest.raises(TrialFailed) as failure:
        run(nursery, f"hostile_engines:{name}", limits)
    return failure.value.outcome


CASES: list[tuple[str, Limits, OutcomeKind, str]] = [
    ("allocation_bomb", PATIENT, "oom", "MemoryError (it may take 192 MiB)"),
    ("small_allocation_bomb", PATIENT, "oom", "MemoryError"),
    ("tensor_bomb", PATIENT, "oom", "allocate"),
    ("bomb_in_step", PATIENT, "oom", "MemoryError"),
    ("cuda_out_of_memory", PATIENT, "oom", "2.00 GiB"),
    ("unsupported", PATIENT, "unsupported", "int4 does not"),
    ("numerical", PATIENT, "numerical", "NaN logits"),
    ("nan_facts", PATIENT, "numerical", "'built'"),
    ("cuda_error", PATIENT, "cuda_fatal", "illegal memory access"),
    ("accelerator_error", PATIENT, "cuda_fatal", "device-side fault"),
    ("exception", PATIENT, "crashed", "in exception"),
    ("terminal_escape", PATIENT, "crashed", "\ufffd[2J\ufffd gone"),
    ("kills_itself", PATIENT, "killed_by_os", "SIGKILL"),
    ("segfault", PATIENT, "crashed", "SIGSEGV"),
    ("aborts", PATIENT, "crashed", "SIGABRT"),
    ("exits_with_0", PATIENT, "crashed", "status 0 without a result"),
    ("sys_exit", PATIENT, "crashed", "SystemExit: 3"),
    ("hang_in_build", HASTY_START, "hang", "in hang_in_build"),
    ("hang", HASTY, "hang", "no step for 1 s"),
    ("busy_hang", HASTY, "hang", "in spin"),
    ("ignores_sigterm", HASTY, "hang", "in forever"),
    ("stops_itself", HASTY, "hang", "no step"),
    ("endless_steps", Limits(wall_s=1.5, grace_s=0.5), "hang", "still not done after 1.5 s"),
    ("garbage", PATIENT, "protocol", "\\x00\\x01"),
    ("nan", PATIENT, "protocol", "NaN"),
    ("infinity", PATIENT, "protocol", "1e999"),
    ("huge_integer", PATIENT, "protocol", "not a JSON line"),
    ("depth_bomb", PATIENT, "protocol", "[[[["),
    ("not_an_object", PATIENT, "protocol", "not a JSON object"),
    ("invalid_utf8", PATIENT, "protocol", "UnicodeDecodeError"),
    ("surrogate", PATIENT, "protocol", "UnicodeEncodeError"),
    ("long_line", PATIENT, "protocol", "longer than 1048576 bytes"),
    ("unknown_event", PATIENT, "protocol", "'promoted'"),
    ("no_event", PATIENT, "protocol", "None"),
    ("step_before_work", PATIENT, "protocol", "a step without a request"),
    ("claims_ok", PATIENT, "protocol", "cannot say"),
    ("claims_harness", PATIENT, "protocol", "cannot say"),
    ("wrong_facts", PATIENT, "protocol", "bytes.kv"),
    ("facts_of_wrong_type", PATIENT, "protocol", "bytes.kv"),
    ("flood_without_lines", PATIENT, "protocol", "longer than"),
    ("half_a_line", PATIENT, "protocol", "in the middle of a line"),
    ("killed_in_mid_line", PATIENT, "killed_by_os", "SIGKILL"),
    ("closes_channel", HASTY, "protocol", "closed its channel"),
    ("forged_request", PATIENT, "protocol", "somebody else"),
    ("forged_reason", PATIENT, "protocol", "not a token"),
    ("negative_token", PATIENT, "protocol", "not a token"),
    ("boolean_token", PATIENT, "protocol", "not a token"),
    ("too_many_tokens", PATIENT, "protocol", "more tokens than"),
    ("aborts_unasked", PATIENT, "protocol", "nobody asked"),
    ("endless_stderr", HASTY_START, "hang", "warning: "),
    ("daemon_and_segfault", PATIENT, "crashed", "SIGSEGV"),
]


@pytest.mark.parametrize(("name", "limits", "kind", "detail"), CASES, ids=[case[0] for case in CASES])
def test_a_hostile_child_is_typed_and_nothing_of_it_is_left(
    nursery: Nursery,
    nothing_left: Callable[[], None],
    name: str,
    limits: Limits,
    kind: OutcomeKind,
    detail: str,
) -> None:
    pid = nursery.pid

    outcome = outcome_of(nursery, name, limits)

    assert outcome.kind == kind
    assert detail in outcome.detail
    nothing_left()
    assert nursery.pid == pid
    assert [event.token_id for event in run(nursery, "fake_engine:build", PATIENT)] == [100, 101, 102]


def test_a_pickle_is_never_loaded(nursery: Nursery, nothing_left: Callable[[], None], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(hostile_engines._Bomb(str(marker)), protocol=0))  # the bomb works
    assert marker.exists()
    marker.unlink()
    session = start(nursery, "hostile_engines:pickle_bomb", PATIENT, model_name=str(marker))

    with pytest.raises(TrialFailed) as failure:
        session.build(EngineConfig())

    assert failure.value.outcome.kind == "protocol"
    assert not marker.exists()
    nothing_left()


def test_the_kernels_kill_in_the_middle_of_work_is_told_apart_from_ours(
    nursery: Nursery, nothing_left: Callable[[], None]
) -> None:
    with start(nursery, "hostile_engines:hang", PATIENT) as session:
        session.build(EngineConfig())
        session.submit(request())
        threading.Timer(0.2, os.kill, (session.pid, signal.SIGKILL)).start()

        with pytest.raises(TrialFailed) as failure:
            session.poll(20.0)

    assert failure.value.outcome.kind == "killed_by_os"
    nothing_left()


def test_a_sigkill_while_the_kernel_kills_for_memory_is_oom(
    nursery: Nursery, nothing_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter((7, 8))
    monkeypatch.setattr("codesign.measure.child_session.kernel_oom_kills", lambda: next(counts))

    assert outcome_of(nursery, "kills_itself").kind == "oom"
    nothing_left()


@pytest.mark.parametrize("victim", ["child", "nursery"])
def test_a_kill_at_any_moment_is_typed_and_the_next_session_works(victim: str) -> None:
    moments = random.Random(20)
    with Nursery(preload=()) as nursery:
        for _ in range(8):
            nursery.start()
            assert nursery.pid is not None
            entry = entry_of(nursery.pid)
            with contextlib.suppress(TrialFailed), start(nursery, "fake_engine:build_slow", PATIENT) as session:
                pid = session.pid if victim == "child" else nursery.pid
                killer = threading.Timer(moments.uniform(0, 0.15), os.kill, (pid, signal.SIGKILL))
                killer.start()
                try:
                    session.build(EngineConfig())
                    session.submit(request(max_tokens=1000))
                    while True:
                        session.poll(5.0)
                except TrialFailed as failure:
                    assert failure.outcome.kind == {"child": "killed_by_os", "nursery": "harness"}[victim]
                finally:
                    killer.join()
            assert family_of(entry) <= {nursery.pid}

            assert len(run(nursery, "fake_engine:build", PATIENT)) == 3


@pytest.mark.parametrize("name", ["orphan", "daemon", "family"])
def test_what_a_good_child_leaves_behind_goes_with_it(
    nursery: Nursery, nothing_left: Callable[[], None], name: str
) -> None:
    assert nursery.pid is not None
    with start(nursery, f"hostile_engines:{name}", PATIENT) as session:
        session.build(EngineConfig())
        started = family(nursery.pid) - {nursery.pid, session.pid}

    assert started
    nothing_left()


def test_a_flood_on_stderr_costs_a_good_child_nothing(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with memory_growth() as growth:
        events = run(nursery, "hostile_engines:chatty", PATIENT)

    assert [event.token_id for event in events] == [100, 101, 102]
    assert growth() < 20 * MIB
    nothing_left()


@pytest.mark.parametrize("name", ["flood_without_lines", "flood_of_lines", "long_line", "depth_bomb", "huge_integer"])
def test_a_flood_on_the_channel_cannot_fill_the_parents_memory(
    nursery: Nursery, nothing_left: Callable[[], None], name: str
) -> None:
    limits = dataclasses.replace(HASTY, wall_s=3.0)

    with memory_growth() as growth:
        outcome = outcome_of(nursery, name, limits)

    assert outcome.kind == ("hang" if name == "flood_of_lines" else "protocol")
    assert growth() < 50 * MIB
    nothing_left()


def test_waiting_for_a_hanging_child_costs_no_cpu(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with start(nursery, "hostile_engines:hang", PATIENT) as session:
        session.build(EngineConfig())
        session.submit(request())
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        assert session.poll(2.0) == ()
        share = (time.process_time() - cpu_s) / (time.perf_counter() - wall_s)
        os.kill(session.pid, signal.SIGKILL)

    assert share < 0.02
    nothing_left()


def test_a_child_that_hangs_in_close_is_killed_and_said_so(
    nursery: Nursery, nothing_left: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    session = start(nursery, "hostile_engines:hang_in_close", HASTY)
    session.build(EngineConfig())

    session.close()

    assert "did not end within 0.5 s" in caplog.text
    nothing_left()


@pytest.mark.parametrize(("name", "kind"), [("kills_nursery", "harness"), ("stops_nursery", "hang")])
def test_a_lost_nursery_takes_its_session_along_and_is_started_again(name: str, kind: OutcomeKind) -> None:
    with Nursery(preload=()) as nursery:
        nursery.start()
        assert nursery.pid is not None
        lost, relatives = nursery.pid, entry_of(nursery.pid)

        outcome = outcome_of(nursery, name, HASTY)

        assert outcome.kind == kind
        assert family_of(relatives) == set()
        assert [event.token_id for event in run(nursery, "fake_engine:build", PATIENT)] == [100, 101, 102]
        assert nursery.pid not in (lost, None)


@contextlib.contextmanager
def memory_growth() -> Iterator[Callable[[], int]]:
    """How far this process's resident memory rose at its highest, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = process_memory(os.getpid())
    assert before is not None

    def growth() -> int:
        after = process_memory(os.getpid())
        assert after is not None
        return after.peak_rss_bytes - before.rss_bytes

    yield growth


def test_every_hostile_engine_is_tried() -> None:
    elsewhere = {"chatty", "orphan", "daemon", "family", "flood_of_lines", "kills_nursery", "stops_nursery"}
    elsewhere |= {"hang_in_close", "pickle_bomb"}
    helpers = {"channel", "write", "forever"}
    engines = {
        name
        for name, value in vars(hostile_engines).items()
        if callable(value) and not isinstance(value, type) and not name.startswith("_")
        if getattr(value, "__module__", "") == "hostile_engines"
    }

    assert engines - helpers == elsewhere | {case[0] for case in CASES}

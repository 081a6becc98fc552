import dataclasses
import os
import select
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from codesign.measure.child_session import ChildSession, Limits
from codesign.measure.nursery import Nursery
from codesign.measure.session import BuildFacts, TokenEvent, TrialFailed
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from codesign.units import MIB

MODEL = ModelSpec(name="none", architecture={"hidden_size": 1})
LIMITS = Limits(start_up_s=30, progress_s=30, wall_s=60, memory_bytes=512 * MIB)


def open_session(nursery: Nursery, engine: str = "fake_engine:build", limits: Limits = LIMITS) -> ChildSession:
    return ChildSession(nursery, model=MODEL, engine=engine, quality="fake_engine:run_suite", limits=limits)


def request(request_id: str, *, first: int = 100, max_tokens: int = 3) -> Request:
    return Request(request_id=request_id, prompt_token_ids=(first,), sampling=SamplingParams(max_tokens=max_tokens))


def drain(session: ChildSession, num_requests: int) -> list[TokenEvent]:
    events: list[TokenEvent] = []
    while sum(bool(event.finish_reason) for event in events) < num_requests:
        events += session.poll(10.0)
    return events


def test_tokens_stream_in_order_with_rising_times(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with open_session(nursery, "fake_engine:build_slow") as session:
        session.build(EngineConfig())
        sent_s = time.perf_counter()
        for number in range(3):
            session.submit(request(f"r{number}", first=100 * number, max_tokens=5 + number))
        events = drain(session, 3)
        done_s = time.perf_counter()

    for number in range(3):
        mine = [event for event in events if event.request_id == f"r{number}"]
        assert [event.token_id for event in mine] == list(range(100 * number, 100 * number + 5 + number))
        assert [event.finish_reason for event in mine] == [""] * (4 + number) + ["length"]
        times = [event.time_s for event in mine]
        assert times == sorted(times)
        assert sent_s < times[0]
        assert times[-1] < done_s
        # steps of 20 ms, each said at once and not in one piece at the end
        assert times[-1] - times[0] > 0.8 * 0.02 * (4 + number)
    nothing_left()


def test_build_gives_the_facts(nursery: Nursery) -> None:
    with open_session(nursery) as session:
        facts = session.build(EngineConfig())

    assert facts == BuildFacts(
        resolved={"kv_budget_tokens": [64, 64], "dtype": "bf16"},
        bytes={"weights": 1000, "kv": 2000},
        kernels={"linear": "none"},
        phases={"load": 0.01, "allocate": 0.0},
    )


def test_what_became_of_drafts_is_told(nursery: Nursery) -> None:
    with open_session(nursery) as session:
        session.build(EngineConfig())

        assert session.speculation() == {"table": {"1": 4}, "acceptance": 0.5}


def test_a_fork_is_much_faster_than_a_start(nursery: Nursery) -> None:
    spawns = []
    for _ in range(3):
        with open_session(nursery) as session:
            spawns.append(session.spawn_s)

    assert min(spawns) < 0.5


def test_poll_waits_no_longer_than_asked(nursery: Nursery) -> None:
    with open_session(nursery) as session:
        session.build(EngineConfig())
        before = time.perf_counter()
        assert session.poll(0.0) == ()
        assert session.poll(0.2) == ()
        waited_s = time.perf_counter() - before

    assert 0.2 <= waited_s < 1.5


def test_an_idle_session_is_no_hang(nursery: Nursery) -> None:
    with open_session(nursery, limits=dataclasses.replace(LIMITS, progress_s=1.5)) as session:
        session.build(EngineConfig())
        assert session.poll(2.0) == ()
        session.submit(request("late"))

        assert [event.token_id for event in drain(session, 1)] == [100, 101, 102]


def test_a_caller_that_looks_away_finds_no_hang(nursery: Nursery) -> None:
    with open_session(nursery, limits=dataclasses.replace(LIMITS, progress_s=1.5)) as session:
        session.build(EngineConfig())
        session.submit(request("r"))
        time.sleep(2.0)

        assert [event.token_id for event in drain(session, 1)] == [100, 101, 102]


def test_sessions_take_turns(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    """Measured alternately (ABBA), each in its own process."""
    with open_session(nursery) as one, open_session(nursery) as other:
        assert len({one.pid, other.pid, nursery.pid, os.getpid()}) == 4
        for session in (one, other):
            session.build(EngineConfig())
        for turn, session in enumerate((one, other, other, one)):
            session.submit(request(f"r{turn}", first=10 * turn))

            assert [event.token_id for event in drain(session, 1)] == [10 * turn, 10 * turn + 1, 10 * turn + 2]
    nothing_left()


def test_the_end_of_one_session_leaves_the_other_alone(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with open_session(nursery) as survivor:
        survivor.build(EngineConfig())
        with open_session(nursery, "hostile_engines:daemon_and_segfault") as victim:
            victim.build(EngineConfig())
            victim.submit(request("r"))
            with pytest.raises(TrialFailed, match="SIGSEGV"):
                victim.poll(20.0)
        survivor.submit(request("r"))

        assert [event.token_id for event in drain(survivor, 1)] == [100, 101, 102]
    nothing_left()


def test_an_aborted_request_ends_with_an_event_and_the_rest_goes_on(nursery: Nursery) -> None:
    with open_session(nursery, "fake_engine:build_slow") as session:
        session.build(EngineConfig())
        session.submit(request("long", max_tokens=10_000))
        session.submit(request("short", max_tokens=20))
        while not session.poll(5.0):
            pass
        session.abort("long")
        session.abort("unknown")
        events = drain(session, 2)

        last = [event for event in events if event.request_id == "long"][-1]
        assert (last.token_id, last.finish_reason) == (-1, "aborted")
        assert sum(bool(event.finish_reason) for event in events) == 2
        session.submit(request("long"))
        assert drain(session, 1)[-1].finish_reason == "length"


def test_aborting_what_has_just_finished_is_no_fault(nursery: Nursery) -> None:
    with open_session(nursery) as session:
        session.build(EngineConfig())
        session.submit(request("r", max_tokens=1))
        select.select([session._channel], [], [], 20)  # it is done, but nobody has looked
        session.abort("r")

        assert [event.finish_reason for event in drain(session, 1)] == ["length"]
        assert session.poll(0.3) == ()


def test_scoring_may_take_longer_than_the_progress_clock_while_it_moves(nursery: Nursery) -> None:
    limits = dataclasses.replace(LIMITS, progress_s=2.0)
    with open_session(nursery, limits=limits) as session:
        session.build(EngineConfig())

        scores = session.score({"steps": 25, "text": "\u00e4"})

    assert scores == {"suite": {"steps": 25, "text": "\u00e4"}, "was_closed": False}


def test_a_suite_larger_than_any_socket_buffer_arrives(nursery: Nursery) -> None:
    with open_session(nursery, "fake_engine:build") as session:
        session.build(EngineConfig())
        session.submit(request("r"))
        drain(session, 1)

        assert session.score({"count_only": ["x" * 1000] * 5000})["num_items"] == 5000


def test_memory_counts_what_the_child_took_since_its_birth(nursery: Nursery) -> None:
    with open_session(nursery, "fake_engine:build_heavy") as session:
        before = session.memory()
        session.build(EngineConfig())
        after = session.memory()

    assert before["peak_memory_bytes"] < 30 * MIB
    assert 100 * MIB <= after["peak_memory_bytes"] < 140 * MIB  # it allocated and freed 100 MiB
    assert after["host_bytes"] - before["host_bytes"] < 40 * MIB


def test_counters_are_asked_of_an_engine_that_has_nothing_to_do(nursery: Nursery) -> None:
    with open_session(nursery, "fake_engine:build") as session:
        session.build(EngineConfig())
        session.submit(request("r"))
        with pytest.raises(ValueError, match="1 requests are still running"):
            session.stats()
        drain(session, 1)

        assert session.stats() == {"preemptions": 3}


def test_a_failed_session_stays_failed(nursery: Nursery) -> None:
    with open_session(nursery, "hostile_engines:unsupported") as session:
        for _ in range(2):
            with pytest.raises(TrialFailed, match="unsupported"):
                session.build(EngineConfig())
        with pytest.raises(TrialFailed, match="unsupported"):
            session.poll(0.0)


def test_a_closed_session_can_be_closed_but_not_used(nursery: Nursery) -> None:
    session = open_session(nursery)
    session.close()
    session.close()

    with pytest.raises(TrialFailed, match="closed"):
        session.build(EngineConfig())


def test_the_engine_is_closed_in_order(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> None:
    marker = tmp_path_factory.mktemp("close") / "closed"
    model = ModelSpec(name=str(marker), architecture={"hidden_size": 1})
    session = ChildSession(nursery, model=model, engine="fake_engine:build_marking", quality="fake_engine:run_suite")
    session.build(EngineConfig())
    assert not marker.exists()

    session.close()

    assert marker.read_text() == "closed"


def test_an_unknown_engine_is_a_crash_that_names_it(nursery: Nursery) -> None:
    with (
        open_session(nursery, "fake_engine:no_such_function") as session,
        pytest.raises(TrialFailed, match="no_such_function") as failure,
    ):
        session.build(EngineConfig())

    assert failure.value.outcome.kind == "crashed"
    assert "Traceback" in failure.value.outcome.detail


def test_a_memory_limit_on_cuda_is_refused(nursery: Nursery) -> None:
    with pytest.raises(ValueError, match="memory_bytes"):
        ChildSession(nursery, model=MODEL, device="cuda", limits=Limits(memory_bytes=MIB))


def test_an_interrupt_while_it_opens_leaves_nothing(
    nursery: Nursery, nothing_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(ChildSession, "_await", interrupted)

    with pytest.raises(KeyboardInterrupt):
        open_session(nursery)

    nothing_left()

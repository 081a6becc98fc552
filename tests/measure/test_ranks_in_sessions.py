"""An engine on several ranks in a session: typed failures within the clocks, and nothing left of any rank."""

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from codesign.engine.models.tiny import tiny_spec
from codesign.measure.child_session import ChildSession, Limits
from codesign.measure.memory import process_memory
from codesign.measure.nursery import ENGINE_MODULES, Nursery
from codesign.measure.session import TokenEvent, TrialFailed
from codesign.results.record import Outcome
from codesign.spec.engine_config import EngineConfig, ParallelConfig
from codesign.spec.request import Request, SamplingParams
from codesign.units import MIB

PATIENT = Limits(start_up_s=60, progress_s=60, wall_s=120, grace_s=10)
HASTY = dataclasses.replace(PATIENT, progress_s=2.0, grace_s=0.5)
TWO = EngineConfig(dtype="fp32", max_model_len=256, parallel=ParallelConfig(tensor_parallel_size=2))
FOUR = dataclasses.replace(TWO, parallel=ParallelConfig(tensor_parallel_size=2, pipeline_parallel_size=2))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(preload=ENGINE_MODULES) as nursery:
        nursery.start()
        yield nursery


def start(nursery: Nursery, limits: Limits, engine: str = "codesign.engine.build:build_engine") -> ChildSession:
    return ChildSession(nursery, model=tiny_spec(), num_threads=2, limits=limits, engine=engine)


def generate(session: ChildSession, num_tokens: int, until: int | None = None) -> list[TokenEvent]:
    request = Request(
        request_id="r", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    )
    session.submit(request)
    events: list[TokenEvent] = []
    while len(events) < (until or num_tokens):
        events += session.poll(1.0)
    return events


def ranks(session: ChildSession) -> list[int]:
    """Of all ranks but 0, in order."""
    return sorted(process.pid for process in psutil.Process(session.pid).children())


def outcome(nursery: Nursery, config: EngineConfig, limits: Limits, harm: Callable[[ChildSession], None]) -> Outcome:
    """How a session ends that is harmed in the middle of its steps."""
    with start(nursery, limits) as session, pytest.raises(TrialFailed) as failure:
        session.build(config)
        generate(session, 200, until=10)
        harm(session)
        while True:
            session.poll(1.0)
    return failure.value.outcome


@pytest.mark.parametrize("config", [TWO, FOUR], ids=["2", "4"])
def test_ranks_are_the_trials_own_processes_and_end_with_it(
    nursery: Nursery, nothing_left: Callable[[], None], config: EngineConfig
) -> None:
    with start(nursery, PATIENT) as session:
        facts = session.build(config)
        assert len(generate(session, 20)) == 20
        others = ranks(session)
        groups = {os.getpgid(pid) for pid in (session.pid, *others)}
        cores = [os.sched_getaffinity(pid) for pid in (session.pid, *others)]
        memory = session.memory()

    assert len(others) == config.parallel.num_ranks - 1 == len(facts.resolved["ranks"]) - 1
    assert groups == {session.pid}
    if (os.cpu_count() or 1) >= config.parallel.num_ranks:
        assert not set.intersection(*cores)
    assert memory["host_peak_bytes"] > 0
    nothing_left()


def test_memory_of_another_rank_counts_as_the_trials(nursery: Nursery) -> None:
    with start(nursery, PATIENT, "hostile_ranks:takes_memory") as session:
        session.build(TWO)
        before = session.memory()
        generate(session, 5)
        after = session.memory()
        (rank,) = ranks(session)
        own, other = process_memory(session.pid), process_memory(rank)

    assert own is not None and other is not None
    assert other.rss_bytes > 64 * MIB
    for name in ("peak_memory_bytes", "host_peak_bytes", "host_bytes"):
        assert 60 * MIB < after[name] - before[name] < 90 * MIB
    assert after["host_bytes"] == pytest.approx(own.rss_bytes + other.rss_bytes, rel=0.05)


@pytest.mark.parametrize("config", [TWO, FOUR], ids=["2", "4"])
def test_a_killed_rank_ends_the_trial_at_once(
    nursery: Nursery, nothing_left: Callable[[], None], config: EngineConfig
) -> None:
    found = outcome(nursery, config, PATIENT, lambda session: os.kill(ranks(session)[-1], signal.SIGKILL))

    assert found.kind == "killed_by_os"
    assert f"rank {config.parallel.num_ranks - 1} was ended by SIGKILL" in found.detail
    nothing_left()


@pytest.mark.parametrize("config", [TWO, FOUR], ids=["2", "4"])
def test_a_stopped_rank_is_a_hang_within_the_clock(
    nursery: Nursery, nothing_left: Callable[[], None], config: EngineConfig
) -> None:
    started = time.perf_counter()
    found = outcome(nursery, config, HASTY, lambda session: os.kill(ranks(session)[-1], signal.SIGSTOP))

    assert found.kind == "hang" and "no step for 2 s" in found.detail
    assert time.perf_counter() - started < 60
    nothing_left()


def test_a_rank_that_dies_while_nothing_runs_is_noticed_by_the_next_step(
    nursery: Nursery, nothing_left: Callable[[], None]
) -> None:
    with start(nursery, PATIENT) as session, pytest.raises(TrialFailed) as failure:
        session.build(TWO)
        generate(session, 5)
        (rank,) = ranks(session)
        os.kill(rank, signal.SIGKILL)
        generate(session, 5)

    assert failure.value.outcome.kind == "killed_by_os"
    nothing_left()


@pytest.mark.parametrize(
    ("name", "kind", "text"),
    [
        ("exception", "crashed", "rank 1: Traceback"),
        ("memory_error", "oom", "rank 1"),
        ("tensor_bomb", "oom", "rank 1"),
        ("segfault", "crashed", "rank 1 was ended by SIGSEGV"),
        ("leaves", "crashed", "rank 1 ended with status 7 and said nothing"),
        ("quits", "crashed", "SystemExit: 3"),
        ("unsupported_in_build", "unsupported", "rank 1: this part cannot be built"),
    ],
)
def test_what_a_rank_fails_with_is_the_trials_outcome(
    nursery: Nursery, nothing_left: Callable[[], None], name: str, kind: str, text: str
) -> None:
    with start(nursery, PATIENT, f"hostile_ranks:{name}") as session, pytest.raises(TrialFailed) as failure:
        session.build(TWO)
        generate(session, 20)

    assert (failure.value.outcome.kind, text in failure.value.outcome.detail) == (kind, True), failure.value.outcome
    nothing_left()


def test_a_rank_that_hangs_is_a_hang(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with start(nursery, HASTY, "hostile_ranks:hangs") as session, pytest.raises(TrialFailed) as failure:
        session.build(TWO)
        generate(session, 20)

    assert failure.value.outcome.kind == "hang"
    nothing_left()


def test_ranks_die_with_rank_0(nursery: Nursery, nothing_left: Callable[[], None]) -> None:
    with start(nursery, PATIENT) as session, pytest.raises(TrialFailed) as failure:
        session.build(FOUR)
        generate(session, 200, until=10)
        os.kill(session.pid, signal.SIGKILL)
        while True:
            session.poll(1.0)

    assert failure.value.outcome.kind == "killed_by_os"
    nothing_left()

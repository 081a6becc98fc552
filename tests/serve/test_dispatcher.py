"""The asyncio side of the engine: who waits for what, how many may, and what they are told when it ends."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from codesign.engine.sequence import StepOutput
from codesign.errors import NumericalError
from codesign.serve.dispatcher import Dispatcher
from codesign.serve.engine_thread import EngineThread, Failed, Refused
from codesign.serve.metrics import Metrics
from codesign.serve.refusal import Refusal
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import tiny_engine
from tests.serve.process import wait_until


class NoEngine(EngineThread):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.submitted: list[Request] = []
        self.aborted: list[str] = []

    def submit(self, request: Request) -> None:
        self.submitted.append(request)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


def requests(count: int, max_tokens: int = 4) -> list[Request]:
    sampling = SamplingParams(max_tokens=max_tokens)
    return [Request(request_id="same", prompt_token_ids=(1, 2), sampling=sampling) for _ in range(count)]


def dispatcher(num_slots: int = 2, max_waiting: int = 2) -> tuple[Dispatcher, NoEngine, Metrics]:
    engine, metrics = NoEngine(), Metrics()
    found = Dispatcher(engine, metrics, num_slots=num_slots, max_waiting=max_waiting, clock=lambda: 10.0)
    return found, engine, metrics


def in_loop(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


@in_loop
async def test_tokens_reach_the_request_that_waits_for_them() -> None:
    found, engine, metrics = dispatcher()
    with found.open(requests(1), 9.0) as one, found.open(requests(1), 9.5) as other:
        first, second = (item.request_id for item in engine.submitted)
        assert first != second
        found.receive([StepOutput(second, 7), StepOutput(first, 5, "stop")])

        assert (await other.next())[1].token_id == 7
        assert (await one.next())[1].token_id == 5
        assert (found.num_live, found.num_running) == (1, 1)
    assert engine.aborted == [second]
    assert found.num_live == 0
    assert (metrics.aborted, metrics.output_tokens, metrics.prompt_tokens) == (1, 2, 4)


@in_loop
async def test_all_or_none_of_a_request_is_taken_and_one_too_many_is_told_to_come_again() -> None:
    found, engine, metrics = dispatcher(num_slots=2, max_waiting=2)
    found.open(requests(3), 0.0)
    with pytest.raises(Refusal, match="4 is the most") as caught:
        found.open(requests(2), 0.0)

    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    assert len(engine.submitted) == 3
    assert metrics.rejected["queue_full"] == 1
    found.open(requests(1), 0.0)


@in_loop
async def test_leaving_gives_the_places_back() -> None:
    found, engine, _ = dispatcher()
    with found.open(requests(4), 0.0):
        assert found.num_live == 4

    assert found.num_live == 0
    assert len(engine.aborted) == 4
    found.open(requests(4), 0.0)


@in_loop
async def test_a_token_that_was_under_way_when_its_client_left_is_dropped() -> None:
    found, engine, _ = dispatcher()
    with found.open(requests(1), 0.0):
        pass
    found.receive([StepOutput(engine.submitted[0].request_id, 1)])

    assert found.num_live == 0


@in_loop
async def test_after_a_failure_those_who_wait_are_told_and_nobody_is_taken() -> None:
    found, _, _ = dispatcher()
    flight = found.open(requests(1), 0.0)
    found.receive(Failed(NumericalError("NaN")))

    with pytest.raises(Refusal) as told:
        await flight.next()
    with pytest.raises(Refusal) as refused:
        found.open(requests(1), 0.0)
    assert (told.value.status, refused.value.status) == (500, 503)


@in_loop
async def test_while_draining_nobody_is_taken_and_who_is_in_goes_on() -> None:
    found, engine, metrics = dispatcher()
    flight = found.open(requests(1), 0.0)
    found.is_draining = True
    with pytest.raises(Refusal) as refused:
        found.open(requests(1), 0.0)
    found.receive([StepOutput(engine.submitted[0].request_id, 3)])

    assert refused.value.status == 503
    assert (await flight.next())[1].token_id == 3
    assert metrics.rejected["going_down"] == 1


@in_loop
async def test_what_is_cut_off_is_told_so_and_aborted() -> None:
    found, engine, metrics = dispatcher()
    flight = found.open(requests(2), 0.0)
    found.cut_off()

    with pytest.raises(Refusal) as told:
        await flight.next()
    assert told.value.status == 503
    assert len(engine.aborted) == metrics.aborted == 2


@in_loop
async def test_what_the_engine_refuses_is_said_to_who_asked() -> None:
    found, engine, _ = dispatcher()
    flight = found.open(requests(1), 0.0)
    found.receive(Refused(engine.submitted[0].request_id, "too long"))

    with pytest.raises(Refusal, match="too long"):
        await flight.next()
    assert found.num_live == 0


def test_the_thread_steps_a_real_engine_and_says_what_it_refuses() -> None:
    reports: list[Any] = []
    thread = EngineThread(tiny_engine)
    built = thread.start()
    thread.report_to(reports.append)
    assert (built.num_slots, built.vocab_size) == (4, 128)

    for item in requests(1, max_tokens=3) + requests(1, max_tokens=10_000):
        thread.submit(item)
    wait_until(lambda: len(reports) == 4)

    assert thread.stop(30)
    assert [type(report) for report in reports].count(Refused) == 1
    tokens = [output for report in reports if isinstance(report, list) for output in report]
    assert [output.finish_reason for output in tokens] == ["", "", "length"]


def test_the_thread_reports_what_the_engine_failed_with() -> None:
    class Failing:
        num_slots, vocab_size, has_work, is_closed = 1, 2, True, False

        def facts(self) -> dict[str, Any]:
            return {}

        def step(self) -> None:
            raise NumericalError("NaN")

        def close(self) -> None:
            self.is_closed = True

    engine, reports = Failing(), []
    thread = EngineThread(lambda: engine)  # type: ignore[arg-type,return-value]
    thread.report_to(reports.append)
    thread.start()

    wait_until(lambda: engine.is_closed)
    assert [str(report.error) for report in reports] == ["NaN"]
    assert thread.stop(10)


def test_what_the_build_raises_is_raised_to_who_started_it() -> None:
    def build() -> Any:
        raise NumericalError("no")

    with pytest.raises(NumericalError, match="no"):
        EngineThread(build).start()

"""Load: what is sent when, what counts, and every rule that a broken or cheating endpoint would break."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from codesign.measure.load import Load, drive
from codesign.measure.session import TokenEvent, TrialFailed
from codesign.spec.request import Request, SamplingParams


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SteadyEndpoint:
    """Serves all requests in flight together: one token each per `step_s`, `lie` may change the events of a step."""

    def __init__(
        self,
        clock: FakeClock,
        *,
        step_s: float = 0.01,
        lie: Callable[[list[TokenEvent]], list[TokenEvent]] = lambda e: e,
    ) -> None:
        self.clock, self.step_s, self.lie = clock, step_s, lie
        self.left: dict[str, int] = {}
        self.most_in_flight = 0
        self.sent_s: dict[str, float] = {}
        self.prompts: dict[str, tuple[int, ...]] = {}
        self.aborted: list[TokenEvent] = []

    def submit(self, request: Request) -> None:
        self.prompts[request.request_id] = request.prompt_token_ids
        self.left[request.request_id] = request.sampling.max_tokens
        self.sent_s[request.request_id] = self.clock.now_s
        self.most_in_flight = max(self.most_in_flight, len(self.left))

    def abort(self, request_id: str) -> None:
        if self.left.pop(request_id, None) is not None:
            self.aborted.append(TokenEvent(request_id, -1, self.clock.now_s, "aborted"))

    def poll(self, timeout_s: float) -> Sequence[TokenEvent]:
        if self.aborted:
            events, self.aborted = self.aborted, []
            return events
        if not self.left:
            self.clock.now_s += timeout_s
            return []
        self.clock.now_s += self.step_s
        events = []
        for request_id in list(self.left):
            self.left[request_id] -= 1
            done = self.left[request_id] == 0
            if done:
                del self.left[request_id]
            events.append(TokenEvent(request_id, 7, self.clock.now_s, "length" if done else ""))
        return self.lie(events)


def request(name: str, *, max_tokens: int = 4, ignore_eos: bool = True) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    return Request(request_id=name, prompt_token_ids=(1, 2, 3), sampling=sampling)


def requests(count: int, **options: int) -> tuple[Request, ...]:
    return tuple(request(f"r{index}", **options) for index in range(count))


def test_times_follow_their_definitions() -> None:
    clock = FakeClock()
    result = drive(SteadyEndpoint(clock), Load(requests=requests(1)), clock=clock)

    [sample] = result.samples
    assert sample.ttft_ms == pytest.approx(10)
    assert sample.e2e_ms == pytest.approx(40)
    assert sample.tpot_ms == pytest.approx((40 - 10) / (4 - 1))
    assert sample.itl_ms == pytest.approx((10, 10, 10))
    assert result.wall_s == pytest.approx(0.04)
    assert result.output_tokens == 4


def test_a_single_token_has_no_time_per_output_token() -> None:
    clock = FakeClock()
    result = drive(SteadyEndpoint(clock), Load(requests=requests(1, max_tokens=1)), clock=clock)

    assert result.samples[0].tpot_ms is None


@pytest.mark.parametrize("concurrency", [1, 3, 8])
def test_a_closed_loop_never_has_more_in_flight_than_its_concurrency(concurrency: int) -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)
    drive(endpoint, Load(requests=requests(8), concurrency=concurrency), clock=clock)

    assert endpoint.most_in_flight == concurrency


def test_an_open_loop_sends_on_schedule_whatever_comes_back() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock, step_s=1.0)
    drive(endpoint, Load(requests=requests(3), arrivals_s=(0.0, 0.5, 0.6)), clock=clock)

    assert endpoint.most_in_flight == 3


def test_latency_of_a_late_request_starts_at_its_scheduled_arrival() -> None:
    """The step of 1 s delays the sending of the second request; its waiting time must not be forgotten."""
    clock = FakeClock()
    load = Load(requests=(request("a", max_tokens=1), request("b", max_tokens=1)), arrivals_s=(0.0, 0.2))
    result = drive(SteadyEndpoint(clock, step_s=1.0), load, clock=clock)

    assert result.samples[1].ttft_ms == pytest.approx((2.0 - 0.2) * 1e3)


def test_progress_counts_every_request_once() -> None:
    clock = FakeClock()
    seen: list[tuple[int, int]] = []
    drive(
        SteadyEndpoint(clock),
        Load(requests=requests(3), concurrency=3),
        clock=clock,
        on_progress=lambda *n: seen.append(n),
    )

    assert seen == [(1, 3), (2, 3), (3, 3)]


def turn(name: str, *prompt: int, max_tokens: int = 2) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling)


def test_each_turn_is_sent_behind_the_conversation_so_far_with_the_real_output() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)
    load = Load(requests=(turn("a", 1, 2), turn("b", 3), turn("c", 4, 5), turn("d", 6)), turns=3)
    result = drive(endpoint, load, clock=clock)

    assert endpoint.prompts == {
        "a": (1, 2),
        "b": (1, 2, 7, 7, 3),
        "c": (1, 2, 7, 7, 3, 7, 7, 4, 5),
        "d": (6,),  # the next conversation, cut short
    }
    assert [sample.prompt_tokens for sample in result.samples] == [2, 5, 9, 1]


def test_turns_of_a_conversation_never_overlap_and_clients_do() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)
    requests_ = tuple(turn(f"r{index}", 1) for index in range(12))
    drive(endpoint, Load(requests=requests_, concurrency=2, turns=3), clock=clock)

    assert endpoint.most_in_flight == 2
    assert endpoint.sent_s["r3"] == endpoint.sent_s["r0"]
    assert endpoint.sent_s["r6"] > endpoint.sent_s["r5"] > endpoint.sent_s["r4"]


def test_a_client_that_thinks_is_still_there_and_its_latency_starts_when_it_has_thought() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)
    load = Load(requests=(turn("a", 1), turn("b", 1), turn("c", 1)), turns=2, think_s=(0.0, 5.0, 0.0))
    result = drive(endpoint, load, clock=clock)

    assert endpoint.sent_s["b"] - endpoint.sent_s["a"] == pytest.approx(5.02)
    assert endpoint.sent_s["c"] > endpoint.sent_s["b"]
    assert result.samples[1].ttft_ms == pytest.approx(10)


def test_how_late_the_client_sent_is_kept_beside_the_latency() -> None:
    clock = FakeClock()
    load = Load(requests=(request("a", max_tokens=1), request("b", max_tokens=1)), arrivals_s=(0.0, 0.2))
    result = drive(SteadyEndpoint(clock, step_s=1.0), load, clock=clock)

    assert result.late_ms == pytest.approx((0.0, 800.0))


def test_an_endpoint_that_says_when_it_sent_is_believed() -> None:
    clock = FakeClock()

    def say(events: list[TokenEvent]) -> list[TokenEvent]:
        return [dataclasses.replace(event, sent_s=100.004) for event in events]

    result = drive(SteadyEndpoint(clock, lie=say), Load(requests=requests(1)), clock=clock)

    assert result.late_ms == pytest.approx((4.0,))
    assert result.samples[0].ttft_ms == pytest.approx(10)


def test_a_rejected_turn_takes_those_that_were_to_follow_with_it() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)

    def reject(events: list[TokenEvent]) -> list[TokenEvent]:
        is_refused = endpoint.left.pop("b", None) is not None
        return [TokenEvent("b", -1, clock.now_s, "rejected")] if is_refused else events

    endpoint.lie = reject
    seen: list[int] = []
    load = Load(requests=tuple(turn(name, 1) for name in "abcd"), turns=3)
    result = drive(endpoint, load, clock=clock, on_progress=lambda done, _: seen.append(done))

    assert set(result.tokens) == {"a", "d"}
    assert result.num_rejected == 2
    assert seen == [1, 3, 4]


def test_at_the_deadline_what_is_left_is_aborted_and_counted() -> None:
    clock = FakeClock()
    endpoint = SteadyEndpoint(clock)
    load = Load(requests=(*requests(2), *(request(f"long{i}", max_tokens=10**6) for i in range(3))), concurrency=4)
    result = drive(endpoint, load, clock=clock, deadline_s=1.0)

    assert set(result.tokens) == {"r0", "r1"}
    assert (result.num_unfinished, result.num_rejected) == (3, 0)
    assert endpoint.left == {}
    assert clock() - 100.0 < 1.1


def test_a_conversation_without_token_ids_cannot_go_on() -> None:
    clock = FakeClock()

    def hide(events: list[TokenEvent]) -> list[TokenEvent]:
        return [dataclasses.replace(event, token_id=-1) for event in events]

    with pytest.raises(TrialFailed, match="token ids") as caught:
        drive(SteadyEndpoint(clock, lie=hide), Load(requests=requests(2), turns=2), clock=clock)
    assert caught.value.outcome.kind == "unsupported"


@pytest.mark.parametrize("wrong", [{"turns": 2, "arrivals_s": (0.0, 0.0)}, {"think_s": (1.0,)}, {"arrivals_s": (0.0,)}])
def test_a_load_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="need"):
        Load(requests=requests(2), **wrong)


LIES: dict[str, tuple[Callable[[list[TokenEvent]], list[TokenEvent]], str]] = {
    "an unknown request": (lambda e: [TokenEvent("other", 7, e[0].time_s)], "unknown request"),
    "a token too many": (lambda e: [*e, *e] if e[0].finish_reason else e, "after the end"),
    "a request that ends early": (lambda e: [TokenEvent(e[0].request_id, 7, e[0].time_s, "length")], "ends by length"),
    "a stop that was to be ignored": (lambda e: [TokenEvent(e[0].request_id, 7, e[0].time_s, "stop")], "to ignore"),
    "a request that never ends": (lambda e: [TokenEvent(e[0].request_id, 7, e[0].time_s)], "does not end"),
    "an abort that nobody asked for": (lambda e: [TokenEvent(e[0].request_id, -1, e[0].time_s, "aborted")], "aborted"),
    "a rejection after a token": (
        lambda e: [e[0], TokenEvent(e[0].request_id, -1, e[0].time_s, "rejected")],
        "rejected on its way",
    ),
    "time running backwards": (
        lambda e: [TokenEvent(e[0].request_id, 7, 5.0), TokenEvent(e[0].request_id, 7, 4.0)],
        "backwards",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_endpoint_is_a_protocol_fault(name: str) -> None:
    lie, message = LIES[name]
    clock = FakeClock()
    with pytest.raises(TrialFailed, match=message) as caught:
        drive(SteadyEndpoint(clock, lie=lie), Load(requests=requests(1)), clock=clock)

    assert caught.value.outcome.kind == "protocol"


def test_request_ids_must_be_distinct() -> None:
    with pytest.raises(ValueError, match="distinct"):
        Load(requests=(request("a"), request("a")))

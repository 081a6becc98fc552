"""The HTTP endpoint against a real server on a real socket: the same load, the same rules, every way to go wrong."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from codesign.measure.capacity import Bounds, find_capacity
from codesign.measure.http_endpoint import HttpEndpoint
from codesign.measure.load import Load, LoadResult, drive
from codesign.measure.session import TrialFailed
from codesign.spec.request import Request, SamplingParams
from codesign.spec.slo import Slo
from tests.measure.completions_server import Body, Chunks, choice, serving, sse, steady, usage

PAUSE_S = 0.02


def requests(count: int, *, max_tokens: int = 4, ignore_eos: bool = True) -> tuple[Request, ...]:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos, seed=9)
    return tuple(
        Request(request_id=f"r{index}", prompt_token_ids=(10 * index, 5, 6), sampling=sampling)
        for index in range(count)
    )


def driven(answer: Callable[[Body], Chunks | tuple[int, str]], load: Load, **options: Any) -> LoadResult:
    with serving(answer) as server, HttpEndpoint(server.url, model="m", **options) as endpoint:
        return drive(endpoint, load)


def test_a_load_comes_back_with_the_tokens_and_times_of_the_stream() -> None:
    result = driven(lambda body: steady(body, PAUSE_S), Load(requests=requests(2), concurrency=2))

    assert result.tokens == {"r0": (0, 1, 2, 3), "r1": (10, 11, 12, 13)}
    for sample in result.samples:
        assert (sample.prompt_tokens, sample.output_tokens, sample.finish_reason) == (3, 4, "length")
        assert sample.ttft_ms >= PAUSE_S * 1e3
        assert sample.e2e_ms >= 4 * PAUSE_S * 1e3
        assert len(sample.itl_ms) == 3


def test_the_server_is_asked_for_exactly_the_workload() -> None:
    with serving() as server, HttpEndpoint(server.url + "/", model="m", api_key="k", extra={"x": 1}) as endpoint:
        drive(endpoint, Load(requests=requests(1)))

    [body], [headers] = server.bodies, server.headers
    assert body == {
        "model": "m",
        "prompt": [0, 5, 6],
        "max_tokens": 4,
        "temperature": 0.0,
        "seed": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "x": 1,
    }
    assert (headers["path"], headers["authorization"]) == ("/v1/completions", "bearer k")


def test_two_hundred_streams_are_open_at_once() -> None:
    with serving(lambda body: steady(body, 0.2)) as server, HttpEndpoint(server.url, model="m") as endpoint:
        result = drive(endpoint, Load(requests=requests(200, max_tokens=3), concurrency=200))

    assert server.most_at_once == 200
    assert len(result.samples) == 200


def test_an_open_loop_sends_on_schedule_over_http() -> None:
    arrivals_s = tuple(0.03 * index for index in range(10))
    result = driven(lambda body: steady(body, 0.1), Load(requests=requests(10, max_tokens=2), arrivals_s=arrivals_s))

    assert result.wall_s >= 0.27 + 0.2
    assert len(result.late_ms) == 10


def test_a_conversation_over_http_needs_the_token_ids() -> None:
    load = Load(requests=requests(2), turns=2)
    result = driven(steady, load)

    assert result.samples[1].prompt_tokens == 3 + 4 + 3
    with pytest.raises(TrialFailed, match="token ids") as caught:
        driven(lambda body: [sse(choice()) * 3, sse(choice(finish_reason="length")), sse(usage(body))], load)
    assert caught.value.outcome.kind == "unsupported"


def test_a_rejected_request_is_counted_and_the_others_go_on() -> None:
    def some(body: Body) -> Chunks | tuple[int, str]:
        return (429, "busy") if body["prompt"][0] in (10, 30) else steady(body)

    result = driven(some, Load(requests=requests(5), concurrency=5))

    assert (len(result.samples), result.num_rejected) == (3, 2)
    assert set(result.tokens) == {"r0", "r2", "r4"}


def test_what_is_aborted_at_the_deadline_is_dropped_by_the_client() -> None:
    with serving(lambda body: steady(body, 0.05)) as server, HttpEndpoint(server.url, model="m") as endpoint:
        result = drive(endpoint, Load(requests=requests(2, max_tokens=200), concurrency=2), deadline_s=0.2)
        end_s = time.perf_counter() + 5
        while server.num_dropped < 2 and time.perf_counter() < end_s:
            time.sleep(0.01)

    assert (len(result.samples), result.num_unfinished) == (0, 2)
    assert server.num_dropped == 2


def test_a_request_that_is_aborted_before_it_is_sent_says_so() -> None:
    with serving() as server, HttpEndpoint(server.url, model="m") as endpoint:
        for request in requests(20):
            endpoint.submit(request)
            endpoint.abort(request.request_id)
        endpoint.abort("unknown")
        ended: list[str] = []
        end_s = time.perf_counter() + 10
        while len(ended) < 20 and time.perf_counter() < end_s:
            ended += [event.finish_reason for event in endpoint.poll(0.1) if event.finish_reason]

    assert len(ended) == 20
    assert "aborted" in ended


def test_the_capacity_of_a_server_is_searched_over_http() -> None:
    """Two seconds on whatever machine say little of the rate; that the search ends, bounded and explained, they do."""
    sampling = SamplingParams(max_tokens=2, ignore_eos=True)

    def load(probe: int, count: int) -> Load:
        made = tuple(
            Request(request_id=f"{probe}-{index}", prompt_token_ids=(probe, index), sampling=sampling)
            for index in range(count)
        )
        return Load(requests=made, arrivals_s=tuple(float(index) for index in range(count)))

    limits = Slo.model_validate({"ttft_ms": {"p90": 20_000}}).limits()
    with serving() as server, HttpEndpoint(server.url, model="m") as endpoint:
        found = find_capacity(endpoint, load, limits, start_per_s=50, bounds=Bounds(max_s=2))

    assert found.probes[0].num_requests == 17
    assert found.rate_per_s >= 50
    assert found.verdict


FAULTS: dict[str, tuple[Callable[[Body], Chunks | tuple[int, str]], str, str]] = {
    "a refusal": (lambda body: (400, '{"error": "no such model"}'), "unsupported", "no such model"),
    "a wrong key": (lambda body: (401, ""), "harness", "401"),
    "a server error": (lambda body: (500, "boom"), "crashed", "boom"),
    "an endless refusal": (lambda body: (500, "x" * 100_000), "crashed", "xxx"),
    "a redirect": (lambda body: (302, ""), "crashed", "302"),
    "an error in the stream": (lambda body: [sse({"error": {"message": "out of memory"}})], "crashed", "memory"),
    "a broken connection": (lambda body: [sse(choice()), b""], "crashed", "connection"),
    "an end without a reason": (lambda body: [sse(choice()), sse(b"[DONE]")], "crashed", "ended before"),
    "an abort of its own": (lambda body: [sse(choice(finish_reason="abort"))], "crashed", "abort"),
    "no JSON": (lambda body: [sse(b"{")], "protocol", "not JSON"),
    "a deep document": (lambda body: [sse(b"[" * 100_000)], "protocol", "not JSON"),
    "a list": (lambda body: [sse([])], "protocol", "not a mapping"),
    "two choices": (lambda body: [sse({"choices": [{}, {}]})], "protocol", "at most one"),
    "a choice that is none": (lambda body: [sse({"choices": [3]})], "protocol", "without a text"),
    "token ids that are none": (lambda body: [sse(choice(token_ids=["a"]))], "protocol", "token ids"),
    "an endless line": (lambda body: [b"data: " + b"x" * 2**21], "protocol", "1 MiB"),
    "endless pieces": (lambda body: [sse(choice(text="")) * 100], "protocol", "more pieces"),
    "another prompt": (
        lambda body: [sse({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}})],
        "protocol",
        "9 prompt tokens",
    ),
    "a usage without counts": (lambda body: [sse({"choices": [], "usage": {}})], "protocol", "must count"),
    "more tokens than asked for": (lambda body: [sse(usage(body, 5))], "protocol", "at most 4"),
    "fewer ids than tokens": (
        lambda body: [sse(choice(finish_reason="length", token_ids=[1])), sse(usage(body))],
        "protocol",
        "1 token ids, but 4",
    ),
    "a piece after the end": (
        lambda body: [sse(choice(finish_reason="length")), sse(choice())],
        "protocol",
        "after the end",
    ),
    "an empty answer": (lambda body: [sse(choice(text="", finish_reason="length"))], "protocol", "no token"),
    "fewer tokens than asked for": (
        lambda body: [sse(choice(finish_reason="length")), sse(usage(body, 1))],
        "protocol",
        "ends by length after 1 of 4",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_is_a_typed_outcome(name: str) -> None:
    answer, kind, message = FAULTS[name]
    with pytest.raises(TrialFailed, match=message) as caught:
        driven(answer, Load(requests=requests(1)))

    assert caught.value.outcome.kind == kind
    assert len(caught.value.outcome.detail) < 1000


def test_silence_is_a_hang() -> None:
    with pytest.raises(TrialFailed) as caught:
        driven(lambda body: [sse(choice()), 5.0], Load(requests=requests(1)), silence_s=0.1)

    assert caught.value.outcome.kind == "hang"


def test_no_server_is_a_crash_and_stays_one() -> None:
    with serving() as server:
        url = server.url
    with HttpEndpoint(url, model="m") as endpoint:
        for _ in range(2):
            with pytest.raises(TrialFailed) as caught:
                drive(endpoint, Load(requests=requests(1)))
            assert caught.value.outcome.kind == "crashed"


def test_a_closed_endpoint_takes_nothing() -> None:
    with serving() as server:
        endpoint = HttpEndpoint(server.url, model="m")
        endpoint.close()
        endpoint.close()

        with pytest.raises(TrialFailed, match="closed"):
            endpoint.submit(requests(1)[0])

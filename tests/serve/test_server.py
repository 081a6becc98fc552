"""A real server process, asked over HTTP: answers, streams, bounds, guards, and giving slots back."""

import json
import re
import socket
import time
from typing import Any

import httpx
import psutil
import pytest

from codesign.bundled import target_path
from codesign.engine.build import build_engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.measure.http_endpoint import HttpEndpoint
from codesign.measure.load import Load, drive
from codesign.serve import bounds
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from tests.serve.process import ServerProcess, wait_until
from tests.serve.test_stops import slow_oracle

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

TOKENIZER = Tokenizer(target_path())
PROMPT = "def read(path):\n    "
GREEDY: dict[str, Any] = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Any:
    with httpx.Client(base_url=server.url, headers=server.headers, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def reference() -> list[int]:
    """48 greedy tokens after PROMPT, from the engine alone."""
    model = ModelSpec(name="bundled", path=str(target_path()))
    engine = build_engine(model, EngineConfig(dtype="fp32", max_batch_size=1, max_model_len=128), num_threads=1)
    prompt = tuple(TOKENIZER.encode(PROMPT))
    sampling = SamplingParams(max_tokens=48, ignore_eos=True)
    engine.submit(Request(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    found = []
    while engine.has_work:
        found += [output.token_id for output in engine.step()]
    return found


def complete(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = client.post("/v1/completions", json={**GREEDY, **fields})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def stream(client: httpx.Client, route: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks; checks the frame around them."""
    with client.stream("POST", route, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def metric(client: httpx.Client, name: str) -> float:
    page = client.get("/metrics").text
    found = re.search(rf"^codesign_{name} (\S+)$", page, flags=re.MULTILINE)
    assert found is not None, page
    return float(found[1])


def test_a_completion_is_what_the_engine_says_alone(client: httpx.Client, reference: list[int]) -> None:
    answer = complete(client)

    assert answer["object"] == "text_completion" and answer["model"] == "bundled"
    (choice,) = answer["choices"]
    assert choice["text"] == TOKENIZER.decode(reference[:16])
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    num_prompt = len(TOKENIZER.encode(PROMPT))
    assert answer["usage"] == {"prompt_tokens": num_prompt, "completion_tokens": 16, "total_tokens": num_prompt + 16}


def test_a_stream_adds_up_to_the_completion(client: httpx.Client) -> None:
    whole = complete(client)["choices"][0]
    chunks = stream(client, "/v1/completions", {**GREEDY, "stream_options": {"include_usage": True}})

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole["text"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len(chunks) > 5
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[-3:-1]] == [None, "length"]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 16
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_a_stream_has_no_usage_unless_asked(client: httpx.Client) -> None:
    assert not any("usage" in chunk for chunk in stream(client, "/v1/completions", GREEDY))


@pytest.mark.parametrize("first", [3, 8, 15])
@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_stop_string_ends_the_text_wherever_tokens_begin(
    client: httpx.Client, reference: list[int], first: int, is_streamed: bool
) -> None:
    text = TOKENIZER.decode(reference[:40])
    stop = text[first : first + 5]
    expected, _ = slow_oracle(text, [stop])
    asked = {**GREEDY, "max_tokens": 40, "stop": ["never there", stop]}
    if is_streamed:
        chunks = stream(client, "/v1/completions", asked)
        found = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        answer = complete(client, **asked)
        found, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
        # It stops with the token that completes the match.
        needed = next(n for n in range(41) if slow_oracle(TOKENIZER.decode(reference[:n]), [stop])[1])
        assert answer["usage"]["completion_tokens"] == needed
    assert (found, reason) == (expected, "stop")


def test_an_end_of_text_can_be_ignored(client: httpx.Client) -> None:
    answer = complete(client, prompt="print()\n", max_tokens=60, temperature=2.0, seed=0, n=4, ignore_eos=True)

    assert answer["usage"]["completion_tokens"] == 240
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}


def test_characters_of_several_tokens_are_never_cut(client: httpx.Client) -> None:
    asked = {"temperature": 2.0, "max_tokens": 60, "n": 4, "seed": 5, "ignore_eos": True}
    whole = complete(client, **asked)["choices"]
    pieces: list[list[str]] = [[] for _ in whole]
    for chunk in stream(client, "/v1/completions", {**GREEDY, **asked}):
        pieces[chunk["choices"][0]["index"]].append(chunk["choices"][0]["text"])

    assert ["".join(own) for own in pieces] == [choice["text"] for choice in whole]


def test_a_seed_decides_every_choice_and_more_choices_change_none(client: httpx.Client) -> None:
    def texts(n: int, seed: int | None) -> list[str]:
        answer = complete(client, temperature=1, n=n, seed=seed)
        return [choice["text"] for choice in sorted(answer["choices"], key=lambda choice: choice["index"])]

    eight = texts(8, 7)
    assert texts(8, 7) == eight
    assert texts(1, 7) == eight[:1]
    assert len(set(eight)) > 4
    assert texts(8, 8) != eight
    assert texts(8, None) != texts(8, None)


def test_prompts_in_a_list_are_answered_in_order_as_if_alone(client: httpx.Client) -> None:
    prompts = ["import os\n", "class A:\n", PROMPT]
    answer = complete(client, prompt=prompts, n=2)
    by_index = {choice["index"]: choice["text"] for choice in answer["choices"]}

    alone = [complete(client, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    assert [by_index[index] for index in range(6)] == [text for text in alone for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(len(TOKENIZER.encode(prompt)) for prompt in prompts)


def test_token_ids_are_a_prompt_too(client: httpx.Client) -> None:
    token_ids = TOKENIZER.encode(PROMPT)

    assert complete(client, prompt=token_ids)["choices"] == complete(client)["choices"]
    assert len(complete(client, prompt=[token_ids, token_ids])["choices"]) == 2


def test_top_k_1_is_greedy(client: httpx.Client) -> None:
    assert complete(client, temperature=1, top_k=1)["choices"] == complete(client)["choices"]


def test_token_ids_are_said_when_asked_for(client: httpx.Client, reference: list[int]) -> None:
    asked = {**GREEDY, "return_token_ids": True}
    chunks = stream(client, "/v1/completions", asked)

    assert complete(client, **asked)["choices"][0]["token_ids"] == reference[:16]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[token] for token in reference[:16]]
    assert "token_ids" not in complete(client)["choices"][0]


def test_the_load_that_measures_other_servers_drives_ours(server: ServerProcess, reference: list[int]) -> None:
    sampling = SamplingParams(max_tokens=16)
    requests = [
        Request(request_id=str(index), prompt_token_ids=tuple(TOKENIZER.encode(PROMPT)), sampling=sampling)
        for index in range(3)
    ]
    endpoint = HttpEndpoint(server.url, model="bundled", api_key=server.key, extra={"return_token_ids": True})
    with endpoint:
        result = drive(endpoint, Load(requests=tuple(requests), concurrency=3))

    assert all(result.tokens[request.request_id] == tuple(reference[:16]) for request in requests)
    assert [sample.output_tokens for sample in result.samples] == [16] * 3


def test_logprobs_of_a_completion(client: httpx.Client, reference: list[int]) -> None:
    choice = complete(client, logprobs=3)["choices"][0]
    scores = choice["logprobs"]

    assert scores["tokens"] == [TOKENIZER.decode([token]) for token in reference[:16]]
    assert all(
        max(top.values()) == own for top, own in zip(scores["top_logprobs"], scores["token_logprobs"], strict=True)
    )
    assert all(len(top) == 3 and sum(map(_exp, top.values())) <= 1 for top in scores["top_logprobs"])
    assert [choice["text"][offset:][:1] for offset in scores["text_offset"]] == [word[:1] for word in scores["tokens"]]


def _exp(value: float) -> float:
    return float(2.718281828459045**value)


def test_chat_goes_through_the_models_template(client: httpx.Client) -> None:
    messages = [{"role": "system", "content": "import os"}, {"role": "user", "content": "import sys"}]
    asked = {"model": "bundled", "messages": messages, "temperature": 0, "max_completion_tokens": 12}
    answer = client.post("/v1/chat/completions", json=asked).json()
    plain = complete(client, prompt="import os\nimport sys\n", max_tokens=12)

    message = answer["choices"][0]["message"]
    assert answer["object"] == "chat.completion"
    assert (message["role"], message["content"]) == ("assistant", plain["choices"][0]["text"])
    assert answer["usage"] == plain["usage"]
    chunks = stream(client, "/v1/chat/completions", asked)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == message["content"]


def test_logprobs_of_a_chat(client: httpx.Client) -> None:
    asked = {"model": "bundled", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "max_tokens": 4}
    answer = client.post("/v1/chat/completions", json={**asked, "top_logprobs": 2}).json()
    content = answer["choices"][0]["logprobs"]["content"]

    assert len(content) == answer["usage"]["completion_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert all(bytes(token["bytes"]).decode() == token["token"] for token in content if token["bytes"])
    assert not client.post("/v1/chat/completions", json=asked).json()["choices"][0]["logprobs"]["content"][0][
        "top_logprobs"
    ]


def test_without_a_bound_a_chat_may_take_what_the_model_has_room_for(client: httpx.Client) -> None:
    asked = {"model": "bundled", "messages": [{"role": "user", "content": "x"}], "ignore_eos": True}

    assert client.post("/v1/chat/completions", json=asked).json()["usage"]["total_tokens"] == 128


def test_models_health_and_metrics(client: httpx.Client) -> None:
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["bundled"]
    assert client.get("/v1/models/bundled").json()["max_model_len"] == 128
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}
    complete(client)
    page = client.get("/metrics")
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert metric(client, "time_to_first_token_seconds_count") >= 1
    assert metric(client, "inter_token_latency_seconds_count") >= 15
    assert metric(client, "kv_bytes") > 0


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"model": "other"}, 404),
        ({"prompt": ""}, 400),
        ({"prompt": [4096]}, 400),
        ({"prompt": [5] * 128, "max_tokens": 1}, 400),
        ({"prompt": [5] * 120, "max_tokens": 9}, 400),
        ({"max_tokens": 10**6}, 400),
        ({"n": bounds.CHOICES + 1}, 400),
        ({"prompt": ["a"] * (bounds.PROMPTS + 1)}, 400),
        ({"prompt": ["a"] * (bounds.PROMPTS // 2 + 1), "n": bounds.CHOICES}, 400),
        ({"stop": ["a"] * (bounds.STOPS + 1)}, 400),
        ({"stop": "a" * (bounds.STOP_CHARS + 1)}, 400),
        ({"echo": True}, 400),
        ({"unknown": 1}, 400),
        ({"prompt": "x" * bounds.BODY_BYTES}, 413),
        ({"prompt": "x" * (bounds.BODY_BYTES - 200)}, 400),
    ],
    ids=lambda value: f"{value!s:.30}",
)
def test_a_bound_and_one_more_is_refused_in_openais_words(
    client: httpx.Client, fields: dict[str, Any], status: int
) -> None:
    answer = client.post("/v1/completions", json={**GREEDY, **fields})

    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) < 400


def test_a_connection_that_stays_open_is_answered_at_once(client: httpx.Client) -> None:
    """Not 40 ms later, when a client that delays its acknowledgement says that it has the first half of an answer."""
    seconds = sorted(client.get("/health").elapsed.total_seconds() for _ in range(20))

    assert seconds[3] < 0.03


def test_requests_beyond_their_bounds_leave_no_memory_behind(server: ServerProcess, client: httpx.Client) -> None:
    most = bounds.BODY_BYTES
    bodies = [
        {**GREEDY, "prompt": "x" * (most - 200)},
        {**GREEDY, "prompt": [5] * (most // 3 - 100)},
        {**GREEDY, "prompt": [[5] * 4000] * 65},
        {**GREEDY, "logit_bias": {str(key): 1 for key in range(50_000)}},
        {"model": "bundled", "messages": [{"role": "user", "content": "x"}] * (bounds.MESSAGES + 1)},
        {"model": "bundled", "messages": [{"role": "user", "content": "x" * (most - 200)}]},
    ]

    def send_all() -> None:
        for body in bodies:
            route = "/v1/chat/completions" if "messages" in body else "/v1/completions"
            content = json.dumps(body, separators=(",", ":"))
            answer = client.post(route, content=content, headers={"content-type": "application/json"})
            assert answer.status_code == 400, answer.text

    process = psutil.Process(server.pid)
    send_all()
    before = process.memory_info().rss
    for _ in range(4):
        send_all()

    assert process.memory_info().rss - before < 20 * 2**20


def test_a_body_that_grows_past_its_bound_is_cut_off(client: httpx.Client) -> None:
    def parts() -> Any:
        for _ in range(40):
            yield b" " * 2**16

    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=parts(), headers=headers).status_code == 413


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/jsonp"])
def test_only_json_is_a_body(client: httpx.Client, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}

    assert client.post("/v1/completions", content=json.dumps(GREEDY), headers=headers).status_code == 415


def test_a_compressed_body_is_refused(client: httpx.Client) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}

    assert client.post("/v1/completions", content=b"\x1f\x8b", headers=headers).status_code == 415


def test_every_route_but_health_wants_the_key(server: ServerProcess, client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert len(routes) >= 7
    others = [("get", "/openapi.json"), ("get", "/docs"), ("get", "/nowhere"), ("options", "/v1/completions")]
    wrong = [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {server.key}"},
        {"Authorization": server.key},
    ]
    for method, path in [*routes, *others]:
        path = path.replace("{model}", "bundled")
        for headers in wrong:
            answer = httpx.request(method, server.url + path, headers=headers)
            assert answer.status_code == (200 if path == "/health" else 401), (method, path)
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": f"bearer {server.key}"}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "10.0.0.1", "localhost.evil.example"])
def test_a_foreign_host_is_refused_on_every_route(client: httpx.Client, host: str) -> None:
    for path in ("/health", "/v1/models", "/metrics"):
        assert client.get(path, headers={"Host": host}).status_code == 403
    assert client.post("/v1/completions", json=GREEDY, headers={"Host": host}).status_code == 403


def test_a_foreign_origin_is_refused_and_no_origin_is_ever_allowed(client: httpx.Client) -> None:
    assert client.post("/v1/completions", json=GREEDY, headers={"Origin": "http://evil.example"}).status_code == 403
    for origin in ("http://localhost:3000", "http://evil.example"):
        for method in ("GET", "OPTIONS"):
            answer = client.request(method, "/v1/models", headers={"Origin": origin})
            assert not [name for name in answer.headers if name.startswith("access-control")]


def test_unknown_routes_and_methods_are_refused_in_openais_words(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_one_too_many_waits_is_429_and_leaving_frees_every_place(client: httpx.Client) -> None:
    many = {**GREEDY, "prompt": [PROMPT] * 32, "n": 8, "max_tokens": 100, "ignore_eos": True}
    wait_until(lambda: metric(client, "sequences_running") + metric(client, "sequences_waiting") == 0)
    aborted = metric(client, "sequences_aborted_total")
    with client.stream("POST", "/v1/completions", json={**many, "stream": True}) as first:
        lines = first.iter_lines()
        next(lines)
        answer = client.post("/v1/completions", json=many)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full"
        assert metric(client, "sequences_waiting") > 200

    wait_until(lambda: metric(client, "sequences_running") + metric(client, "sequences_waiting") == 0)
    assert metric(client, "sequences_aborted_total") >= aborted + 250
    started = time.monotonic()
    complete(client)  # is not behind what was left
    assert time.monotonic() - started < 10


def test_leaving_while_waiting_for_a_whole_answer_frees_the_slot(server: ServerProcess, client: httpx.Client) -> None:
    aborted = metric(client, "sequences_aborted_total")
    body = json.dumps({**GREEDY, "max_tokens": 100, "n": 8, "ignore_eos": True}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {server.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        wait_until(lambda: metric(client, "sequences_running") > 0)

    wait_until(lambda: metric(client, "sequences_running") + metric(client, "sequences_waiting") == 0)
    assert metric(client, "sequences_aborted_total") > aborted


def test_prompts_and_answers_are_not_in_the_log(server: ServerProcess, client: httpx.Client) -> None:
    complete(client, prompt="a very private prompt")
    client.post("/v1/completions", json={**GREEDY, "prompt": ["a very private prompt"], "oops": 1})

    assert "private" not in server.stderr

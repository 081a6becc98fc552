"""What clients that mean harm cost a server and its other clients; a part of serve_soak.py.

refusals    one request past each bound: answered 4xx within 50 ms (median of five), memory grows by less than 20 MiB
            over all of them and over many requests of which each says something new
neighbours  well-behaved clients ask one request after the other, in turns alone and beside one kind of attack; their
            p99 end-to-end time beside it over alone is below 2
templates   each hostile template of tests/serve/test_chat_template.py: answered within 2 s, and nothing was executed

What the attacks are: serve_attacks.py.
"""

import asyncio
import contextlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from codesign.bundled import target_path
from codesign.results.measurement import statistic
from codesign.serve import bounds
from codesign.serve.chat_template import ChatTemplate, TemplateFailed
from tests.benchmarks.serve_attacks import ATTACKS, GOOD, Attack, Tally, attacking, chats
from tests.serve.process import ServerProcess
from tests.serve.test_chat_template import HOSTILE, MESSAGES

NUM_GOOD = 4
MAX_REFUSAL_MS, MAX_TEMPLATE_S, MAX_SLOWDOWN, MAX_GROWTH_BYTES = 50, 2, 2, 20 * 2**20
TEMPLATE = "nested_range"  # the one that takes all of its second of processor time


def hostile(server: ServerProcess, config: str, *, seconds: float, rounds: int, num_distinct: int) -> dict[str, Any]:
    """Everything above, with the checks that it comes to."""
    refused = refusals(server, num_distinct)
    beside = {name: asyncio.run(neighbours(server, attack, seconds, rounds)) for name, attack in ATTACKS.items()}
    rendered = templates()
    with tempfile.TemporaryDirectory() as name:
        own = ServerProcess(Path(name), config, "--model", str(hostile_model(Path(name), HOSTILE[TEMPLATE])))
        try:
            beside[f"chats whose template never ends ({TEMPLATE})"] = asyncio.run(
                neighbours(own, chats, seconds, rounds)
            )
            own.stop()
        finally:
            own.kill()
    slowest = max(refused["median_ms"], key=lambda what: refused["median_ms"][what])
    checks = {
        f"a request past a bound is refused within {MAX_REFUSAL_MS} ms": refused["median_ms"][slowest] < MAX_REFUSAL_MS,
        f"those and {num_distinct} distinct requests leave less than {MAX_GROWTH_BYTES // 2**20} MiB": max(
            refused["growth_bytes"], refused["distinct_growth_bytes"]
        )
        < MAX_GROWTH_BYTES,
        f"{len(rendered)} hostile templates are answered within {MAX_TEMPLATE_S} s and execute nothing": all(
            own["seconds"] < MAX_TEMPLATE_S and not own["wrote"] for own in rendered.values()
        ),
        **{
            f"p99 of others below {MAX_SLOWDOWN}x beside {what}": own["ratio"] < MAX_SLOWDOWN
            and own["attacks"]["begun"] > 0
            for what, own in beside.items()
        },
    }
    return {"checks": checks, "refusals": refused, "neighbours": beside, "templates": rendered}


# ---- Refusals ----------------------------------------------------------------------------------------------------


def beyond() -> dict[str, tuple[str, bytes]]:
    """What is one too many -> (route, body)."""
    chat = [{"role": "user", "content": "x"}]
    fields: dict[str, dict[str, Any]] = {
        "n": {"n": bounds.CHOICES + 1},
        "prompts": {"prompt": ["a"] * (bounds.PROMPTS + 1)},
        "sequences": {"prompt": ["a"] * (bounds.PROMPTS // 2 + 1), "n": bounds.CHOICES},
        "prompt tokens": {"prompt": [5] * 4096},
        "max_tokens": {"max_tokens": 2**31},
        "stops": {"stop": ["a"] * (bounds.STOPS + 1)},
        "stop characters": {"stop": "a" * (bounds.STOP_CHARS + 1)},
        "logprobs": {"logprobs": bounds.TOP_LOGPROBS + 1},
        "user characters": {"user": "a" * (bounds.USER_CHARS + 1)},
        "unknown field": {"a_field": 1},
        "messages": {"messages": chat * (bounds.MESSAGES + 1)},
        "body": {"prompt": "x" * bounds.BODY_BYTES},
    }
    found = {}
    for what, changes in fields.items():
        is_chat = "messages" in changes
        body = {"model": "bundled", **changes} if is_chat else {**GOOD, **changes}
        found[what] = ("/v1/chat/completions" if is_chat else "/v1/completions", json.dumps(body).encode())
    return found


def refusals(server: ServerProcess, num_distinct: int) -> dict[str, Any]:
    process = psutil.Process(server.pid)
    headers = {**server.headers, "content-type": "application/json"}
    times: dict[str, float] = {}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as client:
        client.post("/v1/completions", json=GOOD).raise_for_status()
        before = process.memory_info().rss
        for what, (route, body) in beyond().items():
            seen = []
            for _ in range(5):
                started = time.perf_counter()
                answer = client.post(route, content=body)
                seen.append((time.perf_counter() - started) * 1e3)
                assert 400 <= answer.status_code < 500, (what, answer.text)
            times[what] = statistic(seen, "p50")
    growth = process.memory_info().rss - before
    asyncio.run(distinct(server, range(num_distinct // 10)))  # what a server keeps for its use is taken first
    before = process.memory_info().rss
    asyncio.run(distinct(server, range(num_distinct // 10, num_distinct)))
    grown = process.memory_info().rss - before
    return {"median_ms": times, "growth_bytes": growth, "distinct_growth_bytes": grown, "num_distinct": num_distinct}


async def distinct(server: ServerProcess, numbers: range) -> None:
    """Requests of which no two have prompt, user, stop or seed in common."""
    waiting = iter(numbers)
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=60) as client:

        async def some() -> None:
            for number in waiting:
                own = {"prompt": f"{number} is", "user": f"u{number}", "stop": f"s{number}", "seed": number}
                answer = await client.post("/v1/completions", json={**GOOD, **own, "max_tokens": 1})
                assert answer.status_code == 200, answer.text

        await asyncio.gather(*(some() for _ in range(16)))


# ---- Neighbours --------------------------------------------------------------------------------------------------


async def neighbours(server: ServerProcess, attack: Attack, seconds: float, rounds: int) -> dict[str, Any]:
    """End-to-end milliseconds of well-behaved clients, alone and beside an attack in turns."""
    found: dict[str, list[float]] = {"alone": [], "beside": []}
    tally = Tally()
    async with httpx.AsyncClient(base_url=server.url, headers=server.headers, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        for turn in range(2 * rounds):
            name = "beside" if turn % 2 else "alone"
            async with attacking(attack, server, tally) if turn % 2 else contextlib.nullcontext():
                end = time.monotonic() + seconds
                await asyncio.gather(*(well_behaved(client, model, end, found[name]) for _ in range(NUM_GOOD)))
    p99 = {name: statistic(values, "p99") for name, values in found.items()}
    return {
        "ratio": p99["beside"] / p99["alone"],
        "p99_ms": p99,
        "p50_ms": {name: statistic(values, "p50") for name, values in found.items()},
        "num_requests": {name: len(values) for name, values in found.items()},
        "attacks": dict(tally),
    }


async def well_behaved(client: httpx.AsyncClient, model: str, end: float, times_ms: list[float]) -> None:
    while time.monotonic() < end:
        started = time.perf_counter()
        answer = await client.post("/v1/completions", json={**GOOD, "model": model})
        times_ms.append((time.perf_counter() - started) * 1e3)
        assert answer.status_code == 200, answer.text


# ---- Templates ---------------------------------------------------------------------------------------------------


def hostile_model(folder: Path, template: str) -> Path:
    """The bundled model with another chat template."""
    model = folder / "hostile"
    model.mkdir()
    for file in target_path().iterdir():
        (model / file.name).symlink_to(file)
    (model / "chat_template.jinja").write_text(template)
    return model


def templates() -> dict[str, dict[str, Any]]:
    """Each hostile template -> seconds until it was answered, a second rendering, and whether it wrote its file."""
    found, before = {}, Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            for what, source in HOSTILE.items():
                template = ChatTemplate(source.replace("MARKER", f"{name}/marker"), {})
                with contextlib.suppress(TemplateFailed):
                    template.render(MESSAGES)  # starts its process
                started = time.perf_counter()
                with contextlib.suppress(TemplateFailed):
                    template.render(MESSAGES)
                found[what] = {"seconds": time.perf_counter() - started, "wrote": any(Path(name).iterdir())}
                template.close()
        finally:
            os.chdir(before)
    return found


def report(harm: dict[str, Any]) -> list[str]:
    """What `hostile` found, in lines of Markdown."""
    refused, rendered = harm["refusals"], harm["templates"]
    lines = [
        f"End-to-end times of {NUM_GOOD} well-behaved clients, in turns alone and beside an attack:",
        "",
        "| attack | p99 alone, ms | p99 beside it, ms | ratio | p50 alone / beside | requests alone / beside | made |",
        "|---|---|---|---|---|---|---|",
    ]
    for what, own in harm["neighbours"].items():
        p99, p50, count = own["p99_ms"], own["p50_ms"], own["num_requests"]
        made = ", ".join(f"{number} {name}" for name, number in sorted(own["attacks"].items()))
        lines.append(
            f"| {what} | {p99['alone']:.0f} | {p99['beside']:.0f} | {own['ratio']:.2f} | "
            f"{p50['alone']:.0f} / {p50['beside']:.0f} | {count['alone']} / {count['beside']} | {made} |"
        )
    return [
        *lines,
        "",
        "| one too many | refused after, ms (median of 5) |",
        "|---|---|",
        *(f"| {what} | {value:.1f} |" for what, value in refused["median_ms"].items()),
        "",
        f"Memory grew by {refused['growth_bytes'] / 2**20:.1f} MiB over these, and by "
        f"{refused['distinct_growth_bytes'] / 2**20:.1f} MiB over the last 90 % of {refused['num_distinct']} requests "
        "of which each said something new.",
        f"The slowest of {len(rendered)} hostile templates was answered after "
        f"{max(own['seconds'] for own in rendered.values()):.2f} s.",
    ]

"""Whether `codesign serve` holds: requests made from its own schema, then many clients of which some leave early.

    PYTHONPATH=. python tests/benchmarks/serve_soak.py [--cases 2000] [--clients 200] [--seconds 60]
        [--hostile-seconds 2] [--distinct 10000] [--out FILE]

Fuzz: schemathesis sends `--cases` requests made from the server's OpenAPI document, valid and not; a 5xx ends it.
Soak: `--clients` clients, each asking one request after the other for `--seconds`; a quarter of the requests is dropped
at a random moment. Every answer that is finished is compared with what the engine says to that request alone (greedy,
fp32; a difference counts unless the two likeliest tokens lie within 1e-4 there). Afterwards no sequence is left in the
server, all slots work, and memory stays where it was half-way.
Hostile clients (serve_hostile.py): what is past a bound is refused quickly and leaves nothing behind, and the p99 of
others stays below twice what it is without them. Writes reports/benchmarks/serve_soak.json and .md; exits
1 when a check does not hold.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.measure.provenance import provenance
from codesign.results.measurement import statistic
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request, SamplingParams
from tests.benchmarks.serve_hostile import hostile
from tests.benchmarks.serve_hostile import report as report_harm
from tests.serve.fuzz import fuzz
from tests.serve.process import ServerProcess

REPORTS = Path(__file__).parents[2] / "reports" / "benchmarks"
CONFIG = {"dtype": "fp32", "max_batch_size": 32, "max_model_len": 160}
NUM_KINDS = 96
SHARE_DROPPED = 0.25
TIE = 1e-4
MAX_GROWTH_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Kind:
    """One request and what the engine says to it alone.

    Attributes:
        token_ids: its greedy output.
        gaps: between the two likeliest tokens, in log probability, at each token.
    """

    body: dict[str, Any]
    token_ids: list[int]
    gaps: list[float]

    def agrees(self, found: list[int]) -> bool:
        """Whether an answer is this one, or left it at a tie."""
        if found == self.token_ids:
            return True
        pairs = enumerate(zip(found, self.token_ids, strict=False))
        index = next((i for i, (a, b) in pairs if a != b), None)
        return index is not None and self.gaps[index] < TIE


@dataclasses.dataclass
class Outcomes:
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    ttft_ms: list[float] = dataclasses.field(default_factory=list)
    e2e_ms: list[float] = dataclasses.field(default_factory=list)
    wrong: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    rss_bytes: list[int] = dataclasses.field(default_factory=list)


def kinds(engine: Engine, tokenizer: Tokenizer, seed: int) -> list[Kind]:
    draw = random.Random(seed)
    texts = [document.text for document in heldout_texts()]
    found = []
    for index in range(NUM_KINDS):
        token_ids = tokenizer.encode(draw.choice(texts))
        start = draw.randrange(max(1, len(token_ids) - 64))
        prompt = token_ids[start : start + draw.randint(4, 64)]
        max_tokens = min(96, max(1, round(draw.lognormvariate(2.8, 0.9))))
        sampling = SamplingParams(max_tokens=max_tokens, logprobs=2)
        engine.submit(Request(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        body = {
            "model": "bundled",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            "stream": draw.random() < 0.7,
        }
        gaps = [output.logprobs[1][1] - output.logprobs[2][1] for output in outputs]
        found.append(Kind(body, [output.token_id for output in outputs], gaps))
    return found


async def ask(client: httpx.AsyncClient, kind: Kind, outcomes: Outcomes, *, leave_after_s: float | None) -> None:
    started = time.perf_counter()
    token_ids: list[int] = []
    first_s, is_done = None, False
    try:
        async with asyncio.timeout(leave_after_s), client.stream("POST", "/v1/completions", json=kind.body) as answer:
            if answer.status_code != 200:
                outcomes.counts[f"status {answer.status_code}"] += 1
                return
            if kind.body["stream"]:
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        is_done = True
                    elif line:
                        first_s = first_s or time.perf_counter() - started
                        document = json.loads(line.removeprefix("data: "))
                        if "choices" not in document:  # an error: what came so far is no answer
                            break
                        token_ids += document["choices"][0]["token_ids"]
            else:
                token_ids, is_done = json.loads(await answer.aread())["choices"][0]["token_ids"], True
    except TimeoutError:
        outcomes.counts["left early"] += 1
        return
    if not is_done:
        outcomes.counts["cut off"] += 1
        return
    outcomes.counts["finished"] += 1
    outcomes.e2e_ms.append((time.perf_counter() - started) * 1e3)
    if first_s is not None:
        outcomes.ttft_ms.append(first_s * 1e3)
    if not kind.agrees(token_ids):
        outcomes.wrong.append({"body": kind.body, "expected": kind.token_ids, "found": token_ids})


async def soak(server: ServerProcess, kinds: list[Kind], args: argparse.Namespace) -> Outcomes:
    outcomes, process = Outcomes(), psutil.Process(server.pid)
    limits = httpx.Limits(max_connections=args.clients + 8, max_keepalive_connections=args.clients)
    async with httpx.AsyncClient(
        base_url=server.url, headers=server.headers, timeout=httpx.Timeout(300), limits=limits
    ) as client:
        end = time.monotonic() + args.seconds

        async def one(number: int) -> None:
            draw = random.Random(f"{args.seed}/{number}")
            while time.monotonic() < end:
                leaves = draw.random() < SHARE_DROPPED
                leave_after_s = draw.expovariate(1 / 2.0) if leaves else None
                await ask(client, draw.choice(kinds), outcomes, leave_after_s=leave_after_s)

        async def watch() -> None:
            while True:
                outcomes.rss_bytes.append(process.memory_info().rss)
                await asyncio.sleep(1)

        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number) for number in range(args.clients)))
        watching.cancel()
        outcomes.counts["live sequences 30 s later"] = await live_sequences(client, within_s=30)
        outcomes.rss_bytes.append(process.memory_info().rss)
        after = Outcomes()
        await asyncio.gather(*(ask(client, kind, after, leave_after_s=None) for kind in kinds[:32]))
        outcomes.counts["right answers of 32 asked at once afterwards"] = after.counts["finished"] - len(after.wrong)
    return outcomes


async def live_sequences(client: httpx.AsyncClient, *, within_s: float) -> int:
    """How many the server holds; waits for none."""
    deadline = time.monotonic() + within_s
    while True:
        page = (await client.get("/metrics")).text
        live = sum(int(value) for value in re.findall(r"^codesign_sequences_(?:running|waiting) (\d+)$", page, re.M))
        if not live or time.monotonic() > deadline:
            return live
        await asyncio.sleep(0.2)


def checks(cases: Counter[tuple[str, int]], outcomes: Outcomes, num_cases: int) -> dict[str, bool]:
    rss = outcomes.rss_bytes
    counts = outcomes.counts
    return {
        f"schemathesis: {sum(cases.values())} requests of {num_cases} asked for, no 5xx": sum(cases.values())
        >= 0.9 * num_cases,
        "every finished answer is the engine's own": counts["finished"] > 0 and not outcomes.wrong,
        "nobody who stayed was cut off or refused": not any(
            count for name, count in counts.items() if name == "cut off" or name.startswith("status")
        ),
        "some left early": counts["left early"] > 0,
        "no sequence is left in the server": counts["live sequences 30 s later"] == 0,
        "all slots still work": counts["right answers of 32 asked at once afterwards"] == 32,
        f"memory grew by less than {MAX_GROWTH_BYTES // 2**20} MiB since half-way": rss[-1] - rss[len(rss) // 2]
        < MAX_GROWTH_BYTES,
    }


def report(document: dict[str, Any]) -> str:
    facts, soaked = document["facts"], document["soak"]
    machine = facts["provenance"]["machine"]
    lines = [
        "# A server under fuzzing and load",
        "",
        f"`{facts['command']}`, {facts['date']}: {machine['cpu']}, {machine['cores']} cores, torch "
        f"{facts['provenance']['versions']['torch']}, commit {str(facts['provenance']['code']['commit'])[:12]}, load "
        f"average before and after {facts['load_average']}; clients and server share the machine.",
        f"Bundled model, {CONFIG}; engine on one thread.",
        "",
        "| check | holds |",
        "|---|---|",
        *(f"| {name} | {'yes' if holds else '**no**'} |" for name, holds in document["checks"].items()),
        "",
        f"## {soaked['clients']} clients for {soaked['seconds']} s",
        "",
        "| what | value |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(soaked["counts"].items())),
    ]
    for name in ("ttft_ms", "e2e_ms"):
        for percentile, value in soaked[name].items():
            lines.append(f"| {name} {percentile} | {value:.0f} |")
    lines += [
        f"| resident memory half-way, at the end, at most (MiB) | {' / '.join(map(str, soaked['rss_mib']))} |",
        "",
        "## Hostile clients",
        "",
        *report_harm(document["hostile"]),
        "",
        "## Fuzzing",
        "",
        "| route | status | answers |",
        "|---|---|---|",
        *(f"| {path} | {status} | {count} |" for path, status, count in document["fuzz"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument(
        "--hostile-seconds", type=float, default=2, help="of each of 8 turns with and without an attack"
    )
    parser.add_argument("--distinct", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=REPORTS / "serve_soak.json")
    args = parser.parse_args()
    load_before = os.getloadavg()[0]
    model = ModelSpec(name="bundled", path=str(target_path()))
    alone = build_engine(model, EngineConfig.from_dict({**CONFIG, "max_batch_size": 1}), num_threads=1)
    asked = kinds(alone, Tokenizer(target_path()), args.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = ServerProcess(Path(folder), json.dumps(CONFIG))
        try:
            print(f"{args.cases} requests from the schema", file=sys.stderr, flush=True)
            cases = fuzz(server.url, server.headers, num_cases=args.cases, seed=args.seed)
            print(f"{args.clients} clients for {args.seconds:g} s", file=sys.stderr, flush=True)
            outcomes = asyncio.run(soak(server, asked, args))
            print("hostile clients", file=sys.stderr, flush=True)
            harm = hostile(
                server, json.dumps(CONFIG), seconds=args.hostile_seconds, rounds=8, num_distinct=args.distinct
            )
            server.stop()
        finally:
            server.kill()
    rss = outcomes.rss_bytes
    document = {
        "facts": {
            "command": " ".join(["PYTHONPATH=. python tests/benchmarks/serve_soak.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "config": CONFIG,
            "provenance": provenance(model, "cpu"),
            "packages": {name: metadata.version(name) for name in ("fastapi", "uvicorn", "schemathesis", "httpx")},
            "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
        },
        "checks": checks(cases, outcomes, args.cases) | harm.pop("checks"),
        "hostile": harm,
        "fuzz": [[path, status, count] for (path, status), count in sorted(cases.items())],
        "soak": {
            "clients": args.clients,
            "seconds": args.seconds,
            "counts": dict(outcomes.counts),
            "ttft_ms": {name: statistic(outcomes.ttft_ms, name) for name in ("p50", "p90", "p99")},
            "e2e_ms": {name: statistic(outcomes.e2e_ms, name) for name in ("p50", "p90", "p99")},
            "rss_mib": [round(value / 2**20) for value in (rss[len(rss) // 2], rss[-1], max(rss))],
            "wrong": outcomes.wrong[:10],
        },
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(report(document))
    print(args.out.with_suffix(".md").read_text())
    return 0 if all(document["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())

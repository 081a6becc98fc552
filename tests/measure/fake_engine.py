"""An engine that computes nothing: token i of a request is the request's first prompt token plus i."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.request import Request

FACTS: dict[str, Any] = {
    "resolved": {"kv_budget_tokens": [64, 64], "dtype": "bf16"},
    "bytes": {"weights": 1000, "kv": 2000},
    "kernels": {"linear": "none"},
    "phases": {"load": 0.01, "allocate": 0},
}


@dataclasses.dataclass(frozen=True)
class Output:
    request_id: str
    token_id: int
    finish_reason: str


class FakeEngine:
    """Args: step_s: how long each step takes."""

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.requests: dict[str, tuple[Request, int]] = {}
        self.has_closed = False

    def submit(self, request: Request) -> None:
        self.requests[request.request_id] = (request, 0)

    def abort(self, request_id: str) -> None:
        del self.requests[request_id]

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> list[Output]:
        time.sleep(self.step_s)
        outputs = []
        for request_id, (request, done) in list(self.requests.items()):
            is_last = done + 1 == request.sampling.max_tokens
            outputs.append(Output(request_id, request.prompt_token_ids[0] + done, "length" if is_last else ""))
            self.requests[request_id] = (request, done + 1)
            if is_last:
                del self.requests[request_id]
        return outputs

    def facts(self) -> Mapping[str, Any]:
        return FACTS

    def speculation_stats(self) -> Mapping[str, Any]:
        return {"table": {"1": 4}, "acceptance": 0.5}

    def stats(self) -> Mapping[str, int]:
        return {"preemptions": 3}

    def kv_use(self) -> None:
        return None

    def close(self) -> None:
        self.has_closed = True


def build(model: ModelSpec, config: EngineConfig, *, device: str, num_threads: int | None) -> FakeEngine:
    return FakeEngine()


def build_slow(model: ModelSpec, config: EngineConfig, *, device: str, num_threads: int | None) -> FakeEngine:
    """One step each 20 ms."""
    return FakeEngine(step_s=0.02)


def build_heavy(model: ModelSpec, config: EngineConfig, *, device: str, num_threads: int | None) -> FakeEngine:
    """Takes 100 MiB and gives them back."""
    _ = bytearray(100 * 2**20)
    return FakeEngine()


def build_marking(model: ModelSpec, config: EngineConfig, *, device: str, num_threads: int | None) -> FakeEngine:
    """Closing it writes the file that the model is named after."""
    engine = FakeEngine()
    engine.close = lambda: Path(model.name).write_text("closed")  # type: ignore[method-assign, assignment, return-value]
    return engine


def run_suite(engine: FakeEngine, suite: Mapping[str, Any], progress: Callable[..., None]) -> Mapping[str, Any]:
    """Says progress for `suite["steps"]` steps of 0.1 s, then gives the suite back."""
    for step in range(suite.get("steps", 0)):
        time.sleep(0.1)
        progress(step)
    if "count_only" in suite:
        return {"num_items": len(suite["count_only"])}
    return {"suite": dict(suite), "was_closed": engine.has_closed}

"""Small real engines, and how to run them to the end."""

import random
from typing import Any

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.step import StepPlan
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams

DEFAULTS: dict[str, Any] = {"dtype": "fp32", "max_batch_size": 4, "max_model_len": 256}


def tiny_engine(
    architecture: str = "LlamaForCausalLM", *, shape: dict[str, Any] | None = None, **config: Any
) -> Engine:
    return build_engine(tiny_spec(architecture, **(shape or {})), EngineConfig.from_dict({**DEFAULTS, **config}))


def request(name: str, num_prompt: int, max_tokens: int, **sampling: Any) -> Request:
    """A prompt of random tokens that depends on `name` only."""
    tokens = random.Random(name).choices(range(128), k=num_prompt)
    return Request(
        request_id=name,
        prompt_token_ids=tuple(tokens),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


def finish(engine: Engine) -> dict[str, list[int]]:
    """Steps until there is no work; output tokens by request."""
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.request_id, []).append(output.token_id)
    return tokens


def generate(engine: Engine, *requests: Request) -> dict[str, list[int]]:
    for item in requests:
        engine.submit(item)
    return finish(engine)


def recorded_plans(engine: Engine) -> list[StepPlan]:
    """A list that fills with every plan the engine runs."""
    plans: list[StepPlan] = []
    runner = engine.parts.runner
    run = runner.run

    def recording(plan: StepPlan) -> Any:
        plans.append(plan)
        return run(plan)

    runner.run = recording  # type: ignore[method-assign]
    return plans

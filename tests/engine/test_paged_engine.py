"""Engines whose cache is in blocks: how large it is made, what is refused, and that logits are those of a dense one."""

import random
from typing import Any

import pytest
import torch

from codesign.engine.attention.paged import PagedAttention
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.step import StepPlan
from codesign.errors import Unsupported
from codesign.predict.memory import ModelSize, estimate
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import DEFAULTS, generate, recorded_plans, request, tiny_engine
from tests.engine.kv.block_plans import in_blocks


def paged_engine(*, codec: str = "native", **config: Any) -> Engine:
    return tiny_engine(kv={"layout": "paged", "codec": codec}, **config)


def cache(engine: Engine) -> PagedAttention:
    assert isinstance(engine.parts.attention, PagedAttention)
    return engine.parts.attention


@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_a_dense_cache(attention: str, codec: str) -> None:
    """The plans of a busy dense engine, with blocks in any order, through the runner of a paged one."""
    dense = tiny_engine(kv={"codec": codec}, attention=attention, max_step_tokens=40)
    logits: list[torch.Tensor] = []
    plans = recorded_plans(dense)
    run = dense.parts.runner.run
    dense.parts.runner.run = lambda plan: logits.append(run(plan)) or logits[-1]  # type: ignore[method-assign,func-returns-value]
    generate(dense, *(request(f"r{index}", 7 + 31 * index, 12 + 3 * index) for index in range(6)))

    engine = paged_engine(codec=codec, attention=attention)
    own = in_blocks(plans, num_blocks=cache(engine).num_blocks, num_slots=engine.num_slots, seed=0)
    for plan, expected in zip(own, logits, strict=True):
        torch.testing.assert_close(engine.parts.runner.run(plan), expected, rtol=0, atol=2e-5)
    assert len(logits) > 30


def test_a_prefix_is_computed_once_and_gives_the_logits_of_computing_it_again() -> None:
    engine, rng = paged_engine(), random.Random(0)
    tokens = tuple(rng.choices(range(128), k=100))
    first, again = prompt(0, tokens, 0, (9, 4, 2, 7)), prompt(1, tokens, 64, (9, 4, 0, 1))
    expected = engine.parts.runner.run(first)

    torch.testing.assert_close(engine.parts.runner.run(again), expected, rtol=0, atol=1e-5)
    assert cache(engine).kv_use.shared_bytes == 2 * cache(engine).block_bytes
    assert engine.kv_use() == cache(engine).kv_use
    assert tiny_engine().kv_use() is None


def prompt(slot: int, tokens: tuple[int, ...], num_cached: int, blocks: tuple[int, ...]) -> StepPlan:
    own = tokens[num_cached:]
    return StepPlan(
        slots=(slot,),
        query_lens=(len(own),),
        token_ids=own,
        positions=tuple(range(num_cached, len(tokens))),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=(len(own) - 1,),
        blocks=(blocks,),
        num_cached=(num_cached,),
    )


def test_without_a_limit_there_are_blocks_for_the_whole_batch() -> None:
    engine = paged_engine(max_batch_size=3, max_model_len=70)

    assert cache(engine).num_blocks == 3 * 3
    assert engine.facts()["resolved"]["num_blocks"] == 9
    assert engine.facts()["bytes"]["kv"] == 9 * cache(engine).block_bytes + 3 * 3 * 4
    assert engine.facts()["kernels"]["attention"] == cache(engine).kernel


@pytest.mark.parametrize(("share", "num_blocks"), [(1.0, 32), (0.6, 19), (9.0, 32)])
def test_a_limit_takes_blocks_and_no_slots(share: float, num_blocks: int) -> None:
    whole = cache(paged_engine())
    limit = int(share * 32 * whole.block_bytes) + 4 * 8 * 4
    engine = paged_engine(kv_memory_bytes=limit)

    assert (cache(engine).num_blocks, engine.num_slots) == (num_blocks, 4)
    assert cache(engine).kv_bytes <= limit


def test_with_rows_that_are_rounded_there_are_only_sequences_that_always_fit() -> None:
    """A prompt attends to native rows, so that computing a preempted sequence anew would not give the same ones."""
    whole = cache(paged_engine(codec="int8"))
    engine = paged_engine(codec="int8", kv_memory_bytes=int(0.6 * whole.kv_bytes))

    assert engine.num_slots == 2
    assert paged_engine(codec="int8").num_slots == 4


def test_a_prefix_cache_has_the_whole_of_the_memory() -> None:
    limit = 50 * cache(paged_engine()).block_bytes + 4 * 8 * 4
    found = [cache(paged_engine(kv_memory_bytes=limit, prefix_cache=own)).num_blocks for own in (False, True)]

    assert found == [32, 50]


def test_a_limit_below_one_sequence_is_refused_with_the_bytes_it_needs() -> None:
    attention = cache(paged_engine())
    least = 8 * attention.block_bytes + 4 * 8 * 4
    assert cache(paged_engine(kv_memory_bytes=least)).num_blocks == 8

    with pytest.raises(Unsupported, match=rf"max_model_len 256 needs {least} .*, 8 blocks of 32 tokens"):
        paged_engine(kv_memory_bytes=least - 1)
    with pytest.raises(Unsupported, match=rf"needs {least} "):
        paged_engine(kv_memory_bytes=1)


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        ({"policy": {"name": "h2o", "kv_budget": 16}}, "kv.layout paged with kv.policy h2o"),
        ({"codec": "int4"}, "kv.layout paged with kv.codec int4"),
        ({"place": "offload"}, "kv.layout paged with kv.place offload"),
    ],
)
def test_what_blocks_cannot_hold_is_not_built(kv: dict[str, Any], said: str) -> None:
    config = EngineConfig.from_dict({**DEFAULTS, "kv": {"layout": "paged", **kv}})

    with pytest.raises(Unsupported, match=said):
        build_engine(tiny_spec(), config)


@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
def test_the_static_estimate_is_no_more_than_what_is_allocated(codec: str) -> None:
    engine = paged_engine(codec=codec, max_model_len=70)
    architecture = tiny_spec().architecture
    assert architecture is not None
    least = estimate(ModelSize.of(architecture), engine.parts.config).kv_bytes

    assert 0.5 * cache(engine).kv_bytes < least <= cache(engine).kv_bytes

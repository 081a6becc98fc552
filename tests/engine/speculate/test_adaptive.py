"""K from costs that are given here, never measured: what is chosen follows from them alone."""

import dataclasses
import random

import pytest

from codesign.engine.build import build_engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.speculate.adaptive import PROBE_STEPS, Adaptive, StepCosts, tokens_per_step
from codesign.spec.engine_config import EngineConfig
from tests.engine.driving import DEFAULTS, generate, recorded_plans, request

SPEC = dataclasses.replace(tiny_spec(seed=1), draft=tiny_spec(seed=2))


def costs(*, draft: float, extra: float, most: int = 8, batch_sizes: tuple[int, ...] = (1,)) -> StepCosts:
    """A target step of 1 ms, `extra` more for each token verified, `draft` for each proposed, times the batch size
    beyond 1."""
    ks = [0, *(1 << i for i in range(10) if 1 << i <= most)]
    return StepCosts(
        target={size: {k: 1 + extra * k * size for k in ks} for size in batch_sizes},
        draft={size: {k: draft * k for k in ks} for size in batch_sizes},
    )


def after(adaptive: Adaptive, acceptance: float, steps: int = 500, batch_size: int = 1) -> Adaptive:
    """The controller when drafts have been accepted that often for a while."""
    rng = random.Random(0)
    for _ in range(steps):
        chosen, accepted = adaptive.choose(batch_size), 0
        while accepted < chosen and rng.random() < acceptance:
            accepted += 1
        adaptive.observe(min(accepted + 1, chosen), accepted)
    return adaptive


@pytest.mark.parametrize(
    ("acceptance", "cost", "best"),
    [(0.6, 0.05, 4), (0.6, 0.1, 3), (0.6, 0.3, 1), (0.8, 0.05, 8), (0.8, 0.1, 6), (0.8, 0.3, 3), (0.9, 0.05, 13)],
)
def test_the_best_k_is_that_of_the_published_speed_model(acceptance: float, cost: float, best: int) -> None:
    """Where verifying costs nothing extra and a draft token `cost` target steps."""
    assert costs(draft=cost, extra=0, most=32).best(1, acceptance, 20) == best


def test_a_promise_of_a_few_percent_is_not_believed() -> None:
    own = costs(draft=0.5, extra=0)

    assert own.best(1, 0.6, 1) == 0, "1.6 tokens in 1.5 steps"
    assert own.best(1, 0.7, 1) == 1, "1.7 tokens in 1.5 steps"


def test_tokens_per_step_is_the_geometric_sum() -> None:
    assert tokens_per_step(0.8, 4) == pytest.approx((1 - 0.8**5) / (1 - 0.8))
    assert tokens_per_step(1.0, 4) == 5 and tokens_per_step(0.0, 4) == 1 and tokens_per_step(0.5, 0) == 1


def test_acceptance_is_found_from_what_happened() -> None:
    for acceptance in (0.3, 0.8):
        found = after(Adaptive(costs(draft=0.05, extra=0), 8), acceptance).acceptance
        assert found == pytest.approx(acceptance, abs=0.06)


def test_k_rises_with_acceptance_and_falls_with_cost() -> None:
    rising = [after(Adaptive(costs(draft=0.1, extra=0.02), 8), a).table()[1] for a in (0.2, 0.5, 0.9)]
    falling = [after(Adaptive(costs(draft=0.1, extra=extra), 8), 0.8).table()[1] for extra in (0.0, 0.1, 0.5)]

    assert rising == sorted(rising) and rising[0] < rising[-1]
    assert falling == sorted(falling, reverse=True) and falling[0] > falling[-1]


def test_larger_batches_draft_less_where_verifying_costs_more() -> None:
    adaptive = after(Adaptive(costs(draft=0.02, extra=0.05, batch_sizes=(1, 4, 16)), 8), 0.8)
    table = adaptive.table()

    assert table[1] > table[4] > table[16] == 0
    assert adaptive.choose(3) == table[4] and adaptive.choose(1) == table[1]


def test_speculation_that_loses_switches_itself_off_and_probes_rarely() -> None:
    adaptive = after(Adaptive(costs(draft=0.2, extra=0.1), 4), 0.05)
    chosen = [adaptive.choose(1) for _ in range(10 * PROBE_STEPS)]

    assert set(chosen) == {0, 1}
    assert sum(chosen) == 10, "once in PROBE_STEPS steps"


def test_it_comes_back_when_drafts_become_good() -> None:
    adaptive = after(Adaptive(costs(draft=0.2, extra=0.1), 4), 0.05)
    assert adaptive.choose(1) == 0

    assert after(adaptive, 1.0, steps=100 * PROBE_STEPS).choose(1) > 0


def test_where_even_perfect_drafts_lose_nothing_is_probed() -> None:
    adaptive = Adaptive(costs(draft=5, extra=5), 4)

    assert {adaptive.choose(1) for _ in range(5 * PROBE_STEPS)} == {0}


def test_the_engine_drafts_as_many_as_the_costs_say() -> None:
    built = build_engine(SPEC, EngineConfig.from_dict({**DEFAULTS, "speculate": "draft_model"}))
    assert built.parts.speculation is not None
    plans = recorded_plans(built)
    built.parts.speculation.adaptive = Adaptive(costs(draft=5, extra=5), 4)
    plain = generate(built, request("a", 9, 20))
    assert all(length == 1 for plan in plans[1:] for length in plan.query_lens)

    plans.clear()
    built.parts.speculation.adaptive = Adaptive(costs(draft=1e-6, extra=0), 4)
    assert generate(built, request("a", 9, 20)) == plain
    assert max(length for plan in plans[1:] for length in plan.query_lens) == 5


def test_costs_are_measured_when_the_engine_is_built_and_leave_nothing_behind() -> None:
    for speculate in ("draft_model", "ngram"):
        built = build_engine(SPEC, EngineConfig.from_dict({**DEFAULTS, "speculate": speculate}))
        facts = built.facts()
        found = facts["resolved"]["speculation"]

        assert sorted(found["table"]) == ["1", "2", "4"]
        assert all(ms > 0 for own in found["target_ms"].values() for ms in own.values())
        assert sorted(found["target_ms"]["4"], key=int) == sorted(found["draft_ms"]["4"], key=int)
        assert found["num_steps"] == 0 and facts["phases"]["calibrate_s"] > 0
        assert not built.has_work
        assert generate(built, request("a", 9, 20)) == generate(
            build_engine(SPEC, EngineConfig.from_dict(DEFAULTS)), request("a", 9, 20)
        )


def test_a_step_too_small_for_drafts_of_a_batch_leaves_them_out_of_its_table() -> None:
    config = {**DEFAULTS, "speculate": "draft_model", "max_step_tokens": 6}
    found = build_engine(SPEC, EngineConfig.from_dict(config)).facts()["resolved"]["speculation"]

    assert sorted(found["target_ms"]["1"]) == ["0", "1", "2", "4"]
    assert sorted(found["target_ms"]["2"]) == ["0", "1", "2"]
    assert sorted(found["target_ms"]["4"]) == ["0"] and found["table"]["4"] == 0


@pytest.mark.parametrize("max_model_len", [1, 2, 3, 8])
def test_an_engine_with_hardly_any_room_is_built_all_the_same(max_model_len: int) -> None:
    config = {**DEFAULTS, "speculate": "ngram", "max_model_len": max_model_len, "max_batch_size": 2}
    built = build_engine(SPEC, EngineConfig.from_dict(config))

    if max_model_len > 1:
        assert len(generate(built, request("a", 1, max_model_len - 1))["a"]) == max_model_len - 1

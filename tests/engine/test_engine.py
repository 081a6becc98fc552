import dataclasses

import pytest
import torch

from codesign.engine.models.shape import ARCHITECTURES
from codesign.engine.score import score
from codesign.errors import InputError, NumericalError
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import finish, generate, recorded_plans, request, tiny_engine

MIXED = (
    request("long", 200, 20),
    request("short", 3, 30),
    request("one", 1, 1),
    request("middle", 50, 25),
    request("drawn", 17, 25, temperature=0.9, seed=5),
    request("truncated", 30, 25, temperature=1.5, top_k=20, top_p=0.9, seed=6),
)


def test_batch_composition_does_not_change_tokens() -> None:
    alone = {item.request_id: generate(tiny_engine(), item)[item.request_id] for item in MIXED}

    for arrangement in ({}, {"max_batch_size": 2}, {"max_step_tokens": 16}):
        assert generate(tiny_engine(**arrangement), *MIXED) == alone
    assert generate(tiny_engine(), *reversed(MIXED)) == alone


@pytest.mark.parametrize("max_step_tokens", [4, 7, 64, 199, 200])
def test_chunked_prefill_gives_the_tokens_of_one_shot(max_step_tokens: int) -> None:
    expected = generate(tiny_engine(), request("a", 200, 20))

    assert generate(tiny_engine(max_step_tokens=max_step_tokens), request("a", 200, 20)) == expected


def test_same_seed_repeats_and_another_seed_differs() -> None:
    def tokens(seed: int) -> list[int]:
        return generate(tiny_engine(), request("a", 5, 40, temperature=1.0, seed=seed))["a"]

    assert tokens(1) == tokens(1) != tokens(2)


def test_short_request_admitted_late_finishes_before_the_long_one() -> None:
    engine = tiny_engine(max_batch_size=2)
    engine.submit(request("long", 10, 100))
    for _ in range(10):
        engine.step()
    engine.submit(request("late", 10, 5))

    finished = [output.request_id for _ in range(90) for output in engine.step() if output.finish_reason]

    assert finished == ["late", "long"]


def test_outputs_flow_while_a_long_prompt_is_prefilled() -> None:
    engine = tiny_engine(max_step_tokens=8)
    engine.submit(request("running", 4, 60))
    engine.step()
    engine.submit(request("long", 200, 5))

    steps = [[output.request_id for output in engine.step()] for _ in range(20)]

    assert all(names == ["running"] for names in steps)


@pytest.mark.parametrize("max_step_tokens", [4, 5, 16])
def test_step_budget_is_never_exceeded(max_step_tokens: int) -> None:
    engine = tiny_engine(max_step_tokens=max_step_tokens)
    plans = recorded_plans(engine)

    generate(engine, *MIXED)

    assert max(len(plan.token_ids) for plan in plans) == max_step_tokens


def test_slots_are_reused_lowest_first() -> None:
    engine = tiny_engine(max_batch_size=2)
    plans = recorded_plans(engine)

    generate(engine, *(request(str(index), 5, 5 + index) for index in range(8)))

    assert {slot for plan in plans for slot in plan.slots} == {0, 1}
    assert plans[0].slots == (0, 1)


def test_stop_tokens_end_the_output_and_are_emitted() -> None:
    whole = generate(tiny_engine(), request("a", 9, 30))["a"]
    stop = whole[7]

    engine = tiny_engine()
    engine.submit(request("a", 9, 30, stop_token_ids=(stop,)))
    outputs = [output for _ in range(30) for output in engine.step()]

    assert [output.token_id for output in outputs] == whole[: whole.index(stop) + 1]
    assert outputs[-1].finish_reason == "stop"


def test_eos_ends_the_output_unless_ignored() -> None:
    whole = generate(tiny_engine(), request("a", 9, 30))["a"]
    eos = frozenset({whole[4]})

    def with_eos(**sampling: bool) -> list[int]:
        engine = tiny_engine()
        engine._parts = dataclasses.replace(engine.parts, eos_token_ids=eos)
        return generate(engine, request("a", 9, 30, **sampling))["a"]

    assert with_eos() == whole[: whole.index(whole[4]) + 1]
    assert with_eos(ignore_eos=True) == whole


def test_max_tokens_ends_with_length() -> None:
    engine = tiny_engine()
    engine.submit(request("a", 3, 4))

    reasons = [output.finish_reason for _ in range(4) for output in engine.step()]

    assert reasons == ["", "", "", "length"]
    assert not engine.has_work


def test_log_probabilities_are_those_of_the_model_before_temperature() -> None:
    sampling = SamplingParams(max_tokens=4, temperature=1.7, seed=3, logprobs=2)
    engine = tiny_engine()
    engine.submit(Request(request_id="a", prompt_token_ids=(1, 2, 3), sampling=sampling))
    engine.submit(request("silent", 5, 4))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert all(not output.logprobs for output in outputs if output.request_id == "silent")
    asked = [output for output in outputs if output.request_id == "a"]
    text = [1, 2, 3, *(output.token_id for output in asked)]
    laws = {}
    score(tiny_engine(), [text], num_prefill=3, on_logits=lambda _, p, row: laws.update({p: row[0].log_softmax(-1)}))

    for position, output in enumerate(asked, start=2):
        (token, chosen), *likeliest = output.logprobs
        assert token == output.token_id
        assert chosen == pytest.approx(float(laws[position][token]), abs=1e-5)
        assert [token for token, _ in likeliest] == laws[position].topk(2).indices.tolist()
        assert [value for _, value in likeliest] == pytest.approx(laws[position].topk(2).values.tolist(), abs=1e-5)


def test_abort_frees_the_slot_at_once_and_nothing_more_comes() -> None:
    engine = tiny_engine(max_batch_size=1)
    engine.submit(request("long", 100, 100))
    engine.submit(request("waiting", 5, 5))
    engine.submit(request("next", 5, 5))
    for _ in range(3):
        engine.step()

    assert engine.abort("long") and engine.abort("waiting")
    assert not engine.abort("long") and not engine.abort("never seen")

    first = engine.step()
    rest = finish(engine)
    assert [output.request_id for output in first] == ["next"]
    assert [first[0].token_id, *rest["next"]] == generate(tiny_engine(), request("next", 5, 5))["next"]


@pytest.mark.parametrize("policy", ["full", "h2o"])
def test_abort_in_the_middle_of_a_prompt_leaves_no_trace(policy: str) -> None:
    kv = {"policy": policy}
    engine = tiny_engine(max_batch_size=1, max_step_tokens=16, kv=kv)
    engine.submit(request("long", 100, 100))
    engine.step()
    engine.abort("long")

    assert generate(engine, request("next", 50, 20)) == generate(tiny_engine(kv=kv), request("next", 50, 20))
    assert engine.facts()["bytes"]["kv_staging"] == 0


def test_a_finished_request_may_come_again_and_a_running_one_may_not() -> None:
    engine = tiny_engine()
    first = generate(engine, request("a", 5, 5))
    engine.submit(request("a", 5, 5))

    with pytest.raises(InputError, match="'a' is already"):
        engine.submit(request("a", 5, 5))
    assert finish(engine) == first
    engine.submit(request("a", 5, 5))
    engine.abort("a")
    engine.submit(request("a", 5, 5))


def test_requests_that_do_not_fit_are_refused_when_submitted() -> None:
    engine = tiny_engine(max_model_len=64)

    engine.submit(request("fits", 60, 4))
    with pytest.raises(InputError, match="60 prompt tokens and 5 output tokens exceed max_model_len 64"):
        engine.submit(request("long", 60, 5))
    for token in (-1, 128, 10**30):
        bad = Request(request_id="bad", prompt_token_ids=(1, token), sampling=SamplingParams(max_tokens=1))
        with pytest.raises(InputError, match=f"token {token} is outside the vocabulary of 128"):
            engine.submit(bad)
    assert len(finish(engine)["fits"]) == 4


def test_broken_weights_raise_a_numerical_error_instead_of_a_token() -> None:
    engine = tiny_engine()
    engine.parts.model.norm.weight[3] = torch.nan
    engine.submit(request("a", 5, 5))

    with pytest.raises(NumericalError, match="NaN"):
        engine.step()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_engines_generate(architecture: str, dtype: str) -> None:
    tokens = generate(tiny_engine(architecture, dtype=dtype), *MIXED)

    assert {name: len(ids) for name, ids in tokens.items()} == {i.request_id: i.sampling.max_tokens for i in MIXED}


def test_idle_engine_steps_to_nothing_and_a_closed_one_says_so() -> None:
    engine = tiny_engine()

    assert not engine.has_work and engine.step() == []
    first = generate(engine, request("a", 30, 3))
    assert engine.step() == []
    assert generate(engine, request("a", 30, 3)) == first
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.step()

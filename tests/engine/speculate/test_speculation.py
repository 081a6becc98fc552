"""Greedy output with drafts is the output without, token for token, in fp32: a difference is allowed only where the two
likeliest tokens were nearly as likely (one step of five rows sums in another order than five steps of one)."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.models.tokenizer import Tokenizer
from codesign.engine.sampling import sample
from codesign.engine.score import score
from codesign.engine.sequence import Sequence
from codesign.engine.speculate.exact import Draft, verify
from codesign.registry import SPECULATORS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from codesign.spec.model_source import model_from_text
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import DEFAULTS, finish, generate, recorded_plans, request
from tests.engine.usable_backends import USABLE_BACKENDS

MODEL = tiny_spec(seed=1, intermediate_size=128)
SPEC = dataclasses.replace(MODEL, draft=MODEL)
OTHER = dataclasses.replace(MODEL, draft=tiny_spec("Qwen3ForCausalLM", seed=2))
DRAFT = {"name": "draft_model", "num_draft_tokens": 4, "adaptive": False}
NGRAM = {"name": "ngram", "num_draft_tokens": 5, "min_ngram": 1, "max_ngram": 3, "adaptive": False}
CASES = {
    "the same model": (SPEC, DRAFT),
    "a rounded one": (SPEC, {**DRAFT, "draft_weights": "int3"}),
    "another one": (OTHER, DRAFT),
    "ngram": (SPEC, NGRAM),
}
# What a tiny random model says soon repeats itself, so n-grams are found; prompts of few different tokens help.
MIXED = (
    request("long", 200, 40),
    request("short", 3, 50),
    request("one", 1, 1),
    request("two", 1, 2),
    request("middle", 50, 25),
    Request(request_id="periodic", prompt_token_ids=(5, 6, 7) * 9, sampling=SamplingParams(max_tokens=30)),
)


def engine(spec: ModelSpec, speculate: Any, **config: Any) -> Engine:
    return build_engine(spec, EngineConfig.from_dict({**DEFAULTS, "speculate": speculate, **config}))


def check_same(
    spec: ModelSpec, requests: tuple[Request, ...], expected: dict[str, list[int]], found: dict[str, list[int]]
) -> None:
    """Equal, or different from a token on that the target itself can hardly tell from another."""
    assert {name: len(own) for name, own in found.items()} == {name: len(own) for name, own in expected.items()}
    for own in requests:
        one, other = expected[own.request_id], found[own.request_id]
        first = next((i for i, (x, y) in enumerate(zip(one, other, strict=True)) if x != y), None)
        if first is None:
            continue
        gaps: list[float] = []

        def keep(_: int, __: int, row: torch.Tensor, gaps: list[float] = gaps) -> None:
            best = row.topk(2).values[0]
            gaps.append(float(best[0] - best[1]))

        text = [*own.prompt_token_ids, *one[: first + 1]]
        score(engine(spec, "none"), [text], num_prefill=len(own.prompt_token_ids), on_logits=keep)
        assert gaps[-1] < 1e-4, f"{own.request_id}: token {first} differs"


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    return generate(engine(SPEC, "none"), *MIXED)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "config",
    [{}, {"max_batch_size": 1}, {"max_step_tokens": 4}, {"max_step_tokens": 9}, {"max_step_tokens": 16}],
    ids=str,
)
def test_greedy_output_is_the_same(case: str, config: dict[str, int], expected: dict[str, list[int]]) -> None:
    spec, speculate = CASES[case]
    built = engine(spec, speculate, **config)
    plans = recorded_plans(built)

    check_same(SPEC, MIXED, expected, generate(built, *MIXED))
    assert max(len(plan.token_ids) for plan in plans) <= built.parts.config.max_step_tokens
    stats = built.speculation_stats()
    assert stats["num_drafted"] > 0
    assert (stats["num_accepted"] == stats["num_tested"]) == (case == "the same model")
    assert stats["num_accepted"] > 0 or case == "another one"


@pytest.mark.parametrize("codec", ["int8", "fp8", {"name": "int4", "group_size": 8, "residual_tokens": 8}, "low_rank"])
def test_greedy_output_is_the_same_with_an_encoded_cache(codec: Any) -> None:
    """Groups are encoded when they are committed: a draft that read past such a point would read other numbers."""
    if codec == "low_rank":
        codec = {"name": "low_rank", "group_size": 16, "residual_tokens": 4, "rank": 8, "value_rank": 8}
    kv = {"codec": codec}
    plain = generate(engine(SPEC, "none", kv=kv), *MIXED)
    for speculate in (DRAFT, NGRAM):
        built = engine(SPEC, speculate, kv=kv)
        found = generate(built, *MIXED)

        assert found == plain
        assert built.speculation_stats()["num_accepted"] > 0


@pytest.mark.parametrize(
    "config",
    [*({"attention": name} for name in USABLE_BACKENDS), {"kv": {"place": "offload"}}, {"kernels": {"fused": True}}],
    ids=str,
)
def test_greedy_output_is_the_same_with_every_backend_place_and_kernel(config: dict[str, Any]) -> None:
    plain = generate(engine(SPEC, "none", **config), *MIXED)

    check_same(SPEC, MIXED, plain, generate(engine(SPEC, {**DRAFT, "draft_weights": "int3"}, **config), *MIXED))


@pytest.mark.parametrize("name", SPECULATORS.names())
def test_every_speculator_by_itself_gives_the_greedy_output(name: str, expected: dict[str, list[int]]) -> None:
    """With the knobs as they are by default, costs measured: whatever K they lead to."""
    built = engine(SPEC, name)

    check_same(SPEC, MIXED, expected, generate(built, *MIXED))
    json.dumps([built.facts(), built.speculation_stats()], allow_nan=False)


def test_a_policy_whose_budget_holds_everything_speculates() -> None:
    kv = {"policy": {"name": "h2o", "kv_budget": 1.0}}

    assert generate(engine(SPEC, DRAFT, kv=kv), *MIXED) == generate(engine(SPEC, "none", kv=kv), *MIXED)


@pytest.mark.parametrize("case", CASES)
def test_stop_tokens_and_log_probabilities_are_those_of_plain_decoding(
    case: str, expected: dict[str, list[int]]
) -> None:
    spec, speculate = CASES[case]
    stop = expected["short"][7]
    whole = expected["short"][: expected["short"].index(stop) + 1]
    built = engine(spec, speculate)
    built.submit(request("short", 3, 50, stop_token_ids=(stop,), logprobs=1))
    built.submit(request("middle", 50, 25))
    outputs = [output for _ in range(60) for output in built.step()]
    own = [output for output in outputs if output.request_id == "short"]

    assert [output.token_id for output in own] == whole
    assert [output.finish_reason for output in own] == [""] * (len(whole) - 1) + ["stop"]
    assert all(output.logprobs[0] == output.logprobs[1] for output in own), "the greedy token is the likeliest"
    plain = engine(SPEC, "none")
    plain.submit(request("short", 3, 50, stop_token_ids=(stop,), logprobs=1))
    alone = [output for _ in range(60) for output in plain.step()]
    for one, other in zip(own, alone, strict=True):
        assert one.logprobs[0][1] == pytest.approx(other.logprobs[0][1], abs=1e-4)


def test_max_tokens_ends_the_output_inside_the_drafts() -> None:
    for count in range(1, 8):
        outputs = []
        built = engine(SPEC, DRAFT)
        built.submit(request("a", 9, count))
        while built.has_work:
            outputs += built.step()

        assert len(outputs) == count
        assert [output.finish_reason for output in outputs] == [""] * (count - 1) + ["length"]


def test_one_target_step_verifies_all_drafts_and_adds_a_token() -> None:
    """A draft that is the target itself is always right: K drafts and one more token for each step."""
    built = engine(SPEC, DRAFT)
    plans = recorded_plans(built)
    generate(built, request("a", 7, 1 + 5 * 6))
    stats = built.speculation_stats()

    assert len(plans) == 1 + 6, "the prompt, then five tokens a step"
    assert [plan.query_lens for plan in plans[1:]] == [(5,)] * 6
    assert stats["num_accepted"] == stats["num_tested"] == stats["num_drafted"] == 4 * 6


def test_a_draft_that_is_always_wrong_costs_no_token() -> None:
    """At least one token a step, whatever is drafted."""
    built = engine(SPEC, DRAFT)
    proposer = built.parts.speculation.proposer  # type: ignore[union-attr]
    expected = generate(engine(SPEC, "none"), request("a", 7, 20))["a"]

    def wrong(wanted: Any) -> dict[str, Draft]:
        return {own.request_id: Draft(((own.token_ids[-1] + 1) % 128,) * count) for own, count in wanted}

    proposer.propose = wrong  # type: ignore[method-assign]
    plans = recorded_plans(built)

    assert generate(built, request("a", 7, 20))["a"] == expected
    assert len(plans) <= 20


def test_requests_that_draw_get_as_many_tokens_as_they_ask_for_beside_others() -> None:
    drawn = (
        request("drawn", 17, 25, temperature=0.9, seed=5),
        request("truncated", 30, 25, temperature=1.5, top_k=20, top_p=0.9, seed=6),
        request("greedy", 30, 25),
    )
    for spec, speculate in CASES.values():
        found = generate(engine(spec, speculate), *drawn)

        assert {name: len(own) for name, own in found.items()} == {own.request_id: 25 for own in drawn}
        assert found["greedy"] == generate(engine(SPEC, "none"), drawn[2])["greedy"]
        assert generate(engine(spec, speculate), *drawn) == found, "the same seeds, the same tokens"


def test_a_sequence_without_drafts_gets_the_token_of_plain_decoding() -> None:
    """No n-gram repeats in these prompts of distinct tokens, and the last token has no room for a draft."""
    sampling = {"temperature": 1.0, "seed": 3}
    one = Request(request_id="a", prompt_token_ids=tuple(range(40)), sampling=SamplingParams(max_tokens=2, **sampling))

    assert generate(engine(SPEC, NGRAM), one) == generate(engine(SPEC, "none"), one)


def test_streams_of_a_request_are_independent_and_never_begin_again() -> None:
    def numbers(purpose: str, seed: int = 3) -> list[float]:
        own = Sequence(request("a", 3, 3, seed=seed))
        stream = own.stream if purpose == "plain" else own.stream_for(purpose)
        return [stream.random() for _ in range(2000)]

    purposes = ("plain", "proposal", "acceptance", "residual")
    drawn = [torch.tensor(numbers(purpose)) for purpose in purposes]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(purposes))

    assert correlation.abs().max() < 0.1
    assert numbers("proposal") == numbers("proposal") != numbers("proposal", seed=4)
    own = Sequence(request("a", 3, 3))
    assert own.stream_for("proposal") is own.stream_for("proposal")


def test_an_aborted_request_leaves_its_slot_to_another() -> None:
    built = engine(SPEC, DRAFT, max_batch_size=1)
    built.submit(request("long", 100, 100))
    for _ in range(5):
        built.step()
    built.abort("long")
    assert generate(built, request("next", 50, 20)) == generate(engine(SPEC, "none"), request("next", 50, 20))
    # the same name again is another request
    assert generate(built, request("next", 50, 20)) == generate(engine(SPEC, "none"), request("next", 50, 20))


def test_scoring_goes_on_without_drafts_and_leaves_no_trace() -> None:
    built = engine(SPEC, DRAFT)
    before = generate(built, *MIXED)
    rng, rows = random.Random(0), []
    text = rng.choices(range(128), k=60)
    score(built, [text], num_prefill=20, on_logits=lambda _, __, row: rows.append(row.clone()))

    assert len(rows) == 40
    assert generate(built, *MIXED) == before


def test_ties_go_to_the_lowest_token_on_both_sides() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 3.0]])
    own = Sequence(request("a", 3, 9))
    accepted = verify(logits, [2], [own], {"a": Draft((1,))})[0]
    rejected = verify(logits, [2], [own], {"a": Draft((2,))})[0]

    assert accepted.token_ids == sample(logits, [own.sampling] * 2, [own.stream] * 2) == [1, 1]
    assert rejected.token_ids == [1] and rejected.num_tested == 1


def test_the_bundled_pair_takes_far_fewer_target_steps_than_tokens() -> None:
    spec = model_from_text("bundled", folder=Path())
    tokenizer = Tokenizer(target_path())
    texts = [tokenizer.encode(document.text)[:64] for document in heldout_texts()[:4]]
    sampling = SamplingParams(max_tokens=41, ignore_eos=True)
    requests = tuple(
        Request(request_id=str(i), prompt_token_ids=tuple(text), sampling=sampling) for i, text in enumerate(texts)
    )
    config = {"max_model_len": 128}
    plain = generate(engine(spec, "none", **config), *requests)
    built = engine(spec, DRAFT, **config)
    plans = recorded_plans(built)

    check_same(spec, requests, plain, generate(built, *requests))
    stats = built.speculation_stats()
    assert len(plans) < 0.7 * 41
    assert stats["num_accepted"] > 0.5 * stats["num_tested"]


def test_facts_count_the_drafts_bytes() -> None:
    plain, drafting = engine(OTHER, "none").facts(), engine(OTHER, DRAFT).facts()
    draft = build_engine(OTHER.draft, EngineConfig.from_dict(DEFAULTS)).facts()  # type: ignore[arg-type]

    assert drafting["bytes"]["weights"] == plain["bytes"]["weights"]
    assert drafting["bytes"]["draft_weights"] == draft["bytes"]["weights"]
    assert drafting["bytes"]["draft_kv"] == draft["bytes"]["kv"]
    assert "speculation" not in plain["resolved"] and drafting["resolved"]["speculation"]["num_draft_tokens"] == 4


def test_the_drafts_cache_counts_in_kv_memory_bytes() -> None:
    both = engine(OTHER, DRAFT, max_batch_size=1).facts()["bytes"]
    one = both["kv"] + both["draft_kv"]

    assert engine(OTHER, DRAFT, kv_memory_bytes=3 * one).num_slots == 3
    assert engine(OTHER, "none", kv_memory_bytes=3 * one).num_slots == 4
    assert finish(engine(OTHER, DRAFT, kv_memory_bytes=3 * one)) == {}

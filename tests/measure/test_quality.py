"""Quality is judged through the step loop of the built engine: it must see what eviction and rounding do."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from codesign.bundled import heldout_texts, target_path
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.tokenizer import Tokenizer
from codesign.engine.step import StepPlan
from codesign.measure import suite as suites
from codesign.measure.quality import run_suite
from codesign.measure.ruler import OUTPUT_TOKENS, TASKS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import recorded_plans

SIZE = suites.SuiteSize(num_sequences=2, sequence_tokens=160, num_prompts=2, prompt_tokens=320)
MAX_MODEL_LEN = 352
EIGHT_ROWS = {"policy": {"name": "streaming_llm", "kv_budget": 8}}


def bundled_engine(**config: Any) -> Engine:
    spec = ModelSpec(name="bundled", path=str(target_path()))
    plain = {"dtype": "fp32", "max_batch_size": 2, "max_model_len": MAX_MODEL_LEN, **config}
    return build_engine(spec, EngineConfig.from_dict(plain))


@pytest.fixture(scope="module")
def suite() -> dict[str, Any]:
    encode = Tokenizer(target_path()).encode
    return suites.make_suite(encode, SIZE, max_model_len=MAX_MODEL_LEN, seed=3)


@pytest.fixture(scope="module")
def asked() -> dict[str, Any]:
    """Two samples of two tasks that the bundled model can do, asked both ways, and nothing else."""
    encode = Tokenizer(target_path()).encode
    filler = [token for document in heldout_texts()[:4] for token in encode(document.text)]
    items = suites.ruler_items(encode, filler, lengths=[MAX_MODEL_LEN], count=2, seed=0)
    ruler = [item for item in items if item["task"] in ("single_needle", "multi_key")]
    return {"is_text": True, "text": {"sequences": [[1, 2]], "num_prefill": 1}, "retrieval": [], "ruler": ruler}


@pytest.fixture(scope="module")
def reference(suite: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "full.npy"
    run_suite(bundled_engine(), {**suite, "write_reference": str(path)}, lambda: None)
    return path


def judged(suite: dict[str, Any], reference: Path, **config: Any) -> dict[str, Any]:
    return run_suite(bundled_engine(**config), {**suite, "reference": str(reference)}, lambda: None)


def test_the_unmodified_model_is_no_distance_from_itself(suite: dict[str, Any], reference: Path) -> None:
    scores = judged(suite, reference)

    assert max(map(abs, scores["kl"])) < 1e-7  # the file holds fp32
    assert scores["top1"] == [1.0, 1.0]


def test_a_policy_that_keeps_eight_rows_shows_it(suite: dict[str, Any], reference: Path) -> None:
    scores = judged(suite, reference, kv=EIGHT_ROWS)

    assert min(scores["kl"]) > 0.1


@pytest.mark.parametrize(
    ("codec", "most"), [("int8", 1e-4), ("fp8", 5e-3), ({"name": "int4", "residual_tokens": 0}, 5e-3)], ids=str
)
def test_a_codec_costs_little_and_what_it_costs_is_seen(
    codec: Any, most: float, suite: dict[str, Any], reference: Path
) -> None:
    scores = judged(suite, reference, kv={"codec": codec})

    assert 1e-6 < max(scores["kl"]) < most


def test_one_plain_forward_pass_would_have_seen_no_eviction(suite: dict[str, Any]) -> None:
    """The whole text as one prompt: the policy acts after it, so its logits are those of the full cache."""
    tokens = tuple(suite["text"]["sequences"][0])
    plan = StepPlan(
        slots=(0,),
        query_lens=(len(tokens),),
        token_ids=tokens,
        positions=tuple(range(len(tokens))),
        is_prompt=(True,),
        is_prompt_end=(True,),
        logits_rows=tuple(range(len(tokens))),
    )
    evicting, full = (bundled_engine(**config).parts.runner.run(plan) for config in ({"kv": EIGHT_ROWS}, {}))
    log_p, log_q = torch.log_softmax(full.double(), -1), torch.log_softmax(evicting.double(), -1)

    assert float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) < 1e-6


def test_rounding_weights_harder_costs_more(suite: dict[str, Any], reference: Path) -> None:
    int8 = judged(suite, reference, weights="int8")
    int4 = judged(suite, reference, weights={"name": "int4", "group_size": 128})

    assert 0 < sum(int8["kl"]) < sum(int4["kl"])


def test_likelihood_is_that_of_the_text(suite: dict[str, Any], reference: Path) -> None:
    """The reference file holds log-probabilities: those of the forced tokens must add up to the reported ones."""
    import numpy as np

    scores = judged(suite, reference)
    log_probs = np.load(reference)
    num_prefill = suite["text"]["num_prefill"]
    forced = suite["text"]["sequences"][0][num_prefill:]
    by_hand = -sum(float(log_probs[row][token]) for row, token in enumerate(forced)) / len(forced)

    assert scores["nll"][0] == pytest.approx(by_hand, abs=1e-5)
    assert np.allclose(np.exp(log_probs.astype(np.float64)).sum(-1), 1.0, atol=1e-5)
    assert scores["nll"][0] < math.log(4096)


def test_a_question_is_answered_with_all_rows_and_not_with_eight(asked: dict[str, Any]) -> None:
    full, eight_rows = (run_suite(bundled_engine(**config), asked, lambda: None) for config in ({}, {"kv": EIGHT_ROWS}))

    assert sum(full["is_exact"]) >= 7  # of 8
    assert sum(eight_rows["is_exact"]) <= 1
    assert max(full["log_prob"] + eight_rows["log_prob"]) <= 0
    assert sum(full["log_prob"]) > sum(eight_rows["log_prob"]) + 8


def test_a_question_that_is_asked_after_output_comes_token_by_token(asked: dict[str, Any]) -> None:
    """The policy acts before it has seen the question, and the output before the question evicts too."""
    engine = bundled_engine()
    plans = recorded_plans(engine)
    run_suite(engine, {**asked, "ruler": [asked["ruler"][1]]}, lambda: None)
    own = [plan for plan in plans if plan.slots][-1 - len(asked["ruler"][1]["answer"]) :]

    assert asked["ruler"][1]["asked"] == "after_output"
    assert len(asked["ruler"][1]["prompt"]) - asked["ruler"][1]["num_prefill"] > OUTPUT_TOKENS
    assert all(len(plan.token_ids) == 1 for plan in own)


def test_an_answer_with_one_wrong_token_is_no_answer(asked: dict[str, Any]) -> None:
    item = next(item for item in asked["ruler"] if item["task"] == "single_needle")
    wrong = [*item["answer"][:-1], (item["answer"][-1] + 1) % 4096]
    scores = run_suite(bundled_engine(), {**asked, "ruler": [item, {**item, "answer": wrong}]}, lambda: None)

    assert scores["is_exact"] == [True, False]
    assert scores["log_prob"][1] < scores["log_prob"][0]


def test_the_two_ways_of_asking_force_the_same_tokens(asked: dict[str, Any]) -> None:
    in_prompt, after_output = asked["ruler"][:2]

    assert (in_prompt["prompt"], in_prompt["answer"]) == (after_output["prompt"], after_output["answer"])
    assert in_prompt["num_prefill"] == len(in_prompt["prompt"])
    scores = run_suite(bundled_engine(), {**asked, "ruler": [in_prompt, after_output]}, lambda: None)
    assert scores["log_prob"][0] == pytest.approx(scores["log_prob"][1], abs=1e-4)


def test_lengths_that_do_not_fit_are_left_out_and_screen_asks_nothing() -> None:
    encode = Tokenizer(target_path()).encode
    confirm, screen = (
        suites.make_suite(encode, size, max_model_len=1100, seed=0) for size in (suites.CONFIRM, suites.SCREEN)
    )

    assert {item["length_tokens"] for item in confirm["ruler"]} == {512, 1024}
    assert {item["task"] for item in confirm["ruler"]} == set(TASKS)
    assert screen["ruler"] == []


def test_a_suite_is_fixed_by_its_seed() -> None:
    encode = Tokenizer(target_path()).encode
    one, same, other = (suites.make_suite(encode, SIZE, max_model_len=MAX_MODEL_LEN, seed=seed) for seed in (1, 1, 2))

    assert suites.digest(one) == suites.digest(same) != suites.digest(other)


def test_a_suite_fits_the_engine_and_spreads_its_distances() -> None:
    encode = Tokenizer(target_path()).encode
    made = suites.make_suite(encode, suites.SCREEN, max_model_len=MAX_MODEL_LEN, seed=0)
    distances = [item["distance"] for item in made["retrieval"]]

    assert all(len(item["prompt"]) + len(item["answer"]) <= MAX_MODEL_LEN for item in made["retrieval"])
    assert distances == sorted(distances)
    assert distances[0] == suites.SHORTEST_DISTANCE
    assert distances[-1] > MAX_MODEL_LEN / 2


def test_a_length_too_short_to_plant_a_fact_has_no_retrieval() -> None:
    least = suites.LEAST_RETRIEVAL_TOKENS
    encode = Tokenizer(target_path()).encode
    short, enough = (suites.make_suite(encode, SIZE, max_model_len=length, seed=0) for length in (least - 1, least))

    assert short["retrieval"] == []
    assert short["text"]["sequences"]
    assert len(enough["retrieval"]) == SIZE.num_prompts

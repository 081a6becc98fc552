from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.models.shape import ARCHITECTURES
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.score import score
from codesign.errors import InputError
from codesign.registry import KV_POLICIES
from codesign.spec.engine_config import EngineConfig
from codesign.spec.model import ModelSpec
from tests.engine.driving import generate, recorded_plans, request, tiny_engine
from tests.engine.models.test_logits import BOUND, random_tokens
from tests.engine.models.transformers_peer import peer, peer_logits, save


def scored(engine: Engine, sequences: list[list[int]], num_prefill: int | list[int]) -> list[Tensor]:
    """[len - num_prefill, V] for each sequence, checking that positions come in order without gaps."""
    found: list[list[Tensor]] = [[] for _ in sequences]
    prompts = [num_prefill] * len(sequences) if isinstance(num_prefill, int) else num_prefill

    def on_logits(index: int, position: int, logits: Tensor) -> None:
        assert position == prompts[index] - 1 + len(found[index])
        assert logits.shape == (1, engine.vocab_size) and logits.dtype == torch.float32
        found[index].append(logits)

    score(engine, sequences, num_prefill=num_prefill, on_logits=on_logits)
    return [torch.cat(rows) for rows in found]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_prefill_and_decode_give_the_logits_of_transformers(architecture: str, tmp_path: Path) -> None:
    """The whole engine, cache and chunks included, within the bound of the plain comparison."""
    model = peer(architecture)
    config = EngineConfig(dtype="fp32", max_batch_size=3, max_model_len=512, max_step_tokens=100)
    engine = build_engine(ModelSpec(name="peer", path=str(save(model, tmp_path))), config)
    texts = [random_tokens(length, seed=length) for length in (512, 300, 41, 250, 2)]
    prompts = [256, 299, 1, 100, 1]

    found = scored(engine, texts, prompts)

    for text, num_prompt, logits in zip(texts, prompts, found, strict=True):
        expected = peer_logits(model, text)[num_prompt - 1 : -1]
        assert logits.shape == expected.shape
        assert (logits - expected).abs().max() <= BOUND * peer_logits(model, text).std()


def test_chunked_prefill_logits_equal_one_shot() -> None:
    text = random_tokens(230)
    (expected,) = scored(tiny_engine(), [text], 200)

    for max_step_tokens in (4, 33, 199):
        (logits,) = scored(tiny_engine(max_step_tokens=max_step_tokens), [text], 200)
        assert (logits - expected).abs().max() <= 1e-5 * expected.std()


def test_forcing_the_greedy_tokens_reproduces_them() -> None:
    item = request("a", 20, 30)
    tokens = generate(tiny_engine(), item)["a"]

    (logits,) = scored(tiny_engine(), [[*item.prompt_token_ids, *tokens]], 20)

    assert logits.argmax(dim=-1).tolist() == tokens


def test_scoring_decodes_token_by_token_over_all_slots() -> None:
    engine = tiny_engine(max_batch_size=3)
    plans = recorded_plans(engine)

    scored(engine, [random_tokens(30, seed=seed) for seed in range(3)], 10)

    assert [len(plan.token_ids) for plan in plans] == [30] + [3] * 19


def test_engine_serves_after_scoring_as_before() -> None:
    engine = tiny_engine()
    before = generate(engine, request("a", 20, 20))
    scored(engine, [random_tokens(50)], 20)

    assert generate(engine, request("a", 20, 20)) == before


@pytest.mark.parametrize(
    ("sequences", "num_prefill"),
    [([[1, 2, 3]], 3), ([[1, 2, 3]], 0), ([[1]], 1), ([[1] * 257], 10), ([[1, 128, 3]], 1), ([[1, 2], [1, -1]], 1)],
)
def test_impossible_sequences_are_refused_before_any_step(sequences: list[list[int]], num_prefill: int) -> None:
    engine = tiny_engine()
    plans = recorded_plans(engine)

    with pytest.raises(InputError, match="sequence"):
        scored(engine, sequences, num_prefill)
    assert not plans and not engine.has_work


def test_engine_with_requests_cannot_score() -> None:
    engine = tiny_engine()
    engine.submit(request("a", 5, 5))

    with pytest.raises(ValueError, match="requests"):
        scored(engine, [[1, 2, 3]], 1)


POLICIES = [name for name in KV_POLICIES.names() if name != "full"]
KNOBS: dict[str, dict[str, Any]] = {
    "ada_kv": {"window_tokens": 4, "num_sink_tokens": 2},
    "dynamic": {"under_pressure": "streaming_llm"},
    "snapkv": {"window_tokens": 4, "num_sink_tokens": 2},
    "pyramidkv": {"window_tokens": 4, "num_sink_tokens": 2},
    "h2o": {"num_sink_tokens": 2},
    "r_kv": {"window_tokens": 3, "num_sink_tokens": 2, "buffer_tokens": 3},
}


def with_policy(name: str, kv_budget: int | float, model: ModelSpec | None = None) -> Engine:
    policy = {"name": name, "kv_budget": kv_budget, **KNOBS.get(name, {})} if name != "full" else name
    config = {"dtype": "fp32", "max_batch_size": 4, "max_model_len": 200, "kv": {"policy": policy}}
    return build_engine(model or tiny_spec(), EngineConfig.from_dict(config))


@pytest.fixture(scope="module")
def sharp_model(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """Weights 1.5 times as large as usual, so that attention looks at few rows and losing them shows."""
    return ModelSpec(name="peer", path=str(save(peer("LlamaForCausalLM"), tmp_path_factory.mktemp("sharp"))))


@pytest.mark.parametrize("policy", POLICIES)
def test_eight_kept_rows_show_in_scores_and_would_not_in_one_forward_pass(policy: str, sharp_model: ModelSpec) -> None:
    texts = [random_tokens(200, seed=seed) for seed in range(4)]
    reference = scored(with_policy("full", 1.0, sharp_model), texts, 150)

    found = scored(with_policy(policy, 8, sharp_model), texts, 150)

    def divergence(rows: slice) -> float:
        pairs = [(a[rows].log_softmax(-1), b[rows].log_softmax(-1)) for a, b in zip(reference, found, strict=True)]
        return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]).mean())

    assert divergence(slice(0, 1)) < 1e-6, "the prompt itself attends in full, as a plain forward pass would"
    assert divergence(slice(1, None)) > 0.1


@pytest.mark.parametrize("policy", POLICIES)
def test_policy_that_keeps_all_scores_like_full(policy: str) -> None:
    texts = [random_tokens(200, seed=seed) for seed in range(3)]

    for found, expected in zip(
        scored(with_policy(policy, 1.0), texts, 150), scored(tiny_engine(max_model_len=200), texts, 150), strict=True
    ):
        assert (found - expected).abs().max() <= 1e-5 * expected.std()


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "dynamic"])  # which is to depend on it
def test_tokens_under_eviction_do_not_depend_on_the_batch(policy: str) -> None:
    requests = [request(str(length), length, 40) for length in (150, 3, 90, 60, 120)]
    alone = {item.request_id: generate(with_policy(policy, 12), item)[item.request_id] for item in requests}

    engine = with_policy(policy, 12)

    assert generate(engine, *requests) == alone
    assert engine.facts()["bytes"]["kv_staging"] == 0

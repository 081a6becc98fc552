"""From Attention to the kernels: what runs where, over each kind of stored rows, and for policies of every kind."""

from typing import Any

import pytest
import torch
from block_plans import sharing_plans
from random_plans import random_plans
from replay import MAX_MODEL_LEN, MAX_QUERY_LEN, NUM_SLOTS, make_attention, make_oracle, replay
from test_paged import check_that_nothing_is_copied
from test_paged_contract import TRAFFIC, paged
from test_paged_contract import replay as replay_blocks

from codesign.engine.attention import weights
from codesign.engine.attention.backends.triton import Triton
from codesign.engine.build import build_engine
from codesign.engine.kernels.triton import available
from codesign.engine.kv.group import LayerGroup
from codesign.engine.models.tiny import tiny_spec
from codesign.registry import KV_CODECS, KV_POLICIES
from codesign.spec.engine_config import EngineConfig
from tests.engine.attention.test_output import attend, filled
from tests.engine.driving import generate, request

KERNEL = "triton::attend, prompts aten::scaled_dot_product_attention"
CPU = torch.device("cpu")


@pytest.mark.parametrize(("codec", "num_queries"), [("native", 3), ("int8", 1), ("fp8", 3), ("int4", 1), ("int4", 3)])
def test_a_cache_is_read_as_it_is_stored(codec: str, num_queries: int) -> None:
    """Of int4 the first sequence has no group yet, the second one and the last three."""
    lengths = [5, 64, 130]
    store = filled(codec, lengths, num_queries=num_queries, head_dim=64, dtype=torch.float32)
    kernel, out, column_error, expected = attend(
        store, "triton", lengths, num_queries=num_queries, num_groups=4, want_columns=codec != "int4"
    )

    assert kernel == KERNEL
    assert codec != "int4" or store.groups[0].encoded_tokens(slice(0, 3)) == [0, 32, 96]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert column_error < 1e-6


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_nothing_is_decoded(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(codec, [70], num_queries=1, head_dim=64, dtype=torch.float32)
    decoded: list[Any] = []
    monkeypatch.setattr(LayerGroup, "read", lambda self, *where: decoded.append(where))
    with pytest.raises(TypeError, match="NoneType"):  # the test itself reads, once, afterwards
        attend(store, "triton", [70], num_queries=1, num_groups=4, want_columns=False)

    assert len(decoded) == 1


def test_what_it_cannot_read_is_decoded_in_slices() -> None:
    assert not Triton().reads(KV_CODECS.create("low_rank"), head_dim=64)
    assert not Triton().reads(KV_CODECS.create("int4"), head_dim=96)
    lengths = [5, 130]
    store = filled("low_rank", lengths, num_queries=1, head_dim=64, dtype=torch.float32)
    kernel, out, _, expected = attend(store, "triton", lengths, num_queries=1, num_groups=4)

    assert kernel.startswith(f"{KERNEL} over decoded slices")
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "codec", "knobs"),
    [
        ("full", "int8", {}),
        ("h2o", "native", {"kv_budget": 14, "num_sink_tokens": 2, "score_norm": "decayed", "decay": 0.7}),
        ("ada_kv", "native", {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3}),
        ("ada_kv", "int8", {"kv_budget": 16, "window_tokens": 4, "num_sink_tokens": 2, "kernel_size": 3}),
    ],
)
def test_random_traffic_agrees_with_a_dictionary_of_rows(
    name: str, codec: str, knobs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights from the kernels alone."""
    monkeypatch.delattr(weights, "weights")
    policy = KV_POLICIES.create(name, **knobs)
    plans = random_plans(1, num_steps=7, num_slots=NUM_SLOTS, max_model_len=MAX_MODEL_LEN, max_query_len=MAX_QUERY_LEN)
    attention = make_attention(policy, codec=codec, backend="triton")
    num_evicted = replay(attention, make_oracle(policy, name), plans, seed=1)

    assert num_evicted > 5 or name == "full"
    assert attention.kernel == KERNEL + (" + triton::column_sums" if name == "h2o" else "")


def test_heads_of_different_lengths_share_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    attend_stored = Triton.attend_stored

    def counted(self: Triton, query: Any, *rest: Any, **how: Any) -> Any:
        calls.append(query.shape[0])
        return attend_stored(self, query, *rest, **how)

    monkeypatch.setattr(Triton, "attend_stored", counted)
    monkeypatch.setattr("codesign.engine.attention.layer.attend_ragged", None)
    policy = {"name": "ada_kv", "kv_budget": 16, "window_tokens": 4}
    plain = {"dtype": "fp32", "max_batch_size": 3, "max_model_len": 64, "attention": "triton", "kv": {"policy": policy}}
    engine = build_engine(tiny_spec(), EngineConfig.from_dict(plain))
    generate(engine, *(request(f"r{index}", 30 + index, 4, ignore_eos=True) for index in range(3)))

    num_layers = len(engine.parts.model.layer_list)
    assert calls == [3] * (3 * num_layers)  # three steps of three sequences: the first token is the prompt's


def test_random_traffic_in_shared_blocks_agrees_with_a_dictionary_of_rows() -> None:
    attention = paged("native", "triton")
    plans = sharing_plans(2, num_steps=14, num_blocks=attention.num_blocks, **TRAFFIC)

    assert replay_blocks(attention, plans) > 0
    assert attention.kernel == KERNEL


@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
def test_output_tokens_are_read_where_they_lie_in_blocks(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_that_nothing_is_copied(codec, "triton", monkeypatch)


def test_an_engine_runs_on_them_and_says_so() -> None:
    config = EngineConfig.from_dict(
        {"dtype": "fp32", "max_batch_size": 2, "max_model_len": 64, "attention": "triton", "kv": {"codec": "int8"}}
    )
    requests = [request(f"r{index}", 8 + 20 * index, 3, ignore_eos=True) for index in range(2)]

    engine = build_engine(tiny_spec(), config)

    assert KERNEL in str(engine.facts())
    plain = EngineConfig.from_dict({**config.to_dict(), "attention": "eager"})
    assert generate(engine, *requests) == generate(build_engine(tiny_spec(), plain), *requests)


def test_the_kernels_are_tried_before_they_are_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    from codesign.engine.kernels.triton import attend as module

    assert available.missing_attention(CPU) is None
    right = module.attend
    monkeypatch.setattr(module, "attend", lambda *args, **rest: tuple(1.01 * part for part in right(*args, **rest)))
    assert available._missing_attention.__wrapped__(CPU) == available.Missing(
        "the kernel attends wrongly on this device"
    )

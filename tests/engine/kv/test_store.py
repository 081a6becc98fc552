"""Bytes, staging, rules of plans, and what a policy that keeps everything must equal."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from replay import CODEC_KNOBS

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.rope import Rope
from codesign.engine.batch import Batch
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kv.policies.ada_kv import AdaKV
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.policies.h2o import H2O
from codesign.engine.kv.policies.pyramidkv import PyramidKV
from codesign.engine.kv.policies.r_kv import RKV
from codesign.engine.kv.policies.streaming_llm import StreamingLLM
from codesign.engine.kv.policy import KVPolicy
from codesign.engine.step import StepPlan, decode_plan
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES
from tests.engine.usable_backends import USABLE_BACKENDS

CPU = torch.device("cpu")
NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS, HEAD_DIM = 4, 2, 3, 16
MUTABLE = [name for name in KV_CODECS.names() if KV_CODECS.create(name).rows_mutable]
ALONE = [name for name in KV_POLICIES.names() if len(KV_POLICIES.create(name).slot_policies(8)) == 1]
BOUNDED: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALONE if "kv_budget" in KV_POLICIES.knobs(name) and name != "pyramidkv"),
    ("pyramidkv", {"beta": 1}),
    ("h2o", {"score_norm": "decayed", "decay": 0.9}),
]
ADA_KV = AdaKV(kv_budget=9, window_tokens=3, num_sink_tokens=1)
needs_kernel = pytest.mark.skipif(isinstance(kv_attention.load(), Missing), reason=str(kv_attention.load()))


def make(
    policy: KVPolicy,
    *,
    codec: str = "native",
    backend: str = "sdpa",
    num_slots: int = 2,
    max_model_len: int = 64,
    max_query_len: int = 1,
    head_dim: int = HEAD_DIM,
    dtype: torch.dtype = torch.float32,
) -> Attention:
    return Attention(
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        rope=Rope(1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)),
        policy=policy,
        codec=KV_CODECS.create(codec, **CODEC_KNOBS.get(codec, {})),
        backend=ATTENTION.create(backend),
        num_slots=num_slots,
        max_model_len=max_model_len,
        max_query_len=max_query_len,
        dtype=dtype,
        device=CPU,
    )


def chunk(slot: int, first: int, length: int, *, is_end: bool, frees: Sequence[int] = ()) -> StepPlan:
    return StepPlan(
        frees=tuple(frees),
        slots=(slot,),
        query_lens=(length,),
        token_ids=(0,) * length,
        positions=tuple(range(first, first + length)),
        is_prompt=(True,),
        is_prompt_end=(is_end,),
    )


def run(attention: Attention, plan: StepPlan, seed: int = 0) -> torch.Tensor:
    """[L, N, H, D]; the token at a position has the same q, k, v in every run with the same seed."""
    batch, outs = Batch.of(plan, CPU), []
    attention.begin(batch)
    for layer in range(NUM_LAYERS):
        rows = [tokens(layer, position, seed, attention) for position in plan.positions]
        q, k, v = (torch.stack(part) for part in zip(*rows, strict=True))
        outs.append(attention(layer, q, k, v, batch))
    attention.end(batch)
    return torch.stack(outs)


def tokens(layer: int, position: int, seed: int, attention: Attention) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + layer * 10_007 + position)
    head_dim, dtype = attention.store.head_dim, attention.store.dtype
    both = torch.randn(NUM_HEADS + 2 * NUM_KV_HEADS, head_dim, generator=generator).to(dtype)
    return both[:NUM_HEADS], both[NUM_HEADS:-NUM_KV_HEADS], both[-NUM_KV_HEADS:]


def generate(attention: Attention, chunks: Sequence[int], num_output: int) -> torch.Tensor:
    """[L, prompt + output, H, D] of one sequence in slot 0."""
    outs, first = [], 0
    for index, length in enumerate(chunks):
        outs.append(run(attention, chunk(0, first, length, is_end=index == len(chunks) - 1)))
        first += length
    for step in range(num_output):
        outs.append(run(attention, decode_plan([0], [0], [first + step], commits=[(0, 1)] if step else ())))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("codec", MUTABLE)
@pytest.mark.parametrize("kv_budget", [64, 1.0, 60])
@pytest.mark.parametrize(("name", "knobs"), BOUNDED)
def test_a_policy_that_keeps_everything_equals_full_bit_for_bit(
    name: str, knobs: dict[str, Any], kv_budget: int | float, codec: str, backend: str
) -> None:
    """Also where it would evict later: at 60 of 64 tokens the prompt is staged, admitted and never cut.

    But for rounding where output tokens need weights and are read by another kernel than those of `full`.
    """
    keep_all = make(KV_POLICIES.create(name, kv_budget=kv_budget, **knobs), codec=codec, backend=backend)
    full = make(Full(), codec=codec, backend=backend)
    out, expected = generate(keep_all, [20, 17], 20), generate(full, [20, 17], 20)

    assert torch.equal(out[:, :37], expected[:, :37])
    if keep_all.kernel.startswith("codesign::attend_native"):
        torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    else:
        assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.06), (torch.float16, 0.008)], ids=str)
def test_half_precision_stays_near_fp32(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    for policy in (Full(), StreamingLLM(kv_budget=12), PyramidKV(kv_budget=40, window_tokens=30, beta=1)):
        out = generate(make(policy, backend=backend, dtype=dtype), [20, 18], 10)
        expected = generate(make(policy, backend=backend), [20, 18], 10)

        assert out.dtype == dtype
        assert (out.float() - expected).abs().max() < tolerance


def test_the_kernel_name_says_what_runs() -> None:
    assert make(Full()).kernel == "aten::scaled_dot_product_attention"
    assert make(H2O(kv_budget=12), codec="int8").kernel.endswith(" + column pass")
    assert make(H2O(kv_budget=1.0)).kernel == "aten::scaled_dot_product_attention"
    assert make(ADA_KV, codec="int8").kernel.endswith(
        ", ragged heads aten::scaled_dot_product_attention, a call per slot and KV head (encoded rows)"
    )


@needs_kernel
def test_the_kernel_of_native_rows_is_named_where_it_runs() -> None:
    h2o, ada_kv = H2O(kv_budget=12), ADA_KV

    assert make(h2o).kernel == "codesign::attend_native, prompts aten::scaled_dot_product_attention + column pass"
    assert make(ada_kv).kernel == "aten::scaled_dot_product_attention, ragged heads codesign::attend_native"
    assert make(h2o, backend="eager").kernel.endswith(" + column pass (plain)")
    assert make(ada_kv, backend="eager").kernel.endswith(", a call per slot and KV head (plain)")


@pytest.mark.parametrize("chunks", [[50], [49, 1], [1] * 50, [20, 3, 27], [7] * 7 + [1]])
@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(kv_budget=12),
        H2O(kv_budget=12, num_sink_tokens=1),
        PyramidKV(kv_budget=20, window_tokens=8, num_sink_tokens=1, beta=3),
        RKV(kv_budget=20, window_tokens=8, num_sink_tokens=1, buffer_tokens=4),
        AdaKV(kv_budget=20, window_tokens=8, num_sink_tokens=1),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_any_chunking_of_the_prompt_keeps_the_same_rows(policy: KVPolicy, chunks: list[int]) -> None:
    """A last chunk shorter than the window included."""
    whole, parts = make(policy), make(policy)
    expected, out = generate(whole, [50], 3), generate(parts, chunks, 3)

    for group, other in zip(whole.store.groups, parts.store.groups, strict=True):
        assert torch.equal(group.position, other.position)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("codec", [name for name in KV_CODECS.names() if name != "native"])
@pytest.mark.parametrize("chunks", [[37], [36, 1], [1] * 37, [20, 3, 14]], ids=str)
def test_any_chunking_of_the_prompt_is_encoded_alike(codec: str, chunks: list[int]) -> None:
    """Prompts attend in native precision whatever the codec, and are encoded once, when they end."""
    native, whole, parts = make(Full()), make(Full(), codec=codec), make(Full(), codec=codec)
    expected, out = generate(whole, [37], 20), generate(parts, chunks, 20)

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(out[:, :37], generate(native, [37], 20)[:, :37], rtol=0, atol=1e-5)
    assert parts.staging_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_rows_take_one_byte_a_value_and_two_a_row(dtype: torch.dtype) -> None:
    attention = make(Full(), codec="int8", max_model_len=256, head_dim=64, dtype=dtype)

    assert attention.kv_bytes == 2 * NUM_LAYERS * 2 * NUM_KV_HEADS * 256 * (64 + 2)


def test_scores_that_moved_at_once_are_not_read_after_a_query_was_dropped() -> None:
    """Such a row is the padding of a sequence that is done; what it looked at cannot be taken back."""
    attention = make(H2O(kv_budget=10, num_sink_tokens=0))
    run(attention, chunk(0, 0, 12, is_end=True))
    run(attention, decode_plan([0], [0], [12]))
    run(attention, decode_plan([0], [0], [12], commits=[(0, 0)]))

    with pytest.raises(ValueError, match="a query that was dropped"):
        attention.begin(Batch.of(decode_plan([0], [0], [13], commits=[(0, 1)]), CPU))


def test_positions_are_as_narrow_as_the_longest_sequence_allows() -> None:
    for max_model_len, dtype in ((1 << 15, torch.int16), ((1 << 15) + 1, torch.int32)):
        store = make(H2O(kv_budget=10, num_sink_tokens=0), max_model_len=max_model_len).store

        assert store.position.dtype == dtype


@pytest.mark.parametrize(
    "policy",
    [
        StreamingLLM(kv_budget=0.1),
        H2O(kv_budget=0.1),
        PyramidKV(kv_budget=0.1),
        RKV(kv_budget=0.1),
        AdaKV(kv_budget=0.1),
    ],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tenth_of_the_rows_is_little_more_than_a_tenth_of_the_bytes(policy: KVPolicy, dtype: torch.dtype) -> None:
    shape: dict[str, Any] = {"max_model_len": 2048, "head_dim": 64, "dtype": dtype}
    full, small = make(Full(), **shape), make(policy, **shape)

    assert full.kv_bytes == 2 * NUM_LAYERS * 2 * NUM_KV_HEADS * 2048 * 64 * dtype.itemsize
    assert small.kv_bytes <= 0.13 * full.kv_bytes


def test_staged_prompts_are_counted_and_freed() -> None:
    attention = make(H2O(kv_budget=10, num_sink_tokens=0))
    before = attention.kv_bytes
    run(attention, chunk(0, 0, 30, is_end=False))
    rows = 2 * NUM_LAYERS * NUM_KV_HEADS * 30 * HEAD_DIM * 4

    assert rows <= attention.staging_bytes < 2 * rows
    run(attention, chunk(0, 30, 8, is_end=True))
    assert attention.staging_bytes == 0
    assert attention.kv_bytes == before


def test_freeing_a_slot_in_the_middle_of_its_prompt_drops_what_was_staged() -> None:
    attention = make(H2O(kv_budget=10, num_sink_tokens=0))
    run(attention, chunk(0, 0, 30, is_end=False))
    run(attention, chunk(1, 0, 5, is_end=True, frees=[0]))

    assert attention.staging_bytes == 0


def test_an_unbounded_layer_stages_nothing() -> None:
    attention = make(Full())
    run(attention, chunk(0, 0, 30, is_end=False))

    assert attention.staging_bytes == 0


def test_a_reused_slot_shows_nothing_of_the_sequence_before() -> None:
    for policy in (Full(), StreamingLLM(kv_budget=9), H2O(kv_budget=9, num_sink_tokens=0), RKV(kv_budget=16), ADA_KV):
        used, fresh = make(policy), make(policy)
        generate(used, [40], 12)
        run(used, chunk(1, 0, 3, is_end=True, frees=[0]))
        run(fresh, chunk(1, 0, 3, is_end=True))

        assert torch.equal(generate(used, [6], 20), generate(fresh, [6], 20))


def test_streaming_output_does_not_depend_on_how_far_away_the_sinks_really_are() -> None:
    """The same sinks and the same newest tokens 8 and 24 positions later: same cache distances, same output."""
    near, far = make(StreamingLLM(kv_budget=12, num_sink_tokens=4)), make(StreamingLLM(kv_budget=12, num_sink_tokens=4))
    outs = []
    for attention, gap in ((near, 8), (far, 24)):
        num_tokens = 4 + gap + 8
        shared = [*range(4), *[1000 + index for index in range(gap)], *range(100, 108)]
        batch = Batch.of(chunk(0, 0, num_tokens, is_end=True), CPU)
        attention.begin(batch)
        for layer in range(NUM_LAYERS):
            q, k, v = (
                torch.stack(part)
                for part in zip(*[tokens(layer, label, 0, attention) for label in shared], strict=True)
            )
            attention(layer, q, k, v, batch)
        attention.end(batch)
        batch = Batch.of(decode_plan([0], [0], [num_tokens]), CPU)
        attention.begin(batch)
        q, k, v = (part[None] for part in tokens(0, 200, 0, attention))
        outs.append(attention(0, q, k, v, batch))

    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (decode_plan([0], [0], [8]), "commit or free"),
        (decode_plan([0], [0], [9], commits=[(0, 2)]), "cannot commit 2 of 1"),
        (decode_plan([0], [0], [9], commits=[(0, -1)]), "cannot commit -1"),
        (decode_plan([0], [0], [12], commits=[(0, 1)]), "positions 12 to 12, 1 of them, after 9"),
        (chunk(1, 0, 65, is_end=True), "more than max_model_len = 64"),
    ],
)
def test_a_plan_that_breaks_the_rules_is_refused(plan: StepPlan, said: str) -> None:
    attention = make(Full())
    run(attention, chunk(0, 0, 8, is_end=True))
    run(attention, decode_plan([0], [0], [8]))

    with pytest.raises(ValueError, match=said):
        attention.begin(Batch.of(plan, CPU))


def test_tokens_taken_back_are_as_if_they_had_never_been() -> None:
    ahead, straight = make(Full()), make(Full())
    run(ahead, chunk(0, 0, 9, is_end=True))
    run(straight, chunk(0, 0, 6, is_end=True))
    again = decode_plan([0], [0], [6])

    taken_back = run(ahead, dataclasses.replace(again, truncates=((0, 6),)), seed=1)

    assert torch.equal(taken_back, run(straight, again, seed=1))


@pytest.mark.parametrize(
    ("policy", "codec", "num_tokens", "said"),
    [
        (Full(), "native", 10, "cannot keep 10 of 9 tokens"),
        (Full(), "int4", 6, "only a cache that keeps every row"),
        (StreamingLLM(kv_budget=8), "native", 6, "only a cache that keeps every row"),
    ],
)
def test_what_cannot_be_taken_back_is_refused(policy: KVPolicy, codec: str, num_tokens: int, said: str) -> None:
    attention = make(policy, codec=codec)
    run(attention, chunk(0, 0, 9, is_end=True))

    with pytest.raises(ValueError, match=said):
        attention.begin(Batch.of(StepPlan(truncates=((0, num_tokens),)), CPU))


def test_a_budget_that_cannot_hold_what_one_step_commits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 can be evicted; a step can commit 5"):
        make(StreamingLLM(kv_budget=6, num_sink_tokens=4), max_query_len=5)

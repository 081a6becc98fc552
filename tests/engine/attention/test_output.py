"""Output tokens over a cache, encoded or not: kernel and plain path give what attention over all its rows gives."""

import pytest
import torch
from torch import Tensor

from codesign.engine.attention import output
from codesign.engine.attention.calls import Span, cut
from codesign.engine.attention.fold import fold, unfold
from codesign.engine.attention.output import OutputAttention
from codesign.engine.attention.rope import Rope
from codesign.engine.kernels import kv_attention
from codesign.engine.kernels.compiled import Missing
from codesign.engine.kv.group import LayerGroup
from codesign.engine.kv.policies.full import Full
from codesign.engine.kv.store import DenseStore
from codesign.registry import ATTENTION, KV_CODECS
from tests.engine.usable_backends import USABLE_BACKENDS

CPU = torch.device("cpu")
NUM_KV_HEADS = 2
needs_kernel = pytest.mark.skipif(isinstance(kv_attention.load(), Missing), reason=str(kv_attention.load()))


def filled(codec: str, lengths: list[int], *, num_queries: int, head_dim: int, dtype: torch.dtype) -> DenseStore:
    """One layer; slot i holds lengths[i] committed rows and num_queries pending ones."""
    rope = Rope(1 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim))
    store = DenseStore(
        num_layers=1,
        num_slots=len(lengths),
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
        max_model_len=max(lengths) + num_queries,
        max_query_len=num_queries,
        policy=Full(),
        codec=KV_CODECS.create(codec),
        rope_tables=rope.tables(max(lengths) + num_queries, CPU),
        dtype=dtype,
        device=CPU,
    )
    generator = torch.Generator().manual_seed(0)
    for slot, length in enumerate(lengths):
        for first in range(0, length + num_queries, num_queries):
            count = min(num_queries, length - first) if first < length else num_queries
            (rows,) = store.reserve([(slot, count)], [first], torch.arange(first, first + count))
            key, value = torch.randn(2, count, NUM_KV_HEADS, head_dim, generator=generator).to(dtype)
            store.write(0, rows, key, value)
            if first < length:
                store.commit([(slot, count)])
    return store


def attend(
    store: DenseStore,
    backend: str,
    lengths: list[int],
    *,
    num_queries: int,
    num_groups: int,
    want_columns: bool = True,
) -> tuple[str, Tensor, Tensor, Tensor]:
    """kernel, out, largest error of columns (0 if not wanted), and out in float64 from all decoded rows."""
    (group,) = store.groups
    head_dim, dtype = store.head_dim, store.dtype
    spans = [Span(slot, slot * num_queries, num_queries, length, False, False) for slot, length in enumerate(lengths)]
    attention = OutputAttention(
        store.codec,
        ATTENTION.create(backend),
        prompts="aten::scaled_dot_product_attention",
        num_kv_heads=NUM_KV_HEADS,
        scale=head_dim**-0.5,
        head_dim=head_dim,
        dtype=dtype,
        device=CPU,
    )
    shape = (len(lengths), NUM_KV_HEADS, num_groups * num_queries, head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    out, expected, every_error = torch.empty_like(query), torch.empty_like(query), [torch.zeros(())]
    kinds = {"is_ragged": attention.is_ragged, "is_indexed": attention.is_indexed}
    for call in cut(spans, num_groups=num_groups, dtype=dtype, device=CPU, **kinds):
        packed = unfold(query[call.slots], num_queries=num_queries)
        found, columns = attention(packed, group, 0, call, want_columns=want_columns)
        out[call.slots] = fold(found, num_queries=num_queries, num_kv_heads=NUM_KV_HEADS)
        assert (columns is not None) == want_columns
        for span in call.spans:
            slots = slice(span.slot, span.slot + 1)
            key, value = group.read(0, slots, slice(NUM_KV_HEADS), span.num_rows)
            score = query[slots].double() @ key.double().mT * head_dim**-0.5
            token = torch.arange(num_queries).repeat(num_groups)[:, None]
            score.masked_fill_(torch.arange(span.num_rows) > span.num_past + token, float("-inf"))
            wanted = score.softmax(dim=-1)
            expected[slots] = (wanted @ value.double()).to(dtype)
            if columns is None:
                continue
            own = columns[span.slot - call.slots.start]
            mean = wanted.view(NUM_KV_HEADS, num_groups, num_queries, -1).mean(dim=1)
            every_error.append((own[..., : span.num_rows] - mean).abs().max())
            assert own[..., span.num_rows :].abs().sum() == 0
    return attention.kernel, out, torch.stack(every_error).max(), expected


LENGTHS = [[0, 1, 5], [31, 32, 33, 100, 34], [63, 64, 65, 300]]


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize(("head_dim", "num_groups"), [(8, 1), (64, 4), (128, 2), (96, 8)])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_output_attention_equals_a_softmax_over_the_decoded_rows(
    codec: str, backend: str, lengths: list[int], head_dim: int, num_groups: int, num_queries: int
) -> None:
    store = filled(codec, lengths, num_queries=num_queries, head_dim=head_dim, dtype=torch.float32)
    _, out, column_error, expected = attend(store, backend, lengths, num_queries=num_queries, num_groups=num_groups)

    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    assert column_error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("num_queries", "num_groups"), [(1, 2), (3, 7)])
@pytest.mark.parametrize("backend", USABLE_BACKENDS)
@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_half_precision_stays_near_the_softmax_over_decoded_rows(
    codec: str, backend: str, num_queries: int, num_groups: int, dtype: torch.dtype
) -> None:
    lengths = [40, 41, 130]
    store = filled(codec, lengths, num_queries=num_queries, head_dim=64, dtype=dtype)
    _, out, column_error, expected = attend(store, backend, lengths, num_queries=num_queries, num_groups=num_groups)

    torch.testing.assert_close(out, expected, rtol=0, atol=0.02)
    assert column_error < 2e-3


@pytest.mark.parametrize("num_planes", [1, 2, 3, 4])
def test_decoding_in_small_slices_changes_nothing(num_planes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [50, 50, 50]
    store = filled("int8", lengths, num_queries=1, head_dim=16, dtype=torch.float32)
    _, whole, _, _ = attend(store, "eager", lengths, num_queries=1, num_groups=2)
    monkeypatch.setattr(output, "MAX_DECODED", {"cpu": num_planes * 51 * 16})
    _, parts, _, _ = attend(store, "eager", lengths, num_queries=1, num_groups=2)

    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_planes", [1, 2, 3, 7, 100])
def test_slices_are_every_plane_once_and_no_more_than_may_be_decoded(num_planes: int) -> None:
    seen = torch.zeros(5, 3)
    for slots, heads in output._slices(5, 3, num_planes):
        seen[slots, heads] += 1
        assert seen[slots, heads].numel() <= num_planes

    assert (seen == 1).all()


@needs_kernel
@pytest.mark.parametrize("codec", ["int8", "fp8", "int4"])
def test_with_a_kernel_nothing_is_decoded(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [100, 101]
    store = filled(codec, lengths, num_queries=1, head_dim=16, dtype=torch.float32)
    attention = OutputAttention(
        store.codec,
        ATTENTION.create("sdpa"),
        prompts="",
        num_kv_heads=NUM_KV_HEADS,
        scale=0.25,
        head_dim=16,
        dtype=store.dtype,
        device=CPU,
    )
    spans = [Span(slot, slot, 1, length, False, False) for slot, length in enumerate(lengths)]
    (call,) = cut(spans, num_groups=1, dtype=torch.float32, device=CPU)
    monkeypatch.delattr(LayerGroup, "read")
    out, _ = attention(torch.ones(2, NUM_KV_HEADS, 16), store.groups[0], 0, call, want_columns=False)

    assert out.isfinite().all()


@needs_kernel
@pytest.mark.parametrize("codec", ["native", "int8", "fp8", "int4"])
def test_threads_change_nothing(codec: str) -> None:
    lengths, before = [100, 3, 70, 64, 90], torch.get_num_threads()
    store = filled(codec, lengths, num_queries=2, head_dim=32, dtype=torch.float32)
    _, alone, _, _ = attend(store, "sdpa", lengths, num_queries=2, num_groups=3)
    try:
        torch.set_num_threads(3)
        _, together, _, _ = attend(store, "sdpa", lengths, num_queries=2, num_groups=3)
    finally:
        torch.set_num_threads(before)

    assert torch.equal(alone, together)


@needs_kernel
@pytest.mark.parametrize(
    ("dtype", "want_columns"), [(torch.float32, True), (torch.float16, True), (torch.float16, False)]
)
def test_native_rows_and_their_weights_are_read_in_one_pass(
    dtype: torch.dtype, want_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [100, 101]
    store = filled("native", lengths, num_queries=1, head_dim=16, dtype=dtype)

    def second_pass(*args: object, **kwargs: object) -> None:
        raise AssertionError("a backend call or a second pass over the keys")

    monkeypatch.setattr(OutputAttention, "_over_rows", second_pass)
    kernel, *_ = attend(store, "sdpa", lengths, num_queries=1, num_groups=2, want_columns=want_columns)

    assert kernel.startswith("codesign::attend_native, prompts ") == (dtype == torch.float16)


@needs_kernel
def test_the_kernel_that_runs_is_named() -> None:
    store = filled("int8", [3], num_queries=1, head_dim=8, dtype=torch.float32)

    def name(backend: str) -> str:
        return attend(store, backend, [3], num_queries=1, num_groups=1)[0]

    assert name("sdpa") == "codesign::attend_int8, prompts aten::scaled_dot_product_attention"
    assert name("eager").endswith("over decoded slices (plain)")


def test_without_a_kernel_the_reason_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_attention, "load", lambda: Missing("no C compiler (gcc) on this machine"))
    store = filled("int8", [3], num_queries=1, head_dim=8, dtype=torch.float32)
    kernel, *_ = attend(store, "sdpa", [3], num_queries=1, num_groups=1)

    assert kernel.endswith("over decoded slices (no C compiler (gcc) on this machine)")

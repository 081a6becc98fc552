"""The same engine on a CUDA device: same logits, allocator bytes, NVML energy. Skipped where there is none."""

import dataclasses
import os
import time
from typing import Any

import pytest
import torch

from codesign.engine.attention import calls
from codesign.engine.build import build_engine
from codesign.engine.engine import Engine
from codesign.engine.graphs import Graphs, Recorder
from codesign.engine.kernels.pieces import choose
from codesign.engine.kernels.plain import PLAIN
from codesign.engine.kv.cuda_lanes import cuda_lanes
from codesign.engine.kv.places.offload import Offload
from codesign.engine.kv.stream import LayerStream
from codesign.engine.models.tiny import tiny_spec
from codesign.engine.quantize.formats.fp8 import Fp8
from codesign.engine.quantize.formats.w8a8 import W8A8
from codesign.engine.quantize.linear import Workspace
from codesign.engine.runner import SingleRunner
from codesign.engine.step import BLOCK_TOKENS
from codesign.errors import Unsupported
from codesign.measure.child_session import ChildSession
from codesign.measure.memory import process_memory
from codesign.measure.monitor import Monitor, energy_source, gpus, make_probe
from codesign.measure.nursery import Nursery
from codesign.measure.nvml import MIN_ENERGY_WINDOW_S
from codesign.registry import KV_CODECS, KV_POLICIES, WEIGHT_FORMATS
from codesign.spec.engine_config import EngineConfig
from codesign.spec.request import Request, SamplingParams
from tests.engine.driving import generate, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def config(**changes: Any) -> EngineConfig:
    return EngineConfig.from_dict({"dtype": "fp32", "max_batch_size": 4, "max_model_len": 256, **changes})


@pytest.mark.parametrize("policy", KV_POLICIES.names())
def test_greedy_tokens_equal_those_of_the_cpu(policy: str) -> None:
    budget = {} if policy == "full" else {"kv_budget": 64}
    chosen = config(kv={"policy": {"name": policy, **budget}})
    requests = [request(f"r{index}", 40 + 30 * index, 12, ignore_eos=True) for index in range(4)]
    on_cpu = generate(build_engine(tiny_spec(), chosen), *requests)
    on_gpu = generate(build_engine(tiny_spec(), chosen, device="cuda"), *requests)

    assert on_gpu == on_cpu


@pytest.mark.parametrize("codec", KV_CODECS.names())
def test_every_codec_generates_what_it_generates_on_the_cpu(codec: str) -> None:
    """Two greedy tokens may differ where rounding falls the other way; most do not."""
    chosen = config(kv={"codec": codec})
    requests = [request(f"r{index}", 100 + 20 * index, 12, ignore_eos=True) for index in range(4)]
    on_cpu = generate(build_engine(tiny_spec(), chosen), *requests)
    on_gpu = generate(build_engine(tiny_spec(), chosen, device="cuda"), *requests)

    first = [(on_cpu[name][:3], on_gpu[name][:3]) for name in on_cpu]
    assert sum(cpu == gpu for cpu, gpu in first) >= 3


@pytest.mark.parametrize("attention", ["sdpa", "triton"])
@pytest.mark.parametrize("speculate", ["draft_model", "ngram"])
def test_speculation_gives_the_tokens_of_plain_decoding(speculate: str, attention: str) -> None:
    """Greedy; drawn tokens only have to come, since their law is compared on the CPU."""
    spec = dataclasses.replace(tiny_spec(), draft=tiny_spec())
    requests = [request(f"r{index}", 40 + 30 * index, 24, ignore_eos=True) for index in range(4)]
    drawn = request("drawn", 20, 24, ignore_eos=True, temperature=0.9, top_p=0.9)
    plain = generate(build_engine(spec, config(attention=attention), device="cuda"), *requests)
    chosen = config(attention=attention, speculate={"name": speculate, "adaptive": False})
    found = generate(build_engine(spec, chosen, device="cuda"), *requests, drawn)

    assert len(found.pop("drawn")) == 24
    assert found == plain


OFFLOADED = [
    (policy, codec)
    for policy in KV_POLICIES.names()
    for codec in ("native", "int8", "fp8")
    if policy != "r_kv"  # refused: it scores the keys of all layers at once
]


@pytest.mark.parametrize(("policy", "codec"), OFFLOADED)
def test_offloaded_rows_give_the_tokens_of_the_device(policy: str, codec: str) -> None:
    budget = {} if policy == "full" else {"kv_budget": 64}
    requests = [request(f"r{index}", 40 + 30 * index, 24, ignore_eos=True) for index in range(6)]

    def tokens(place: str) -> dict[str, list[int]]:
        kv = {"policy": {"name": policy, **budget}, "codec": codec, "place": place}
        chosen = config(kv=kv, max_step_tokens=48)
        return generate(build_engine(tiny_spec(num_hidden_layers=5), chosen, device="cuda"), *requests)

    assert tokens("offload") == tokens("device")


def test_offloaded_rows_leave_two_layers_on_the_device_and_count_as_memory_of_the_process() -> None:
    """Pinned memory is not free: it is resident, all of it, and goes with the engine."""
    spec = tiny_spec(num_hidden_layers=16, max_position_embeddings=8192)
    chosen = config(kv={"place": "offload"}, max_batch_size=8, max_model_len=8192)
    torch.cuda.init()
    device_before, host_before = torch.cuda.memory_allocated(), process_memory(os.getpid())
    engine = build_engine(spec, chosen, device="cuda")
    facts, host = engine.facts(), process_memory(os.getpid())
    kv_bytes, where = facts["bytes"]["kv"], facts["resolved"]["kv_place"]
    on_device = torch.cuda.memory_allocated() - device_before - facts["bytes"]["weights"]

    assert where["pinned host memory"] == kv_bytes - where["cuda memory"]
    assert where["cuda memory, buffers"] == pytest.approx(kv_bytes / 8, rel=0.01)
    assert on_device < kv_bytes / 6
    assert host is not None and host_before is not None and host.rss_bytes - host_before.rss_bytes >= kv_bytes
    engine.close()
    host = process_memory(os.getpid())
    assert host is not None and host.rss_bytes - host_before.rss_bytes < kv_bytes / 2


def test_layers_are_copied_while_others_compute() -> None:
    """By events: copies and products together take less than one after the other."""
    device, num_layers, num_rows = torch.device("cuda"), 12, 1 << 16
    far = (Offload().zeros(num_layers * num_rows, 256, dtype=torch.float32, device=device),)
    strip = (Offload().zeros(num_layers, 1, 256, dtype=torch.float32, device=device),)
    layer_rows = [range(layer * num_rows, (layer + 1) * num_rows) for layer in range(num_layers)]
    stream = LayerStream(far, layer_rows, strip, cuda_lanes(device), device=device)
    matrix = torch.randn(4096, 4096, device=device)

    def pass_ms(*, with_rows: bool, num_products: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        stream.begin([[range(num_rows if with_rows else 0)]] * num_layers)
        for layer in range(num_layers):
            stream.enter(layer)
            for _ in range(num_products):
                matrix @ matrix
            stream.leave(layer)
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    for with_rows in (True, False):
        pass_ms(with_rows=with_rows, num_products=8)
    copies = pass_ms(with_rows=True, num_products=0)
    num_products = max(1, round(copies / (pass_ms(with_rows=False, num_products=8) / 8)))
    products = pass_ms(with_rows=False, num_products=num_products)

    # At least half of what takes less is hidden.
    assert pass_ms(with_rows=True, num_products=num_products) < copies + products - 0.5 * min(copies, products)


@pytest.mark.parametrize(
    "kv", [{"codec": "int4"}, {"codec": "low_rank"}, {"policy": {"name": "r_kv", "kv_budget": 64}}]
)
def test_what_cannot_be_streamed_is_refused_by_name(kv: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=r"kv.place 'offload' on cuda brings one layer's rows at a time"):
        build_engine(tiny_spec(head_dim=32), config(kv={**kv, "place": "offload"}, max_model_len=256), device="cuda")


@pytest.mark.parametrize(
    "weights", ["native", "int8", {"name": "int4", "group_size": 32}, "int3", "int2", "nf4", "w8a8"]
)
def test_every_weight_format_runs(weights: Any) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    engine = build_engine(tiny_spec(**shape), config(dtype="bf16", weights=weights), device="cuda")

    assert len(generate(engine, request("r", 32, 8, ignore_eos=True))["r"]) == 8


GRAPH_SHAPE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}


def replaying(record: Recorder | None = None, **chosen: Any) -> Engine:
    """An engine whose steps are replayed: by the device, or by what stands in for its recordings."""
    if record is None:
        chosen["kernels"] = {**chosen.get("kernels", {}), "graphs": True}
    engine = build_engine(tiny_spec(**GRAPH_SHAPE), config(attention="triton", **chosen), device="cuda")
    if record is None:
        return engine
    parts = engine.parts
    runner = SingleRunner(parts.model, parts.attention, parts.device, Graphs(record, parts.workspace))
    return Engine(dataclasses.replace(parts, runner=runner))


def coming_and_going(engine: Engine) -> dict[str, list[int]]:
    """Six requests for four slots: there are gaps between those in use, and some come while others run."""
    lengths = ((40, 90), (70, 8), (9, 40), (25, 60), (100, 30), (5, 50))
    return generate(engine, *(request(f"r{index}", *own, ignore_eos=True) for index, own in enumerate(lengths)))


INT4 = {"name": "int4", "group_size": 32}
FUSED = {"fused": True}
REPLAYED: dict[str, dict[str, Any]] = {
    "dense fp32": {},
    "dense fp32, fused": {"kernels": FUSED},
    "dense bf16, int4": {"dtype": "bf16", "weights": INT4},
    "dense bf16, int4, fused": {"dtype": "bf16", "weights": INT4, "kernels": FUSED},
    "dense fp32, int4": {"weights": INT4},
    "dense bf16, int8 rows": {"dtype": "bf16", "kv": {"codec": "int8"}, "kernels": FUSED},
    "dense fp32, fp8 rows": {"kv": {"codec": "fp8"}},
    "paged fp32": {"kv": {"layout": "paged"}},
    "paged bf16, fused": {"dtype": "bf16", "kv": {"layout": "paged"}, "kernels": FUSED},
    "paged fp32, int8 rows": {"kv": {"layout": "paged", "codec": "int8"}},
    "snapkv fp32": {"kv": {"policy": {"name": "snapkv", "kv_budget": 48}}},
    "pyramidkv bf16": {"dtype": "bf16", "kv": {"policy": {"name": "pyramidkv", "kv_budget": 48}}},
    "ada_kv fp32": {"kv": {"policy": {"name": "ada_kv", "kv_budget": 48}}},
    "ada_kv bf16, int8 rows": {
        "dtype": "bf16",
        "kv": {"policy": {"name": "ada_kv", "kv_budget": 48}, "codec": "int8"},
    },
    "h2o fp32": {"kv": {"policy": {"name": "h2o", "kv_budget": 48}}},
    "h2o bf16, fused": {"dtype": "bf16", "kv": {"policy": {"name": "h2o", "kv_budget": 48}}, "kernels": FUSED},
    "r_kv fp32": {"kv": {"policy": {"name": "r_kv", "kv_budget": 48, "buffer_tokens": 4}}},
    "bf16, int8": {"dtype": "bf16", "weights": "int8"},
    "bf16, w8a8": {"dtype": "bf16", "weights": "w8a8"},
    "bf16, fp8": {"dtype": "bf16", "weights": "fp8"},
}


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_steps_give_the_tokens_of_launched_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same steps launched kernel by kernel, in any dtype. A plain engine cuts attention into other splits, whose
    sums may differ in their last bits: it is compared in fp32, where they decide no token."""
    monkeypatch.setattr(calls, "LEAST_FIXED_ROWS", 32)
    chosen = REPLAYED[name]
    if chosen.get("weights") == "fp8" and not has_fp8():
        pytest.skip("needs compute capability 8.9")
    replayed, launched = replaying(**chosen), replaying(lambda work: work, **chosen)

    found = coming_and_going(replayed)

    stats = replayed.stats()
    assert stats["graphs_captured"] >= 3 and stats["steps_replayed"] > stats["steps_not_replayed"]
    assert found == coming_and_going(launched)
    if "dtype" not in chosen:
        plain = build_engine(tiny_spec(**GRAPH_SHAPE), config(attention="triton", **chosen), device="cuda")
        assert found == coming_and_going(plain)


@pytest.mark.parametrize("speculate", ["draft_model", "ngram"])
def test_replayed_drafts_and_verifications_give_the_tokens_of_plain_decoding(speculate: str) -> None:
    spec = dataclasses.replace(tiny_spec(), draft=tiny_spec())
    requests = [request(f"r{index}", 40 + 30 * index, 40, ignore_eos=True) for index in range(4)]
    chosen = {"name": speculate, "adaptive": False}
    engine = build_engine(spec, config(attention="triton", speculate=chosen, kernels={"graphs": True}), device="cuda")

    assert generate(engine, *requests) == generate(
        build_engine(spec, config(attention="triton"), device="cuda"), *requests
    )
    assert engine.stats()["steps_replayed"] > 0


def test_replaying_takes_no_more_memory_however_often() -> None:
    engine = build_engine(tiny_spec(), config(attention="triton", kernels={"graphs": True}), device="cuda")
    engine.submit(request("r", 8, 240, ignore_eos=True))
    seen = []
    for num_steps in (30, 200):
        for _ in range(num_steps):
            engine.step()
        seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    assert seen[0] == seen[1]
    assert engine.stats()["steps_replayed"] >= 225 and engine.stats()["graphs_captured"] == 1


@pytest.mark.parametrize("num_rows", [1, 7, 16, 17, 300])
def test_w8a8_multiplies_whole_numbers_exactly(num_rows: int) -> None:
    linear = W8A8().pack(torch.randn(336, 512, device="cuda"), None, dtype=torch.float32, workspace=Workspace())
    x = torch.randn(num_rows, 512, device="cuda")

    assert "aten::_int_mm (" in linear.kernel
    torch.testing.assert_close(linear(x), linear.rounded(x) @ linear.dequantize().t(), rtol=1e-5, atol=1e-3)


def has_fp8() -> bool:
    return torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.parametrize("num_rows", [1, 7, 16, 300])
@pytest.mark.parametrize("has_bias", [False, True])
def test_fp8_tensor_cores_multiply_what_the_weights_say(num_rows: int, has_bias: bool) -> None:
    if not has_fp8():
        pytest.skip("needs compute capability 8.9")
    weight, bias = torch.randn(336, 512, device="cuda") * 0.05, torch.randn(336, device="cuda")
    linear = Fp8().pack(weight, bias if has_bias else None, dtype=torch.bfloat16, workspace=Workspace())
    x = torch.randn(num_rows, 512, device="cuda").bfloat16()
    x[0] = 0

    found = linear(x)

    wanted = linear.rounded(x).double() @ linear.dequantize().double().t()
    if has_bias:
        wanted += bias.bfloat16().double()
    assert "aten::_scaled_mm" in linear.kernel
    assert linear.num_bytes == 336 * 512 + 336 * 4 + (336 * 2 if has_bias else 0)
    assert float((found.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)) < 8e-3


def test_fp8_rounds_on_the_gpu_as_its_emulation_does_on_the_cpu() -> None:
    if not has_fp8():
        pytest.skip("needs compute capability 8.9")
    weight, x = torch.randn(64, 128) * 0.05, torch.randn(9, 128).bfloat16()
    here = Fp8(emulated=True).pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())
    there = Fp8().pack(weight.cuda(), None, dtype=torch.bfloat16, workspace=Workspace())

    # A scale may differ in its last bit, which moves the rare weight that lies between two values.
    for found, wanted in ((there.dequantize(), here.dequantize()), (there.rounded(x.cuda()), here.rounded(x))):
        assert float((found.cpu() - wanted).norm() / wanted.norm()) < 2e-3


def test_fp8_runs_where_it_can_and_is_refused_elsewhere() -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    wanted = config(dtype="bf16", weights="fp8")
    if has_fp8():
        engine = build_engine(tiny_spec(**shape), wanted, device="cuda")
        assert "_scaled_mm" in engine.facts()["kernels"]["weights"]
        assert len(generate(engine, request("r", 32, 8, ignore_eos=True))["r"]) == 8
    else:
        with pytest.raises(Unsupported, match=r"compute capability 8\.9 and above"):
            build_engine(tiny_spec(**shape), wanted, device="cuda")


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_fused_pieces_give_the_tokens_of_plain_ones(architecture: str) -> None:
    requests = [request(f"r{index}", 40 + 30 * index, 12, ignore_eos=True) for index in range(4)]
    plain, fused = (
        build_engine(tiny_spec(architecture), config(kernels={"fused": value}), device="cuda")
        for value in (False, True)
    )

    assert "triton::fused" in fused.facts()["kernels"]["fused"]
    assert generate(fused, *requests) == generate(plain, *requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_pieces_are_near_plain_ones(dtype: torch.dtype) -> None:
    """Relative to all values of a result together, by the bounds of the products below."""
    pieces = choose(True, dtype=dtype, device=torch.device("cuda"))
    x, change = torch.randn(2, 33, 4096, device="cuda").to(dtype)
    weight = torch.randn(4096, device="cuda").to(dtype)
    q, k, _ = x.view(33, 32, 128).split((20, 6, 6), dim=1)
    tables = torch.randn(2, 33, 1, 128, device="cuda").unbind()
    ours, plain = (
        [
            *own.add_norm(x, change, weight, 1e-6),
            *own.norm_heads(q, k, weight[:128], weight[128:256], 1e-6),
            *own.rotate(q, k, *tables),
            own.silu_mul(x),
        ]
        for own in (pieces, PLAIN)
    )

    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - theirs.double()).norm() / theirs.double().norm() <= EPS[dtype]


KERNELS = {"int8": "w8a16", "int4": "w4a16", "int3": "w3a16", "int2": "w2a16", "nf4": "nf4"}
EPS = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def packed(name: str, size: tuple[int, int], dtype: torch.dtype, **knobs: Any) -> Any:
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 0.05
    member = WEIGHT_FORMATS.create(name, **knobs)
    return member.pack(weight.to("cuda"), torch.ones(size[0], device="cuda"), dtype=dtype, workspace=Workspace())


def relative_error(linear: Any, x: torch.Tensor) -> float:
    expected = x.double() @ linear.dequantize().double().t() + 1
    return float((linear(x).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("size", [(48, 128), (1040, 768), (4096, 4096)])
def test_triton_kernels_equal_the_product_of_the_dequantised_weight(
    name: str, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    linear = packed(name, size, dtype)

    assert linear.kernel.startswith(f"triton::{KERNELS[name]} ")
    for num_rows in (1, 3, 16, 17, 64, 65, 300):
        assert relative_error(linear, torch.randn(num_rows, size[1], device="cuda").to(dtype)) < EPS[dtype], num_rows


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize("symmetric", [True, False])
def test_triton_kernels_hold_for_every_group_size(name: str, group_size: int, symmetric: bool) -> None:
    linear = packed(name, (512, 1024), torch.bfloat16, group_size=group_size, symmetric=symmetric)

    assert relative_error(linear, torch.randn(5, 1024, device="cuda").bfloat16()) < EPS[torch.bfloat16]
    assert relative_error(linear, torch.randn(40, 1024, device="cuda").bfloat16()) < EPS[torch.bfloat16]


@pytest.mark.parametrize("name", KERNELS)
def test_a_product_is_the_same_every_time(name: str) -> None:
    linear = packed(name, (4096, 4096), torch.bfloat16)
    x = torch.randn(4, 4096, device="cuda").bfloat16()
    first = linear(x)

    assert all(torch.equal(linear(x), first) for _ in range(20))


@pytest.mark.parametrize("codec", ["native", "int8", "fp8", "int4"])
@pytest.mark.parametrize("policy", ["full", "h2o", "ada_kv"])
def test_triton_attention_generates_what_eager_does(policy: str, codec: str) -> None:
    if policy != "full" and codec == "int4":
        pytest.skip("rows in groups cannot be evicted")
    budget = {} if policy == "full" else {"kv_budget": 64}
    requests = [request(f"r{index}", 40 + 30 * index, 12, ignore_eos=True) for index in range(4)]
    found = {}
    for attention in ("triton", "eager"):
        chosen = config(kv={"policy": {"name": policy, **budget}, "codec": codec}, attention=attention)
        engine = build_engine(tiny_spec(), chosen, device="cuda")
        found[attention] = generate(engine, *requests)
        if attention == "triton" and codec != "int4":  # of the tiny model's heads no int4 group is read
            assert "triton::attend, prompts aten::scaled_dot_product_attention" in str(engine.facts())
            assert "decoded slices" not in str(engine.facts())

    assert found["triton"] == found["eager"]


# Outputs are rounded once to their dtype, and so are the softmax weights. In fp32 a score of up to 16 (base 2) carries
# an error of some 1e-6, and so does the weight of a value of up to 5.
ATTENTION_RTOL = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
ATTENTION_ATOL = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
COUNTS = [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, 4096, 4097]


def stored_rows(codec: str, dtype: torch.dtype, head_dim: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Parts [B, H_kv, R, X] as a codec stores rows, and what they mean in float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(len(COUNTS), 2, max(COUNTS), head_dim, device="cuda", generator=generator).to(dtype)
    member = KV_CODECS.create(codec)
    parts = member.encode(rows)
    return parts, rows.double() if member.is_native else member.decode(parts, torch.float32).double()


@pytest.mark.parametrize("dtype", list(ATTENTION_ATOL), ids=str)
@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
@pytest.mark.parametrize(("num_groups", "num_tokens"), [(1, 1), (4, 1), (8, 1), (1, 4), (4, 4), (8, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_triton_attention_equals_float64(
    head_dim: int, num_groups: int, num_tokens: int, codec: str, dtype: torch.dtype
) -> None:
    from codesign.engine.kernels.triton.attend import attend

    (key, key64), (value, value64) = (stored_rows(codec, dtype, head_dim) for _ in range(2))
    counts = torch.tensor(COUNTS, dtype=torch.int32, device="cuda")
    query = torch.randn(len(COUNTS), 2, num_groups * num_tokens, head_dim, device="cuda").to(dtype)
    token = torch.arange(query.shape[2], device="cuda") % num_tokens
    seen = torch.arange(max(COUNTS), device="cuda") < (counts[:, None] - (num_tokens - 1 - token))[..., None]

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        out, columns = attend(
            query, key, value, codec=codec, counts=counts, num_tokens=num_tokens, scale=0.2, want_columns=True
        )
        assert columns is not None
        return out, columns

    out, columns = run()
    score = (query.double() @ key64.mT * 0.2).masked_fill(~seen[:, None], float("-inf"))
    weight = score.softmax(dim=-1).nan_to_num(0)
    mean = weight.view(len(COUNTS), 2, num_groups, num_tokens, -1).mean(dim=2)
    torch.testing.assert_close(out.double(), weight @ value64, rtol=ATTENTION_RTOL[dtype], atol=ATTENTION_ATOL[dtype])
    torch.testing.assert_close(columns.double(), mean, rtol=0, atol=2e-6)
    for again, first in zip(run(), (out, columns), strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("dtype", list(ATTENTION_ATOL), ids=str)
@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_triton_attention_reads_every_code_exactly(codec: str, dtype: torch.dtype) -> None:
    """As the low and as the high half of a word: here PTX turns them into numbers, which no interpreter runs."""
    from codesign.engine.kernels.triton.attend import attend

    codes = torch.arange(256, dtype=torch.uint8, device="cuda")
    codes = codes.view(torch.int8) if codec == "int8" else codes[(codes & 127) != 127]
    both = torch.cat([codes, codes.roll(1)]).view(1, 1, 1, -1)
    scale = torch.ones(1, 1, 1, 1, device="cuda").bfloat16()

    out, _ = attend(torch.ones_like(both, dtype=dtype), (both, scale), (both, scale), codec=codec, scale=1.0)

    assert torch.equal(out.float(), KV_CODECS.create(codec).decode((both, scale), torch.float32))


@pytest.mark.parametrize("dtype", list(ATTENTION_ATOL), ids=str)
@pytest.mark.parametrize("codec", ["native", "int8", "fp8"])
def test_triton_attention_over_blocks_equals_that_over_rows(codec: str, dtype: torch.dtype) -> None:
    from codesign.engine.kernels.triton.attend import attend

    counts = torch.tensor(COUNTS, dtype=torch.int32, device="cuda")
    num_blocks = -(-max(COUNTS) // BLOCK_TOKENS)
    table = torch.randperm(len(COUNTS) * num_blocks, device="cuda").view(len(COUNTS), num_blocks)
    rows, blocks = zip(*(in_blocks(stored_rows(codec, dtype, 128)[0], table) for _ in range(2)), strict=True)
    query = torch.randn(len(COUNTS), 2, 4 * 3, 128, device="cuda").to(dtype)
    how = {"codec": codec, "counts": counts, "num_tokens": 3, "scale": 0.2}

    out, _ = attend(query, *blocks, table=table.int()[:, None].expand(-1, 2, -1), **how)

    expected, _ = attend(query, *rows, **how)
    torch.testing.assert_close(out, expected, rtol=ATTENTION_RTOL[dtype], atol=ATTENTION_ATOL[dtype])


def in_blocks(
    parts: tuple[torch.Tensor, ...], table: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Parts [B, H_kv, R, X], and the same in blocks [num_blocks, H_kv, 32, X] as table [B, n] names them."""
    blocks = []
    for part in parts:
        num_rows = table.shape[1] * BLOCK_TOKENS
        padded = part.new_zeros(*part.shape[:2], num_rows, part.shape[3])
        padded[:, :, : part.shape[2]] = part
        found = part.new_empty(table.numel(), part.shape[1], BLOCK_TOKENS, part.shape[3])
        found[table.flatten()] = padded.unflatten(2, (-1, BLOCK_TOKENS)).transpose(1, 2).flatten(0, 1)
        blocks.append(found)
    return parts, tuple(blocks)


@pytest.mark.parametrize("dtype", list(ATTENTION_ATOL), ids=str)
@pytest.mark.parametrize("num_past", [0, 700])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_triton_column_sums_equal_the_plain_ones(head_dim: int, num_past: int, dtype: torch.dtype) -> None:
    from codesign.engine.attention import weights
    from codesign.engine.kernels.triton.column_sums import column_sums

    query = torch.randn(1, 8, 1025, head_dim, device="cuda").to(dtype)
    key = torch.randn(1, 2, num_past + 1025, head_dim, device="cuda").to(dtype)
    row = torch.arange(key.shape[2], device="cuda")
    hidden = row > row[num_past:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype, device="cuda").masked_fill_(hidden, float("-inf"))[None, None]
    seen = {"mask": mask if num_past else None, "is_causal": not num_past, "scale": 0.2, "decay": 0.999}

    found = column_sums(query, key, **seen)

    torch.testing.assert_close(found, weights.column_sums(query, key, **seen), rtol=2e-4, atol=2e-4)
    assert torch.equal(column_sums(query, key, **seen), found)


def test_triton_column_sums_need_memory_linear_in_the_prompt() -> None:
    from codesign.engine.kernels.triton.column_sums import column_sums

    peaks = []
    for num_tokens in (4096, 8192):
        query, key = (torch.randn(1, heads, num_tokens, 128, device="cuda").bfloat16() for heads in (8, 2))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        column_sums(query, key, mask=None, is_causal=True, scale=0.1)
        peaks.append(torch.cuda.max_memory_allocated() - before)

    assert peaks[0] <= 2 * 4096 * (8 + 2) * 4 and peaks[1] <= 2.1 * peaks[0]


def test_a_session_reports_the_allocators_peak() -> None:
    with Nursery() as nursery, ChildSession(nursery, model=tiny_spec(), device="cuda") as session:
        facts = session.build(config())
        prompt = tuple(range(32))
        session.submit(Request(request_id="r", prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=4)))
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and not any(event.finish_reason for event in session.poll(1.0)):
            continue
        memory = session.memory()

    assert memory["peak_memory_bytes"] >= facts.bytes["weights"] + facts.bytes["kv"]


def test_the_energy_counter_moves_with_work() -> None:
    assert energy_source("cuda").scope == "gpu board (NVML)"
    [gpu, *_] = gpus()
    work = torch.randn(4096, 4096, device="cuda")
    with Monitor(make_probe("cuda", pid=0)) as watch:
        end = time.monotonic() + MIN_ENERGY_WINDOW_S + 0.5
        while time.monotonic() < end:
            work @ work
            torch.cuda.synchronize()

    assert watch.reading["gpu_uuids"] == [gpu["uuid"]]
    assert 0 < watch.reading["energy_j"] / MIN_ENERGY_WINDOW_S < 1.2 * watch.reading["power_limit_w"]
    assert watch.reading["sm_mhz_median"] > 0

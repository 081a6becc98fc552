"""The part `kv` of gpu_campaign.py: attention of decode steps under each KV policy and codec, beside the full cache.

`NUM_LAYERS` layers of Llama-3.1-8B's heads, many sequences at the end of their context; nothing is prefilled, random
rows are kept and stored as those of a finished prompt (kv_fill.py). `attention_ms` is what the device needs for the
attention calls of one step (rotation, writing of the new rows, decode, scores for a policy that wants them), by CUDA
events; the device is kept busy until all of them are launched, so that it is not the host's time. `around_ms` is the
host's time before and after (commit, eviction, indices), whole. Median of `STEPS` steps after three. `x_full` is the
share of the full cache's, of bytes and of time; a case that is refused or cannot be timed so is a row with the reason.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from kv_fill import fill  # beside this script

from codesign.engine.attention.layer import Attention
from codesign.engine.attention.switched import SwitchedAttention, make_attention
from codesign.engine.batch import Batch
from codesign.engine.kernels.pieces import choose
from codesign.engine.models.rope_scaling import rope_of
from codesign.engine.models.shape import read_shape
from codesign.engine.step import decode_plan
from codesign.errors import CodesignError
from codesign.registry import ATTENTION, KV_CODECS, KV_POLICIES

NUM_LAYERS, STEPS, WARM_UPS = 2, 9, 3
CONTEXTS = {8192: 128, 32768: 32}  # tokens -> sequences
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full int8": {"codec": "int8"},
    "full fp8": {"codec": "fp8"},
    "full int4": {"codec": "int4"},
    **{
        f"{policy} {budget}": {"policy": policy, "kv_budget": budget}
        for budget in (0.1, 0.25)
        for policy in ("streaming_llm", "h2o", "snapkv", "pyramidkv", "ada_kv", "r_kv", "dynamic")
    },
}
_HEAD_START_CYCLES = 40_000_000  # some 20 ms of a busy device

Clock = Callable[[Callable[[], None]], float]
"""Milliseconds that the device needs for what is launched."""


def cuda_ms(launch: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    launch()
    end.record()
    if begin.query():
        raise RuntimeError("the device waited for launches, so that its own time is not known")
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def kv(
    seconds: float,
    *,
    architecture: Mapping[str, Any],
    device: str = "cuda",
    contexts: Mapping[int, int] = CONTEXTS,
    cases: Mapping[str, Mapping[str, Any]] = CASES,
    attention: str = "triton",
    clock: Clock = cuda_ms,
) -> dict[str, Any]:
    """One row a context and case, the full cache first."""
    deadline_s = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    for context, num_slots in contexts.items():
        full: dict[str, Any] = {}
        for name, case in cases.items():
            where = {"context": context, "sequences": num_slots, "case": name}
            if time.monotonic() > deadline_s:
                rows.append({**where, "absent": "no time left"})
                continue
            started = time.monotonic()
            try:
                own = measure(architecture, context, num_slots, case, torch.device(device), attention, clock)
            except (CodesignError, ValueError, RuntimeError) as error:
                rows.append({**where, "absent": f"{type(error).__name__}: {str(error)[:200]}"})
                continue
            finally:
                gc.collect()
                print(f"{context} tokens, {name}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
            full = full or own
            shares = {figure: own[figure] / full[figure] for figure in ("kv_bytes", "attention_ms")}
            rows.append(
                {**where, **own, "x_full": shares, "time_over_bytes": shares["attention_ms"] / shares["kv_bytes"]}
            )
    return {"device": torch.cuda.get_device_name() if device == "cuda" else device, "rows": rows}


@torch.inference_mode()
def measure(
    architecture: Mapping[str, Any],
    context: int,
    num_slots: int,
    case: Mapping[str, Any],
    device: torch.device,
    attention: str,
    clock: Clock,
) -> dict[str, Any]:
    shape, dtype = read_shape(dict(architecture), file=None), torch.bfloat16
    knobs = {name: value for name, value in case.items() if name not in ("policy", "codec")}
    attend = make_attention(
        num_layers=NUM_LAYERS,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        scale=shape.head_dim**-0.5,
        rope=rope_of(shape.rope, shape.head_dim),
        policy=KV_POLICIES.create(case.get("policy", "full"), **knobs),
        codec=KV_CODECS.create(case.get("codec", "native")),
        backend=ATTENTION.create(attention),
        num_slots=num_slots,
        max_model_len=context,
        max_query_len=1,
        dtype=dtype,
        device=device,
        pieces=choose(device.type == "cuda", dtype=dtype, device=device),
    )
    assert isinstance(attend, Attention | SwitchedAttention)
    position = context - 1 - WARM_UPS - STEPS
    for part in attend.parts if isinstance(attend, SwitchedAttention) else [attend]:
        fill(part, position, num_heads=shape.num_heads)
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    q, k, v = (torch.randn(num_slots, own, shape.head_dim, device=device, dtype=dtype) for own in heads)
    commits: tuple[tuple[int, int], ...] = ()
    times, around = list[float](), list[float]()
    for _ in range(WARM_UPS + STEPS):
        slots = range(num_slots)
        started = time.perf_counter()
        batch = Batch.of(decode_plan(slots, [7] * num_slots, [position] * num_slots, commits=commits), device)
        attend.begin(batch)
        begun = time.perf_counter()
        times.append(clock(lambda batch=batch: [attend(layer, q, k, v, batch) for layer in range(NUM_LAYERS)]))
        called = time.perf_counter()
        attend.end(batch)
        around.append((begun - started + time.perf_counter() - called) * 1e3)
        position, commits = position + 1, tuple((slot, 1) for slot in slots)
    return {
        "kv_bytes": attend.kv_bytes,
        "attention_ms": statistics.median(times[WARM_UPS:]),
        "attention_ms_of_steps": times[WARM_UPS:],
        "around_ms": statistics.median(around[WARM_UPS:]),
        "kernel": attend.kernel,
    }

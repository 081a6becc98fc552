"""The part `weights` of gpu_campaign.py: each way to multiply with packed weights, by M, and the fastest configs.

For each shape, format and M: the format's own way of unpacking slices and multiplying them densely, our Triton kernel,
and what ATen has. Each is compared with a float64 product of the weight that it holds before it is timed. Times are of
CUDA events, with the L2 cache overwritten before each repetition (that write also hides the host's launches, up to its
own length); median of 25. A way that this device lacks is a row with the reason.

Then, in the time that is left, each kernel's configs are tried one after the other; `tuned` is what belongs into
codesign/engine/kernels/triton/tuned.json.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from codesign.engine.kernels.triton import available
from codesign.engine.quantize.format import GridFormat
from codesign.engine.quantize.formats.fp8 import Fp8
from codesign.engine.quantize.formats.int2 import Int2
from codesign.engine.quantize.formats.int3 import Int3
from codesign.engine.quantize.formats.int4 import Int4
from codesign.engine.quantize.formats.int8 import Int8
from codesign.engine.quantize.formats.nf4 import Nf4
from codesign.engine.quantize.formats.w8a8 import W8A8
from codesign.engine.quantize.linear import Workspace, weight_bytes
from codesign.engine.quantize.packed_linear import PackedLinear

SHAPES = [(4096, 4096), (4096, 14336)]  # [out, in]
ROWS = [1, 4, 16, 64, 256, 1024]
FORMATS: dict[str, GridFormat] = {
    "int8": Int8(),
    "int4": Int4(group_size=128),
    "nf4": Nf4(),
    "int3": Int3(group_size=128),
    "int2": Int2(group_size=32),
}
TUNED_BUCKETS = (16, 64)
REPETITIONS, WARM_UPS = 25, 3
MAX_ERROR = 6e-3  # of bf16 results: weights rounded to bf16 and results rounded to bf16 give 2e-3 each
FLUSHED_BYTES = 2**31  # half a millisecond of writes: longer than the launches that they hide
TIE = 0.02  # a config must beat the rule's by more

Multiply = Callable[[Tensor], Tensor]
Timer = Callable[[Multiply, Tensor], list[float]]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to multiply.

    Attributes:
        multiply: x -> y, or why there is none.
        weight: [out, in] float64, what it multiplies with.
        rounded: x as it is multiplied.
    """

    name: str
    multiply: Multiply | str
    weight_bytes: int = 0
    weight: Tensor | None = None
    rounded: Multiply = lambda x: x


def cuda_times(multiply: Multiply, x: Tensor) -> list[float]:
    """Milliseconds of each repetition."""
    scratch = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=x.device)
    for _ in range(WARM_UPS):
        multiply(x)
    pairs = []
    for _ in range(REPETITIONS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        scratch.zero_()
        start.record()
        multiply(x)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def weights(
    seconds: float,
    *,
    device: str = "cuda",
    shapes: list[tuple[int, int]] = SHAPES,
    rows: list[int] = ROWS,
    timer: Timer = cuda_times,
) -> dict[str, Any]:
    """The rows of the table, and the configs that were fastest."""
    deadline_s = time.monotonic() + seconds
    generator = torch.Generator().manual_seed(0)
    timed: list[dict[str, Any]] = []
    tuned: dict[str, str] = {}
    trials: list[dict[str, Any]] = []
    linears: dict[tuple[str, tuple[int, int]], PackedLinear] = {}
    for shape in shapes:
        weight = (torch.randn(shape, generator=generator) * 0.02).to(device, torch.bfloat16)
        for way in ways(weight, linears):
            for num_rows in rows:
                x = torch.randn(num_rows, shape[1], generator=generator).to(device, torch.bfloat16)
                timed.append({"shape": list(shape), "rows": num_rows, "way": way.name, **measure(way, x, timer)})
    for (name, shape), linear in linears.items():
        for bucket in TUNED_BUCKETS:
            if linear.few_rows.triton is None or time.monotonic() > deadline_s:
                continue
            x = torch.randn(bucket if bucket > TUNED_BUCKETS[0] else 1, shape[1], generator=generator)
            found = tune(name, linear, x.to(device, torch.bfloat16), bucket, timer, deadline_s)
            trials += found
            if found and "median_ms" in found[0]:
                first = found[0]
                best = min((trial for trial in found if "median_ms" in trial), key=lambda trial: trial["median_ms"])
                chosen = best if best["median_ms"] < (1 - TIE) * first["median_ms"] else first
                tuned[first["key"]] = chosen["config"]
    where = torch.cuda.get_device_name() if device == "cuda" else device
    return {"device": where, "timed": timed, "tuned": {where: tuned}, "trials": trials}


def measure(way: Way, x: Tensor, timer: Timer) -> dict[str, Any]:
    if isinstance(way.multiply, str):
        return {"absent": way.multiply}
    assert way.weight is not None
    try:
        expected = way.rounded(x).double() @ way.weight.t()
        error = float((way.multiply(x).double() - expected).norm() / expected.norm())
        if not error < MAX_ERROR:
            return {"wrong": f"relative error {error:.3g}", "relative_error": error}
        times = sorted(timer(way.multiply, x))
    except (RuntimeError, triton.TritonError) as failure:  # a block may ask for more than this device has
        return {"failed": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}"}
    median = statistics.median(times)
    return {
        "relative_error": error,
        "median_ms": median,
        "p10_ms": times[len(times) // 10],
        "p90_ms": times[-1 - len(times) // 10],
        "repetitions": len(times),
        "weight_gb_per_s": way.weight_bytes / median / 1e6,
    }


def ways(weight: Tensor, linears: dict[tuple[str, tuple[int, int]], PackedLinear]) -> Iterator[Way]:
    """Every way for this weight; the packed linears are left in `linears` by format and shape."""
    num_bytes, workspace = weight.numel() * weight.itemsize, Workspace()
    yield Way("native: aten::linear bf16", lambda x: F.linear(x, weight), num_bytes, weight.double())
    for name, member in FORMATS.items():
        linear = member.pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
        assert isinstance(linear, PackedLinear)
        linears[name, (weight.shape[0], weight.shape[1])] = linear
        held = linear.dequantize().double()
        size = weight_bytes(linear)
        yield Way(f"{name}: unpack + aten::mm", linear._multiply_unpacked, size, held)
        reason = available.missing(weight.device)
        kernel = linear.multiply_packed if linear.few_rows.triton is not None else str(reason and reason.reason)
        yield Way(f"{name}: {linear.few_rows.name or 'triton'}", kernel, size, held)
        if name == "int4":
            yield tinygemm(linear, held)
    w8a8 = W8A8().pack(weight, None, dtype=torch.bfloat16, workspace=workspace)
    yield Way(f"w8a8: {w8a8.kernel}", w8a8, weight_bytes(w8a8), w8a8.dequantize().double(), w8a8.rounded)
    yield scaled_mm(weight)


def tinygemm(linear: PackedLinear, held: Tensor) -> Way:
    name = "int4: aten::_weight_int4pack_mm"
    stored = linear.stored()
    if held.device.type != "cuda" or stored is None:
        return Way(name, "a kernel of CUDA")
    codes, fit = stored.quantized.codes, stored.quantized.fit
    packed = torch.ops.aten._convert_weight_to_int4pack.default(codes[:, ::2] << 4 | codes[:, 1::2], 8)
    offset = torch.zeros_like(fit.scale) if fit.offset is None else fit.offset
    pairs = torch.stack([fit.scale.t(), offset.t()], dim=-1).contiguous()
    group_size = codes.shape[1] // fit.scale.shape[1]

    def multiply(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm.default(x, packed, group_size, pairs)
        return y

    return Way(name, multiply, weight_bytes(linear), held)


def scaled_mm(weight: Tensor) -> Way:
    try:
        linear = Fp8().pack(weight, None, dtype=torch.bfloat16, workspace=Workspace())
    except ValueError as error:  # this device does not multiply fp8
        return Way("fp8: aten::_scaled_mm", str(error))
    return Way(f"fp8: {linear.kernel}", linear, weight_bytes(linear), linear.dequantize().double(), linear.rounded)


def tune(
    name: str, linear: PackedLinear, x: Tensor, bucket: int, timer: Timer, deadline_s: float
) -> list[dict[str, Any]]:
    """One row a config, the rule's first; nothing where the time does not last for all of them."""
    from codesign.engine.kernels.triton.configs import Plan, Problem, candidates
    from codesign.engine.kernels.triton.matmul import TritonMatmul

    group_size = getattr(FORMATS[name], "group_size", 64 if name == "nf4" else None)
    kernel = linear.few_rows.name.removeprefix("triton::")
    problem = Problem(kernel, "bf16", linear.out_features, linear.in_features, group_size)
    held, before, found = linear.dequantize().double(), linear.few_rows, []
    for config in candidates(problem, bucket):
        if time.monotonic() > deadline_s:
            linear.few_rows = before
            return []
        linear.few_rows = dataclasses.replace(before, triton=TritonMatmul(Plan(((bucket, config),), "")))
        figures = measure(Way(name, linear.multiply_packed, weight_bytes(linear), held), x, timer)
        found.append({"key": problem.key(bucket), "rows": x.shape[0], "config": str(config), **figures})
    linear.few_rows = before
    return found
